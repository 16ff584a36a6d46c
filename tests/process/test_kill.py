"""`kill -9` of the injecting process at every step, and at random moments."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true
from tests.harness.skips import require
from tests.process.victims import Victim, fork_and, wait_for_syscall
from vmdedup.inject.leftovers import may_run_leftover_batch
from vmdedup.inject.remote import RemoteThread, call_rows, stale_scratch
from vmdedup.inject.table import (
    MAGIC,
    STUB_RUNS,
    W_BUSY,
    W_DONE,
    W_MAGIC,
    W_OWNING,
    W_RSP,
    W_TID,
)
from vmdedup.inject.threads import stack_pointer
from vmdedup.inject.x86_64 import WORD
from vmdedup.linux import bounded, syscalls
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

pytestmark = [pytest.mark.process, pytest.mark.chaos]

_POLL = 7
_NOBODY = 1 << 22
"""The number of no process: pid_max at most."""
# fmt: off
_COMMON_STEPS = (
    "seized", "stopped", "frames-written", "regs-set", "detached", "copied", "opened",
    "table-filled", "completed", "removed",
)
# fmt: on
_STEPS = {"stub": _COMMON_STEPS, "chain": (*_COMMON_STEPS, "entry-written")}


def _session(victim: Victim, tid: int, *, stub: bool, step: str = "", occurrence: int = 0) -> None:
    """A whole session, killed when `step` is reached the `occurrence`-th time."""
    seen = itertools.count()

    def fault(reached: str) -> None:
        if reached == step and next(seen) == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    remote = RemoteThread(
        "victim",
        victim.pid,
        tid,
        stub=stub,
        require_futex=tid == victim.worker,
        hold_timeout_s=20,
        fault_point=fault,
    )
    with remote:
        assert remote.call(NR.GETPID) == victim.pid
        remote.hold()
        remote.launch(call_rows([(NR.GETPID,), (NR.CLOSE, 9999)] * 100))
        assert len(np.unique(remote.wait(10))) == 2


def _require_usable(victim: Victim, tid: int, *, stub: bool) -> None:
    """The victim answers right, and a fresh session works and leaves nothing."""
    victim.require_healthy()
    _session(victim, tid, stub=stub)
    victim.require_healthy()
    victim.require_no_scratch()


@pytest.mark.parametrize("thread", ["worker", "busy"])
@pytest.mark.parametrize(
    ("mode", "step"), [(mode, step) for mode, steps in _STEPS.items() for step in steps]
)
def test_killed_at_a_step(victim: Victim, mode: str, step: str, thread: str) -> None:
    stub, tid = mode == "stub", getattr(victim, thread)
    for occurrence in itertools.count():
        child = fork_and(
            partial(_session, victim, tid, stub=stub, step=step, occurrence=occurrence)
        )
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        _require_usable(victim, tid, stub=stub)
        if code == 0:
            assert occurrence > 0, "the step was never reached"
            return
        assert code == -signal.SIGKILL


@pytest.mark.parametrize("thread", ["worker", "busy"])
def test_killed_at_random_moments(programs: dict[str, Path], stub: bool, thread: str) -> None:
    moments = random.Random(42)

    def endlessly() -> None:
        while True:
            _session(victim, tid, stub=stub)

    with Victim(programs["dynamic"]) as victim:
        tid = getattr(victim, thread)
        for _ in range(60):
            child = fork_and(endlessly)
            time.sleep(moments.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            victim.require_healthy()
        _require_usable(victim, tid, stub=stub)


@pytest.mark.parametrize("owns", [False, True])
def test_a_late_batch_waits_for_no_file_but_those_it_owns(
    programs: dict[str, Path], tmp_path: Path, owns: bool
) -> None:
    """Else a batch in any VM of the host would keep every store from being swept."""
    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as file, Victim(programs["dynamic"], [file.fileno()]) as victim:

        def launch_late() -> None:
            with RemoteThread("victim", victim.pid, victim.worker) as remote:
                if owns:
                    remote.own([file.fileno()])
                remote.hold()
                os.kill(victim.pid, signal.SIGSTOP)
                remote.launch(call_rows([(NR.GETPID,)] * 4))
                os.kill(os.getpid(), signal.SIGKILL)

        child = fork_and(launch_late)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found = os.fstat(file.fileno())
        maps = Path(f"/proc/{victim.pid}/maps").read_bytes()
        may_run = may_run_leftover_batch(victim.pid, maps, (found.st_dev, found.st_ino))
        os.kill(victim.pid, signal.SIGCONT)
        assert may_run is owns
        victim.require_healthy()
        with RemoteThread("victim", victim.pid, victim.worker) as remote:
            assert remote.call(NR.GETPID) == victim.pid
        victim.require_no_scratch()


def test_what_a_killed_predecessor_left_is_found_and_removed(victim: Victim, stub: bool) -> None:
    child = fork_and(lambda: _session(victim, victim.worker, stub=stub, step="opened"))
    os.waitpid(child, 0)
    left = stale_scratch(victim.pid)
    assert len(left) == (2 if stub else 1)
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
        assert stale_scratch(victim.pid) == []
        assert remote.call(NR.GETPID) == victim.pid
    victim.require_no_scratch()


@pytest.mark.parametrize("damage", ["no table", "no tail", "no magic"])
def test_what_was_damaged_since_is_removed_and_not_believed(
    programs: dict[str, Path], damage: str
) -> None:
    """By the process itself: it can unmap what we mapped, and write into the table."""
    hear, tell = os.pipe()

    def leave() -> None:
        remote = RemoteThread("victim", victim.pid, victim.worker)
        with remote:
            table, address = remote._session.scratch.table, remote.table_addresses[1]
            remote.hold()
            table.begin_owning(2)
            table.rows[0, :] = NR.FCNTL, tell, 0, 0, 0, 0, 0, tell
            table.end_owning([tell])
            table.header[W_OWNING] = 128
            if damage == "no magic":
                table.header[W_MAGIC] = 0
            else:
                kept_bytes = PAGE_BYTES if damage == "no tail" else 0
                size_bytes = remote._session.scratch._size_bytes - PAGE_BYTES
                gone = (NR.MUNMAP, address + kept_bytes, size_bytes - kept_bytes)
                remote.release()
                remote._session.scratch.hold(for_chain=True)
                remote._session.thread.run_on_stack(call_rows([gone]))
                remote.hold()
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with Victim(programs["dynamic"], [tell]) as victim:
            child = fork_and(leave)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            assert stale_scratch(victim.pid)
            _require_usable(victim, victim.worker, stub=True)
            assert Path(f"/proc/{victim.pid}/fd/{tell}").exists()
    finally:
        os.close(hear)
        os.close(tell)


def test_code_that_a_predecessors_batch_waits_in_stays_until_it_ends(victim: Victim) -> None:
    """Its thread idles in futex, as QEMU's RCU thread does; but inside the stub."""
    hear, tell = os.pipe()

    def launch_and_die() -> None:
        with RemoteThread("victim", victim.pid, victim.worker) as remote:
            page = remote.call(NR.MMAP, 0, 4096, 3, 0x22, (1 << 64) - 1, 0)
            os.write(tell, page.to_bytes(8))
            remote.hold()
            remote.launch(call_rows([(NR.FUTEX, page), (NR.MUNMAP, page, 4096)]))
            wait_for_syscall(victim.pid, victim.worker, NR.FUTEX)
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        child = fork_and(launch_and_die)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        page = int.from_bytes(os.read(hear, 8))
    finally:
        os.close(hear)
        os.close(tell)
    left = stale_scratch(victim.pid)
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        assert remote.call(NR.GETPID) == victim.pid
    assert stale_scratch(victim.pid) == left
    with open(f"/proc/{victim.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(page)
        memory.write(b"\x01")
    with RemoteThread("victim", victim.pid, victim.worker) as remote:  # its futex returns after it
        assert remote.call(NR.GETPID) == victim.pid
    _require_usable(victim, victim.worker, stub=True)
    with (
        RemoteThread("victim", victim.pid, victim.worker) as remote,
        pytest.raises(OSError, match="madvise"),  # ENOMEM: the batch went on, and unmapped it
    ):
        remote.call(NR.MADVISE, page, 4096, 0)


@contextmanager
def _left_here(words: dict[int, int], role: str = "table") -> Iterator[int]:
    """Scratch of a vmdedup that has ended, mapped into this process; its address."""
    fd = os.memfd_create(f"vmdedup-{role}-{_NOBODY}-1-7")
    try:
        os.ftruncate(fd, 4 * PAGE_BYTES)
        memory = mmap.mmap(fd, 4 * PAGE_BYTES)
    finally:
        os.close(fd)
    for index, word in words.items():
        memory[index * WORD : (index + 1) * WORD] = word.to_bytes(8, "little")
    anchor = ctypes.c_char.from_buffer(memory)
    try:
        yield ctypes.addressof(anchor)
    finally:
        del anchor
        memory.close()


def _may_run_here() -> bool:
    maps = Path("/proc/self/maps").read_bytes()
    return may_run_leftover_batch(os.getpid(), maps, (1, 1))


@pytest.fixture
def idle_tid() -> Iterator[int]:
    """A thread of this process that idles in futex."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert thread.native_id is not None
    wait_for_syscall(os.getpid(), thread.native_id, NR.FUTEX)
    yield thread.native_id
    end.set()
    thread.join()


def test_whether_a_late_batch_may_run_is_seen_from_where_its_thread_rests(idle_tid: int) -> None:
    """Also one of an earlier version, which owned no descriptors."""
    stack = stack_pointer(os.getpid(), idle_tid)
    assert stack is not None
    launched = {W_MAGIC: MAGIC, W_BUSY: STUB_RUNS, W_TID: idle_tid}
    rests = {**launched, W_RSP: stack}
    in_handler = {**launched, W_RSP: stack + 4096}
    for words, role, may_run in (
        (rests, "table", False),
        (in_handler, "table", True),
        ({**in_handler, W_DONE: 1}, "table", False),
        ({**in_handler, W_TID: _NOBODY}, "table", False),
        (in_handler, "stub", False),
    ):
        with _left_here(words, role):
            assert _may_run_here() is may_run


def test_a_table_that_can_not_be_read_now_may_belong_to_a_batch_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require(root_missing())
    monkeypatch.setattr(bounded, "LIMIT_S", 0.2)
    with _left_here({}) as address:
        assert not _may_run_here()
        memory = (ctypes.c_ulong * 4)(0xAA, 0, 0, 0)
        fd = syscalls.syscall(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            syscalls.ioctl(fd, 0xC018AA3F, memory)
            missing = (ctypes.c_ulong * 4)(address, 4 * PAGE_BYTES, 1, 0)
            syscalls.ioctl(fd, 0xC020AA00, missing)
            syscalls.syscall(NR.MADVISE, address, 4 * PAGE_BYTES, mmap.MADV_REMOVE)
            assert _may_run_here()
        finally:
            os.close(fd)
        assert becomes_true(lambda: not bounded.is_stuck(os.getpid()))
        assert not _may_run_here()


def test_a_batch_of_a_killed_predecessor_ends_before_the_next_session(
    victim: Victim, stub: bool
) -> None:
    """The predecessor dies in the first call of its batch; the second still runs."""

    def launch_and_die() -> None:
        with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
            page = remote.call(NR.MMAP, 0, 4096, 3, 0x22, (1 << 64) - 1, 0)
            os.write(report, page.to_bytes(8))
            remote.hold()
            remote.launch(call_rows([(_POLL, 0, 0, 500), (NR.MUNMAP, page, 4096)]))
            wait_for_syscall(victim.pid, victim.worker, _POLL)
            os.kill(os.getpid(), signal.SIGKILL)

    hear, report = os.pipe()
    try:
        child = fork_and(launch_and_die)
        os.waitpid(child, 0)
        page = int.from_bytes(os.read(hear, 8))
    finally:
        os.close(hear)
        os.close(report)
    wait_for_syscall(victim.pid, victim.worker, _POLL)
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub, hold_timeout_s=20) as remote:
        with pytest.raises(OSError, match="madvise"):  # ENOMEM: nothing is mapped there
            remote.call(NR.MADVISE, page, 4096, 0)
        assert stale_scratch(victim.pid) == []
    victim.require_healthy()
