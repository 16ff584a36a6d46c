"""Digests and comparisons of another process's pages, in tables of calls."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.digests import digest_pages
from tests.harness.skips import require
from tests.process.victims import as_nobody, fork_and
from vmdedup.errors import VmGoneError
from vmdedup.guest import page_reader
from vmdedup.guest.page_reader import digests_at, equal_at
from vmdedup.guest.vm_readv import PageVanishedError, page_buffer, read_runs
from vmdedup.linux.syscall_batch import call_columns, run_calls
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = 9000
"""More than one table has, and no whole number of pieces."""
SEED = 0x1234_5678_9ABC_DEF0
HOLES = [0, 700, 701, 8500]
"""Pages that are not mapped."""


class Memory:
    """Random pages of our own, some of them unmapped, and where they stand."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, PAGES * PAGE_BYTES)
        random = np.random.default_rng(5)
        words = np.frombuffer(self.map, dtype=np.uint64)
        words[:] = random.integers(0, 2**63, len(words), dtype=np.uint64)
        self.content = words.copy().view(np.uint8)
        self.base = words.ctypes.data
        self.address = self.base + np.arange(PAGES) * PAGE_BYTES

    def unmap(self, page: int) -> None:
        """Leave a hole, which nothing else is mapped into."""
        place = int(self.address[page])
        results = run_calls(call_columns(NR.MPROTECT, place, PAGE_BYTES, 0))
        assert results.tolist() == [0]

    def map_again(self) -> None:
        run_calls(call_columns(NR.MPROTECT, self.base, PAGES * PAGE_BYTES, 3))


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    try:
        yield memory
    finally:
        memory.map_again()


@pytest.fixture(params=["library", "python"])
def any_digest_function(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own function, and what stands in where it is not to be had."""
    if request.param == "python":
        address = ctypes.cast(page_reader._asking_python, ctypes.c_void_p).value
        monkeypatch.setattr(page_reader, "_digest_function", lambda: address)


def some(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Two thirds of the pages, so in many runs, ascending."""
    return np.flatnonzero(np.random.default_rng(seed).random(PAGES) < 2 / 3)


def test_the_library_gives_its_function_away() -> None:
    assert (
        page_reader._digest_function()
        != ctypes.cast(page_reader._asking_python, ctypes.c_void_p).value
    )


def test_where_it_does_not_python_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out from the package's module: here one that exports nothing."""
    monkeypatch.setitem(sys.modules, "xxhash._xxhash", ModuleType("xxhash._xxhash"))
    page = np.arange(PAGE_BYTES // 8, dtype=np.uint64)
    function = page_reader._digest_function.__wrapped__()
    row = call_columns(function, page.ctypes.data, PAGE_BYTES, SEED)
    assert run_calls(row).view(np.uint64).tolist() == digest_pages(page.data, SEED).tolist()


@pytest.mark.usefixtures("any_digest_function")
def test_digests_are_those_of_the_bytes(memory: Memory) -> None:
    page = some(1)
    digest, is_read = digests_at("vm", os.getpid(), memory.address[page], SEED)
    assert is_read.all()
    assert digest.tolist() == digest_pages(memory.content.data, SEED)[page].tolist()


def test_pages_that_are_not_mapped_have_none(memory: Memory) -> None:
    """They spoil those behind them in their own piece at most."""
    for page in HOLES:
        memory.unmap(page)
    digest, is_read = digests_at("vm", os.getpid(), memory.address, SEED)
    assert not is_read[HOLES].any()
    assert np.count_nonzero(~is_read) < 256 * len(HOLES)
    expected = digest_pages(memory.content.data, SEED)
    assert (digest == expected)[is_read].all()
    before = np.arange(512, 700)
    assert is_read[before].all(), "what was read before the hole is no less true"


def test_equal_means_every_byte(memory: Memory) -> None:
    page = some(2)
    other = memory.content.copy()
    expected = other.ctypes.data + page * PAGE_BYTES
    assert equal_at("vm", os.getpid(), memory.address[page], expected).all()
    changed = page[::97]
    for number, at in enumerate(changed.tolist()):
        other[at * PAGE_BYTES + (number * 811) % PAGE_BYTES] ^= 1
    equal = equal_at("vm", os.getpid(), memory.address[page], expected)
    assert page[~equal].tolist() == changed.tolist()


def test_what_is_not_mapped_is_equal_to_nothing(memory: Memory) -> None:
    for page in HOLES:
        memory.unmap(page)
    expected = memory.content.ctypes.data + np.arange(PAGES) * PAGE_BYTES
    equal = equal_at("vm", os.getpid(), memory.address, expected)
    assert not equal[HOLES].any()
    assert equal[1000:8400].all()


def test_no_pages_are_no_answers() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert [len(one) for one in digests_at("vm", os.getpid(), nothing, SEED)] == [0, 0]
    assert len(equal_at("vm", os.getpid(), nothing, nothing)) == 0


def test_pages_are_read_up_to_the_first_that_is_not_mapped(memory: Memory) -> None:
    memory.unmap(700)
    buffer = page_buffer(PAGES)
    with pytest.raises(PageVanishedError) as failure:
        read_runs("vm", os.getpid(), memory.address[:1], np.array([PAGES]), buffer)
    assert failure.value.pages_read == 700
    assert np.array_equal(buffer[:700].ravel(), memory.content[: 700 * PAGE_BYTES])


def test_pages_that_may_not_be_read_are_told(memory: Memory) -> None:
    """Not taken for pages that are not mapped."""
    require(root_missing())
    child = fork_and(signal.pause)
    try:
        with as_nobody():
            for read in (
                lambda: digests_at("vm", child, memory.address[:10], SEED),
                lambda: read_runs("vm", child, memory.address[:1], np.array([10]), page_buffer(10)),
            ):
                with pytest.raises(PermissionError, match="process_vm_readv"):
                    read()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_process_that_ended_is_told(memory: Memory) -> None:
    child = fork_and(signal.pause)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(VmGoneError):
        digests_at("vm", child, memory.address[:10], SEED)
