"""Mappings of files that lie beside many others are found without reading those."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.harness.skips import require
from vmdedup.errors import UnsupportedError, VmGoneError
from vmdedup.linux.maps import Vma, files_mapped_beside, read_maps
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _can_ask() -> None:
    try:
        files_mapped_beside("own", os.getpid(), 0, [])
    except UnsupportedError as error:
        require(str(error))


@dataclass(frozen=True)
class Split:
    """A span of many mappings of one file; another file of that device is mapped beside it."""

    start: int
    end: int
    device: int


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Split]:
    """Every other page differs in how it is mapped."""
    with _mapped(tmp_path / "many", 64) as memory, _mapped(tmp_path / "one", 4):
        column = np.frombuffer(memory, dtype=np.uint8)
        start = column.ctypes.data
        for page in range(0, 64, 2):
            memory.madvise(mmap.MADV_DONTFORK, page * PAGE_BYTES, PAGE_BYTES)
        del column
        yield Split(start, start + 64 * PAGE_BYTES, tmp_path.stat().st_dev)


@contextmanager
def _mapped(path: Path, pages: int) -> Iterator[mmap.mmap]:
    path.write_bytes(bytes(pages * PAGE_BYTES))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), pages * PAGE_BYTES) as memory:
        yield memory


def _of_files(device: int) -> list[Vma]:
    maps = read_maps("own", os.getpid())
    rows = [maps.row(index) for index in range(len(maps))]
    return [row for row in rows if row.inode and row.device == device]


def test_all_mappings_of_the_device_are_told_as_maps_tells_them(split: Split) -> None:
    before = _of_files(split.device)
    assert sum(split.start <= vma.start < split.end for vma in before) == 64
    assert files_mapped_beside("own", os.getpid(), split.device, []) == before


def test_memfds_are_told_by_their_name() -> None:
    fd = os.memfd_create("beside-test")
    os.ftruncate(fd, PAGE_BYTES)
    with mmap.mmap(fd, PAGE_BYTES):
        device = os.fstat(fd).st_dev
        found = files_mapped_beside("own", os.getpid(), device, [])
        assert found == _of_files(device)
        assert any("beside-test" in vma.path for vma in found)
    os.close(fd)


def test_what_begins_in_a_span_is_left_out(split: Split) -> None:
    span = (split.start, split.end)
    beside = [vma for vma in _of_files(split.device) if not span[0] <= vma.start < span[1]]
    assert beside
    assert files_mapped_beside("own", os.getpid(), split.device, [span]) == beside
    # One that ends within a mapping: that is told once, and the search goes on behind it.
    first, inside = beside[0], beside[0].start + PAGE_BYTES
    found = files_mapped_beside("own", os.getpid(), split.device, [span, (first.start, inside)])
    assert found == (beside if first.end > inside else beside[1:])


def test_a_process_that_ended() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    with pytest.raises(VmGoneError):
        files_mapped_beside("gone", pid, 0, [])
