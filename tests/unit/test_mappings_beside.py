"""Mappings of files that lie beside many others are found without reading those."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.harness.skips import require
from vmdedup.errors import UnsupportedError, VmGoneError
from vmdedup.procfs.maps import Vma, files_mapped_beside, read_maps
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _can_ask() -> None:
    try:
        files_mapped_beside("own", os.getpid(), [])
    except UnsupportedError as error:
        require(str(error))


@pytest.fixture
def split(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A span of many mappings of one file: every other page may be written."""
    file = tmp_path / "many"
    file.write_bytes(bytes(64 * PAGE_BYTES))
    fd = os.open(file, os.O_RDWR)
    with mmap.mmap(fd, 64 * PAGE_BYTES, flags=mmap.MAP_SHARED) as memory:
        os.close(fd)
        column = np.frombuffer(memory, dtype=np.uint8)
        start = column.ctypes.data
        for page in range(0, 64, 2):
            memory.madvise(mmap.MADV_DONTFORK, page * PAGE_BYTES, PAGE_BYTES)
        del column
        yield start, start + 64 * PAGE_BYTES


def _of_files() -> list[Vma]:
    maps = read_maps("own", os.getpid())
    rows = [maps.row(index) for index in range(len(maps))]
    return [row for row in rows if row.inode]


def test_all_mappings_of_files_are_told_as_maps_tells_them(split: tuple[int, int]) -> None:
    before = _of_files()
    assert sum(split[0] <= vma.start < split[1] for vma in before) == 64
    assert files_mapped_beside("own", os.getpid(), []) == before


def test_what_begins_in_a_span_is_left_out(split: tuple[int, int]) -> None:
    start, end = split
    beside = [vma for vma in _of_files() if not start <= vma.start < end]
    assert files_mapped_beside("own", os.getpid(), [(start, end)]) == beside
    # One that ends within a mapping: that is told once, and the search goes on behind it.
    first, inside = beside[0], beside[0].start + PAGE_BYTES
    found = files_mapped_beside("own", os.getpid(), [split, (first.start, inside)])
    assert found == (beside if first.end > inside else beside[1:])


def test_a_process_that_ended() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    with pytest.raises(VmGoneError):
        files_mapped_beside("gone", pid, [])
