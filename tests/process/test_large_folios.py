"""Large folios of this process: which keep memory of merged pages, and that they are split."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.harness.huge_pages import collapse
from tests.harness.images import REPOSITORY
from tests.harness.kernel import Area, Vma, stranded_pages
from tests.process.victims import as_nobody
from vmdedup.core.rmap import OWN, ZERO
from vmdedup.errors import VmGoneError
from vmdedup.guest import large_folios
from vmdedup.guest.large_folios import MOST_FOLIO_PAGES, kept_memory, still_kept, suspects
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.pagemap import Pagemap
from vmdedup.linux.process import Process
from vmdedup.remap.merge_vm import retry_to_split
from vmdedup.remap.release import split_large_folios
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="frames are known to root alone"),
]

_PR_SET_DUMPABLE = 4
PAGES = HUGE_PAGE_BYTES // PAGE_BYTES


@dataclass(frozen=True)
class Block:
    """One huge page, as a region."""

    start: int
    size_bytes: int = HUGE_PAGE_BYTES

    def unmap(self, page: int) -> None:
        """As a remap does: the folio stays whole."""
        address = self.start + page * PAGE_BYTES
        assert ctypes.CDLL(None).madvise(ctypes.c_void_p(address), PAGE_BYTES, 4) == 0


@contextmanager
def block() -> Iterator[Block]:
    with mmap.mmap(-1, 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        column = np.frombuffer(memory, dtype=np.uint8)
        start = -(-column.ctypes.data // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        column[start - column.ctypes.data :: PAGE_BYTES][:PAGES] = 1
        del column
        if not collapse(os.getpid(), [Vma(start, start + HUGE_PAGE_BYTES, "rw-p", 0, "", 0, "")]):
            pytest.skip("no huge page to be had: MADV_COLLAPSE failed")
        yield Block(start)


@contextmanager
def merged_in_part() -> Iterator[tuple[Pagemap, PageSpace, np.ndarray, np.ndarray]]:
    """A huge page of which one page is merged: what `split_large_folios` is given."""
    with block() as one, Pagemap("vm", os.getpid()) as pagemap:
        space, page = PageSpace([one]), np.array([5], dtype=np.int64)
        slot = np.full(space.pages, OWN, dtype=np.int32)
        slot[page] = ZERO
        one.unmap(5)
        yield pagemap, space, slot, page


def test_a_folio_at_the_start_of_the_second_region() -> None:
    with ExitStack() as exits:
        blocks = [exits.enter_context(block()) for _ in range(2)]
        blocks.sort(key=lambda each: each.start)
        pagemap = exits.enter_context(Pagemap("vm", os.getpid()))
        space, page = PageSpace(blocks), np.array([PAGES - 1, PAGES], dtype=np.int64)
        slot = np.full(space.pages, OWN, dtype=np.int32)
        slot[page] = ZERO
        blocks[0].unmap(PAGES - 1)
        blocks[1].unmap(0)
        kept = kept_memory(pagemap, space, slot, page, MOST_FOLIO_PAGES)
    assert kept is not None
    assert sorted(space.region_of(kept.page).tolist()) == [0, 1]
    assert kept.pages.tolist() == [1, 1]


def test_a_vm_that_ends_before_its_folios_are_split_is_gone() -> None:
    with (
        merged_in_part() as found,
        subprocess.Popen(["sleep", "600"]) as other,
        Process("vm", other.pid) as process,
    ):
        other.kill()
        other.wait()
        with pytest.raises(VmGoneError):
            split_large_folios(process, *found, MOST_FOLIO_PAGES)


def test_memory_that_is_not_there_any_more_is_an_error() -> None:
    """As of a block that was unplugged: it is not taken for a kernel without this advice."""
    with merged_in_part() as found, subprocess.Popen(["sleep", "600"]) as other:
        try:
            with Process("vm", other.pid) as process, pytest.raises(OSError, match="allocate"):
                split_large_folios(process, *found, MOST_FOLIO_PAGES)
        finally:
            other.kill()


def test_a_folio_that_could_not_be_split_is_tried_again_after_a_while() -> None:
    """One that was pinned then, say, and is not any more."""
    with merged_in_part() as (pagemap, space, slot, page), Process("vm", os.getpid()) as process:
        ((start, end),) = space.spans()
        area = Area(start, end, is_shared=False)
        kept = kept_memory(pagemap, space, slot, page, MOST_FOLIO_PAGES)
        assert kept is not None
        scan = SimpleNamespace(columns=SimpleNamespace(slot=slot))
        record = SimpleNamespace(kept=kept, kept_since=time.monotonic())
        vm: Any = SimpleNamespace(
            process=process, pagemap=pagemap, space=space, scan=scan, record=record
        )
        retry_to_split(vm)
        assert stranded_pages(os.getpid(), area) == 1
        record.kept_since -= 3600
        retry_to_split(vm)
        assert stranded_pages(os.getpid(), area) == 0
        assert not len(record.kept.page)
        assert record.kept_since > time.monotonic() - 3600


_SPLIT_BLINDLY = """
import os, sys
from tests.process.test_large_folios import MOST_FOLIO_PAGES, merged_in_part
from vmdedup.guest.large_folios import NOTHING_KEPT
from vmdedup.linux.process import Process
from vmdedup.remap.release import split_large_folios
with merged_in_part() as found, Process("vm", os.getpid()) as process:
    (start, _end), = found[1].spans()
    print(start, flush=True)
    sys.stdin.readline()
    assert split_large_folios(process, *found, MOST_FOLIO_PAGES) is NOTHING_KEPT
    print("split", flush=True)
    sys.stdin.readline()
"""


def test_a_folio_is_split_by_an_engine_that_may_not_see_frames() -> None:
    """Without CAP_SYS_ADMIN it does not know which folios are still whole: it advises all."""
    with block():  # else skipped here, and not in there
        pass
    without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", sys.executable, "-c"]
    with subprocess.Popen(
        [*without, _SPLIT_BLINDLY],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None
        try:
            start = int(engine.stdout.readline())
            area = Area(start, start + HUGE_PAGE_BYTES, is_shared=False)
            assert stranded_pages(engine.pid, area) == 1
            engine.stdin.write("\n")
            engine.stdin.flush()
            assert engine.stdout.readline() == "split\n"
            assert stranded_pages(engine.pid, area) == 0
        finally:
            engine.stdin.close()
        assert engine.wait(30) == 0


def test_without_a_right_to_see_frames_nothing_is_said_of_folios() -> None:
    """Not that none is kept: that is not known."""
    with block() as one, Pagemap("vm", os.getpid()) as pagemap:
        space, page = PageSpace([one]), np.array([7], dtype=np.int64)
        slot = np.full(space.pages, OWN, dtype=np.int32)
        slot[page] = ZERO
        one.unmap(7)
        kept = kept_memory(pagemap, space, slot, page, MOST_FOLIO_PAGES)
        assert kept is not None
        assert still_kept(pagemap, space, kept).pages.tolist() == [1]
        with as_nobody():  # frames are known by the descriptor, which is root's
            assert kept_memory(pagemap, space, slot, page, MOST_FOLIO_PAGES) is None
            assert not len(still_kept(pagemap, space, kept).pages)
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # its own /proc stays its own
            with Pagemap("vm", os.getpid()) as blind:
                assert kept_memory(blind, space, slot, page, MOST_FOLIO_PAGES) is None


_COUNT, _MODE = "stats/nr_anon_partially_mapped", "enabled"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"2048kB": {_COUNT: "0"}, "64kB": {_COUNT: "0"}, "8kB": {}}, ([], 0)),
        ({"2048kB": {_COUNT: "0"}, "64kB": {_COUNT: "3"}, "8kB": {}}, ([4, 5, 6], 16)),
        ({"2048kB": {_COUNT: "1"}, "64kB": {_COUNT: "3"}, "8kB": {}}, ([4, 5, 6], 512)),
        ({"2048kB": {_MODE: "[always]"}, "64kB": {_MODE: "always [never]"}}, ([5], 512)),
        ({"2048kB": {_MODE: "[always]"}, "64kB": {_MODE: "[always] never"}}, ([4, 5, 6], 512)),
        ({"2048kB": {_MODE: "[always]"}, "64kB": {}}, ([5], 512)),
        ({}, ([5], 512)),
    ],
)
def test_which_pages_may_be_of_a_folio_that_is_still_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, dict[str, str]],
    found: tuple[list[int], int],
) -> None:
    """By what kernels say: since 6.12 they count such folios, but not in sizes of files alone."""
    for size, contents in files.items():
        for name, content in contents.items():
            path = tmp_path / f"hugepages-{size}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
        (tmp_path / f"hugepages-{size}" / "stats").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(large_folios, "_SIZES", tmp_path)
    page, most_pages = suspects(np.array([4, 5, 6]), np.array([False, True, False]))
    assert (page.tolist(), most_pages) == found


def test_a_folio_that_is_mapped_in_part_makes_pages_suspect() -> None:
    if not list(large_folios._SIZES.glob(f"hugepages-2048kB/{_COUNT}")):
        pytest.skip("this kernel does not count them (Linux 6.12)")
    with block() as one:
        one.unmap(7)
        page, most_pages = suspects(np.array([7]), np.array([False]))
    assert (page.tolist(), most_pages) == ([7], MOST_FOLIO_PAGES)
