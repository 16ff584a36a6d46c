"""Bursts of compiled gates over memory of a victim: what they do, and what they leave to Python.

And a gate in Python whose calls have left a hole.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.harness.kernel import mappings
from tests.process.guarded import Setting
from vmdedup import faults
from vmdedup.errors import BorderError, VmError, VmGoneError
from vmdedup.inject import table
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import RemoteThread, call_rows
from vmdedup.inject.table import CANCELLED
from vmdedup.linux.pagemap import ENTRY_OF_PAGE, ENTRY_UFFD_WP, Pagemap
from vmdedup.linux.sparse_file import punch_holes
from vmdedup.linux.syscalls import NR, pidfd_getfd
from vmdedup.linux.userfaultfd import SYNCHRONOUS_FEATURES, Userfault
from vmdedup.remap import _gates, burst
from vmdedup.remap.burst import BurstState, Means, Prepared, run_burst
from vmdedup.remap.gate import Batch
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = 4096
_PROT_READ_WRITE, _MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 3, 1, 2, 0x10, 0x20
_NO_FD = (1 << 64) - 1
_POLL = 7
_OLD = 0x5A
Runs = Sequence[tuple[int, int]]


class Stage:
    """Memory of the victim, full and protected, and a thread of it that is kept."""

    def __init__(self, setting: Setting, memory: int) -> None:
        self._exits = ExitStack()
        self.victim, self._memory = setting.victim, memory
        os.pwrite(memory, bytes([_OLD]) * PAGES * PAGE_BYTES, 0)
        self.remote = self._exits.enter_context(
            RemoteThread("victim", self.victim.pid, self.victim.worker, max_calls=64)
        )
        inside = setting.lend(self.remote, memory)
        where = (_PROT_READ_WRITE, _MAP_SHARED, inside, 0)
        self.start = self.remote.call(NR.MMAP, 0, PAGES * PAGE_BYTES, *where)
        self.pagemap = self._exits.enter_context(Pagemap("victim", self.victim.pid))
        self.userfault = self._exits.enter_context(self._take_userfault())
        self.userfault.register([(self.start, self.start + PAGES * PAGE_BYTES)])
        self.guard = self._exits.enter_context(Guard(self.userfault.fd))
        self.guard.lent(setting.lend(self.remote, self.guard.theirs))
        self._beat = np.zeros(1, dtype=np.uint64)
        # What is mapped from now on stays protected, and the thread waits for its guard.
        with open(f"/proc/{self.victim.pid}/mem", "rb", buffering=0) as pages:
            pages.seek(self.start)
            assert pages.read(PAGES * PAGE_BYTES) == bytes([_OLD]) * PAGES * PAGE_BYTES
        self.userfault.protect(np.array([self.start]), np.array([PAGES * PAGE_BYTES]))
        self.keep()

    def _take_userfault(self) -> Userfault:
        number = self.remote.call(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        fd = pidfd_getfd(self.remote.pidfd, number)
        self.remote.call(NR.CLOSE, number)
        return Userfault("victim", self.victim.pid, fd, SYNCHRONOUS_FEATURES)

    def keep(self) -> None:
        self.remote.hold()
        self.remote.launch(call_rows([(NR.GETPID,)]), guard=self.guard, keep=True)
        assert self.remote.wait(10).tolist() == [self.victim.pid]

    def close(self) -> None:
        self._exits.close()

    def prepared(self, runs: Runs, after: Sequence[tuple[int, ...]] = ()) -> Prepared:
        """A batch that maps fresh zeroes over these (first page, pages) as they are now."""
        start = np.array([self.start + first * PAGE_BYTES for first, _ in runs])
        pages = np.array([count for _, count in runs])
        fresh = (_PROT_READ_WRITE, _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS, _NO_FD, 0)
        calls = [
            (NR.MMAP, address, count * PAGE_BYTES, *fresh)
            for address, count in zip(start.tolist(), pages.tolist(), strict=True)
        ]
        seen = self.pagemap.entries_of(start, pages)
        return Prepared(start, pages, seen, call_rows([*calls, *after]))

    def closed(self, batches: Sequence[Prepared], deadline_s: float = 10) -> burst.Burst:
        """Burst after burst: on a busy host the time of one may be up before all are done."""
        results: list[npt.NDArray[np.int64]] = []
        closed_ms: list[float] = []
        while True:
            found = self.one_burst(batches[len(results) :], deadline_s)
            results += found.results
            closed_ms += found.closed_ms[: len(found.results)]
            if found.state != BurstState.GO_ON or len(results) == len(batches):
                closed_ms += found.closed_ms[len(found.results) :]
                return replace(found, results=results, closed_ms=closed_ms)

    def one_burst(self, batches: Sequence[Prepared], deadline_s: float = 10) -> burst.Burst:
        here, there = self.remote.table_addresses
        means = Means(
            pagemap_fd=self.pagemap.fd,
            userfault_fd=self.userfault.fd,
            guard_fd=self.guard.ours,
            pidfd=self.remote.pidfd,
            table_here=here,
            table_there=there,
            beat_here=self._beat.ctypes.data,
            most_calls=self.remote.max_calls,
        )
        return run_burst(means, batches, deadline_s=deadline_s)

    @property
    def has_beaten(self) -> bool:
        return bool(self._beat[0])

    def fresh(self) -> list[int]:
        """The pages that were mapped anew."""
        with open(f"/proc/{self.victim.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(self.start)
            content = np.frombuffer(memory.read(PAGES * PAGE_BYTES), dtype=np.uint8)
        first: npt.NDArray[np.uint8] = content.reshape(PAGES, PAGE_BYTES)[:, 0]
        assert set(first.tolist()) <= {0, _OLD}
        return np.flatnonzero(first == 0).tolist()

    def punch(self, page: int) -> None:
        """Another page frame, which a later read brings: the protection stays."""
        punch_holes(self._memory, np.array([page * PAGE_BYTES]), np.array([PAGE_BYTES]))


@pytest.fixture
def stage(programs: dict[str, Path]) -> Iterator[Stage]:
    with ExitStack() as exits:
        memory = os.memfd_create("memory")
        exits.callback(os.close, memory)
        setting = Setting(programs["dynamic"])
        exits.callback(setting.close)
        stage = Stage(setting, memory)
        exits.callback(stage.close)
        yield stage


@contextmanager
def at(step: str, action: Callable[[], object]) -> Iterator[None]:
    """Have `action` done whenever that step is reached."""

    def hook(reached: str) -> None:
        if reached == step:
            action()

    faults.hook = hook
    try:
        yield
    finally:
        faults.hook = None


def pages_of(*runs: tuple[int, int]) -> list[int]:
    return sorted(page for first, count in runs for page in range(first, first + count))


def _reversed(batch: Prepared) -> Prepared:
    calls = batch.calls[::-1].copy()
    return replace(batch, start=batch.start[::-1].copy(), calls=calls)


@pytest.mark.parametrize(
    "spoil",
    [
        _reversed,
        lambda batch: replace(batch, pages=batch.pages * -1),
        lambda batch: replace(batch, pages=batch.pages[::-1].copy()),
        lambda batch: replace(batch, calls=batch.calls[::-1].copy()),
        lambda batch: replace(batch, seen=batch.seen[:1]),
        lambda batch: replace(batch, calls=batch.calls[:0]),
        lambda batch: replace(batch, calls=np.tile(batch.calls, (40, 1))),
    ],
    ids=["order", "negative", "lengths", "calls", "seen", "none", "room"],
)
def test_columns_that_do_not_fit_close_no_gate(
    stage: Stage, spoil: Callable[[Prepared], Prepared]
) -> None:
    """Also where it is only the second of two gates; else memory beside them would be read."""
    good = stage.prepared([(4, 1), (8, 2)])
    with pytest.raises(BorderError):
        stage.one_burst([stage.prepared([(0, 1)]), spoil(good)])
    assert stage.fresh() == []
    assert not stage.has_beaten
    assert len(stage.closed([good]).results) == 1


def test_what_is_compiled_in_is_what_python_has() -> None:
    names = (table.W_DONE, table.W_CANCEL, table.W_END, table.W_LAST, table.W_KEEP)
    assert (*names, table.HEADER_BYTES // 8) == _gates.TABLE_WORDS
    assert (int(ENTRY_UFFD_WP), int(ENTRY_OF_PAGE)) == _gates.ENTRY_MASKS
    assert burst.is_available()


def test_gates_are_closed_one_after_the_other(stage: Stage) -> None:
    runs: list[Runs] = [
        [(0, 1), (1, 3), (10, 1)],  # narrow gaps are read over
        [(100, 2), (1000, 1)],  # wide ones are not
        [(1500, 2048)],
    ]
    found = stage.closed([stage.prepared(one, [(NR.GETPID,)]) for one in runs])
    assert (found.state, found.lifted_pages) == (BurstState.GO_ON, 0)
    assert [results.tolist() for results in found.results] == [
        [*(stage.start + first * PAGE_BYTES for first, _ in one), stage.victim.pid] for one in runs
    ]
    assert len(found.closed_ms) == 3
    assert min(found.closed_ms) > 0
    assert stage.has_beaten
    assert stage.remote.is_kept
    assert stage.fresh() == pages_of(*(run for one in runs for run in one))


@pytest.mark.parametrize("page", [200, 201, 203])
def test_a_page_that_is_not_as_it_was_is_left_to_python(stage: Stage, page: int) -> None:
    batches = [stage.prepared([(0, 4)]), stage.prepared([(200, 4)]), stage.prepared([(300, 4)])]
    one = stage.start + page * PAGE_BYTES
    stage.userfault.lift(np.array([one]), np.array([PAGE_BYTES]))
    found = stage.closed(batches)
    assert (found.state, len(found.results)) == (BurstState.CAREFUL, 1)
    assert stage.fresh() == pages_of((0, 4))
    # Protected again it is taken.
    stage.userfault.protect(np.array([one]), np.array([PAGE_BYTES]))
    assert stage.closed(batches[1:]).state == BurstState.GO_ON
    assert stage.fresh() == pages_of((0, 4), (200, 4), (300, 4))


def test_a_hole_under_the_same_protection_is_left_to_python(stage: Stage) -> None:
    batch = stage.prepared([(7, 2)])
    stage.punch(8)
    assert stage.prepared([(8, 1)]).seen & ENTRY_UFFD_WP
    found = stage.closed([batch])
    assert (found.state, found.results) == (BurstState.CAREFUL, [])
    assert stage.fresh() == [8]


def test_only_the_page_counts_in_what_the_kernel_says_of_it(stage: Stage) -> None:
    batch = stage.prepared([(7, 2)])
    seen = batch.seen.copy()
    seen[1] ^= np.uint64(1)  # the frame's lowest bit
    found = stage.closed([Prepared(batch.start, batch.pages, seen, batch.calls)])
    assert (found.state, found.results) == (BurstState.CAREFUL, [])
    # Whether a page is dirty, or mapped by one process alone, says nothing of its frame.
    seen = batch.seen ^ np.uint64(1 << 55) ^ np.uint64(1 << 56)
    found = stage.closed([Prepared(batch.start, batch.pages, seen, batch.calls)])
    assert found.state == BurstState.GO_ON
    assert stage.fresh() == pages_of((7, 2))


def test_a_run_longer_than_what_is_read_at_once_is_left_to_python(stage: Stage) -> None:
    found = stage.closed([stage.prepared([(0, 2049)])])
    assert (found.state, found.results) == (BurstState.CAREFUL, [])
    assert stage.fresh() == []


def test_calls_that_fail_are_left_to_python(stage: Stage) -> None:
    good, bad = stage.prepared([(0, 1)]), stage.prepared([(5, 1), (6, 1)])
    bad.calls[1, 4] = _MAP_FIXED  # neither shared nor private
    for batch in (bad, stage.prepared([(8, 1)], [(NR.CLOSE, 1 << 20)])):
        found = stage.closed([good, batch, good])
        assert (found.state, len(found.results)) == (BurstState.LAUNCHED, 1)
        assert len(found.closed_ms) == 2
        stage.remote.note_launched(len(batch.calls), given=True)
        results = stage.remote.wait(10).tolist()
        assert results[0] == batch.start[0]
        assert results[1] < 0
        assert stage.remote.is_kept
        # `good` was remapped, and so is protected no more.
        good = stage.prepared([(20, 1)])
    assert {0, 5, 8}.issubset(stage.fresh())


def test_calls_that_take_too_long_are_left_to_python(stage: Stage) -> None:
    batch = stage.prepared([(0, 1), (1, 1)], [(_POLL, 0, 0, 300), (NR.GETPID,)])
    found = stage.closed([batch], deadline_s=0.05)
    assert (found.state, found.results) == (BurstState.LAUNCHED, [])
    stage.remote.note_launched(len(batch.calls), given=True)
    stage.remote.cancel()
    start = batch.start.tolist()
    assert stage.remote.wait(10).tolist() == [*start, 0, CANCELLED]
    assert stage.fresh() == pages_of((0, 2))


def test_a_deadline_that_has_passed_launches_nothing(stage: Stage) -> None:
    found = stage.closed([stage.prepared([(0, 1)])], deadline_s=0)
    assert (found.state, found.results) == (BurstState.CAREFUL, [])
    assert stage.fresh() == []


def test_a_guard_that_can_not_be_given_has_nothing_run(stage: Stage) -> None:
    batch = stage.prepared([(0, 1)])
    with at("burst-filled", stage.userfault.close):
        found = stage.closed([batch])
    assert (found.state, found.results) == (BurstState.NOT_GIVEN, [])
    stage.remote.note_launched(len(batch.calls), given=False)
    assert stage.remote.wait(10).tolist() == [CANCELLED]
    assert not stage.remote.is_kept
    assert stage.fresh() == []


def test_a_vm_that_ends_in_a_burst_is_noticed(stage: Stage) -> None:
    batch = stage.prepared([(0, 1)], [(_POLL, 0, 0, 10_000)])
    with at("burst-launched", stage.victim.kill):
        found = stage.closed([batch])
    assert (found.state, found.results) == (BurstState.LAUNCHED, [])
    stage.remote.note_launched(len(batch.calls), given=True)
    with pytest.raises(VmGoneError):
        stage.remote.wait(10)


def test_time_that_is_up_ends_a_burst_and_the_rest_goes_on(stage: Stage) -> None:
    batches = [stage.prepared([(page, 1)], [(_POLL, 0, 0, 15)]) for page in range(3)]
    found = stage.one_burst(batches)
    assert (found.state, len(found.results)) == (BurstState.GO_ON, 1)
    assert len(found.closed_ms) == 2  # the next one was not begun
    assert found.closed_ms[1] == 0
    assert stage.closed(batches[1:]).state == BurstState.GO_ON
    assert stage.fresh() == [0, 1, 2]


def test_a_userfaultfd_that_is_closed_is_an_error(stage: Stage) -> None:
    """The batch has run; nobody can be woken through it, and nobody waits."""
    batch = stage.prepared([(0, 1)])
    closed = at("burst-completed", stage.userfault.close)
    with closed, pytest.raises(OSError, match="Bad file descriptor"):
        stage.closed([batch])
    assert stage.fresh() == [0]


def test_without_the_compiled_code_there_are_no_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As installed without a compiler: every gate is closed in Python then."""
    monkeypatch.setitem(sys.modules, "vmdedup.remap._gates", None)
    burst.is_available.cache_clear()
    assert not burst.is_available()
    monkeypatch.undo()
    burst.is_available.cache_clear()
    assert burst.is_available()


def test_a_hole_is_mapped_back_or_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a gate of a pause: up to Linux 6.11 a remap that fails may have unmapped the page."""
    size_bytes = 2 * PAGE_BYTES
    mended: list[str] = []
    monkeypatch.setattr(faults, "hook", lambda step: mended.append(step) if step == "mended" else 0)
    stage.userfault.close()
    stage.remote.dismiss()
    stage.remote.call(NR.MUNMAP, stage.start, size_bytes)
    where = (NR.MMAP, stage.start, size_bytes, _PROT_READ_WRITE)
    fails = call_rows([(*where, _MAP_PRIVATE | _MAP_FIXED, 9999, 0)])
    fresh = call_rows([(*where, _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS, _NO_FD, 0)])

    def run(back: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        stage.remote.hold()
        gate = Batch(stage.remote, stage.pagemap, way_back=lambda _: back)
        results = gate._mended(fails, gate._run(fails, 10))
        gate.settle()
        return results

    address = f"{stage.start:#x}"
    with pytest.raises(VmError, match=f"its memory at {address} could not be mapped back"):
        run(fails)
    assert len(mended) > 1
    mended.clear()
    assert run(fresh).tolist() == [-errno.EBADF]
    assert mended == ["mended"]
    covering = [m for m in mappings(stage.victim.pid) if m.start <= stage.start < m.end]
    assert [m.inode for m in covering] == [0]
    stage.victim.require_healthy()
