"""`kill -9` of the injecting process at every step, and at random moments."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.process.victims import Victim, fork_and, wait_for_syscall
from vmdedup.inject.leftovers import may_run_leftover_batch
from vmdedup.inject.remote import RemoteThread, call_rows, stale_scratch
from vmdedup.linux.syscalls import NR

pytestmark = [pytest.mark.process, pytest.mark.chaos]

_POLL = 7
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
