"""What a batch holds while it runs, also when who launched it is killed."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.process.guarded import RECVMSG, Setting
from tests.process.victims import fork_and, wait_for_syscall
from vmdedup.inject.remote import RemoteThread, ThreadState, call_rows, stale_scratch
from vmdedup.inject.stub import GUARD_IOCTL
from vmdedup.inject.table import CANCELLED
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process

POLL, GETPPID = 7, 110
RUNS_LONG, RUNS_AFTER = (POLL, 0, 0, 300), (GETPPID,)


@pytest.fixture
def setting(programs: dict[str, Path]) -> Iterator[Setting]:
    setting = Setting(programs["dynamic"])
    try:
        yield setting
    finally:
        setting.close()


def test_a_batch_holds_its_guard_as_long_as_it_runs(setting: Setting) -> None:
    with setting.session() as (remote, guard):
        for _ in range(3):
            remote.hold()
            remote.launch(call_rows([RUNS_LONG, RUNS_AFTER]), guard=guard)
            wait_for_syscall(setting.victim.pid, setting.victim.worker, POLL)
            assert remote.wait(10).tolist() == [0, os.getpid()]
        setting.forget()
        setting.wait_until_let_go()
    setting.victim.require_healthy()


@pytest.mark.parametrize("die_at", ["table-filled", "regs-set", "detached"])
def test_killed_before_the_guard_is_given_no_call_is_begun(setting: Setting, die_at: str) -> None:
    """And nobody in the victim holds what was guarded."""

    def launch() -> None:
        with setting.session(die_at) as (remote, guard):
            remote.hold()
            remote.launch(call_rows([(NR.CLOSE, setting.their_mailbox)]), guard=guard)

    child = fork_and(launch)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    setting.forget()
    setting.wait_until_let_go()
    with RemoteThread("victim", setting.victim.pid, setting.victim.worker) as remote:
        remote.call(NR.CLOSE, setting.their_mailbox)  # EBADF had the batch run
    assert stale_scratch(setting.victim.pid) == []
    setting.victim.require_healthy()


def test_killed_after_the_batch_holds_its_guard_to_its_end(setting: Setting) -> None:
    """The first call of the batch still runs when we die; the second comes after."""

    def launch() -> None:
        with setting.session() as (remote, guard):
            remote.hold()
            calls = [RUNS_LONG, (NR.CLOSE, setting.their_mailbox)]
            remote.launch(call_rows(calls), guard=guard)
            wait_for_syscall(setting.victim.pid, setting.victim.worker, POLL)
            os.kill(os.getpid(), signal.SIGKILL)

    child = fork_and(launch)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    setting.forget()
    assert setting.is_held
    setting.wait_until_let_go()
    with (
        RemoteThread("victim", setting.victim.pid, setting.victim.worker) as remote,
        pytest.raises(OSError, match="close"),  # EBADF: the batch has closed it before
    ):
        remote.call(NR.CLOSE, setting.their_mailbox)
    setting.victim.require_healthy()


def test_a_cancelled_batch_does_not_wait_for_its_guard(setting: Setting) -> None:
    with setting.session() as (remote, guard):
        guard.close()
        remote.hold()
        remote.launch(call_rows([RUNS_AFTER]), guard=guard)
        assert remote.wait(10).tolist() == [CANCELLED]
    setting.victim.require_healthy()


def test_a_child_forked_meanwhile_keeps_no_batch_waiting(setting: Setting) -> None:
    """It must not hold the other end of the stream after we have closed it, or were killed."""
    with setting.session() as (remote, guard):
        child = fork_and(signal.pause)
        try:
            guard.close()
            remote.hold()
            remote.launch(call_rows([RUNS_AFTER]), guard=guard)
            assert remote.wait(10).tolist() == [CANCELLED]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    setting.victim.require_healthy()


def test_a_kept_thread_runs_batch_after_batch_and_then_goes_on(setting: Setting) -> None:
    victim = setting.victim
    with setting.session() as (remote, guard):
        remote.hold()
        for _ in range(50):
            remote.launch(call_rows([(NR.GETPID,), RUNS_AFTER]), guard=guard, keep=True)
            assert remote.wait(10).tolist() == [victim.pid, os.getpid()]
            assert remote.stands_still
            wait_for_syscall(victim.pid, victim.worker, RECVMSG)
        remote.dismiss()
        assert not remote.stands_still
        victim.enter("nanosleep", 1)
        assert victim.result().result == 0
        remote.hold()
        remote.launch(call_rows([RUNS_AFTER]), guard=guard)
        assert remote.wait(10).tolist() == [os.getpid()]
        setting.forget()
        setting.wait_until_let_go()
    victim.require_healthy()


def test_the_state_is_what_the_thread_does_and_decides_what_may_be_done(setting: Setting) -> None:
    batch, ram = call_rows([RUNS_LONG, RUNS_AFTER]), np.array([0])
    states = []
    with setting.session() as (remote, guard):
        for reason, call in (
            ("not held", lambda: remote.launch(batch)),
            ("does not stand still", lambda: remote.require_there(ram)),
            ("no batch was launched", lambda: remote.wait(10)),
            ("open already", remote.open),
            ("not held", lambda: remote._session.thread.registers),
        ):
            with pytest.raises(RuntimeError, match=reason):
                call()
        states.append(remote.state)
        remote.hold()
        with pytest.raises(RuntimeError, match="held already"):
            remote.hold()
        states.append(remote.state)
        remote.release()
        states.append(remote.state)
        remote.hold()
        remote.launch(batch, guard=guard, keep=True)
        states.append(remote.state)
        for _ in range(2):
            assert remote.wait(10).tolist() == [0, os.getpid()]
            states.append(remote.state)
            remote.launch(batch, guard=guard, keep=True)
            states.append(remote.state)
        with pytest.raises(RuntimeError, match="a batch is running"):
            remote.launch(batch, guard=guard, keep=True)
        remote.wait(10)
        remote.dismiss()
        states.append(remote.state)
    states.append(remote.state)
    with pytest.raises(RuntimeError, match="not open"):
        remote.hold()
    idle, kept, again = ThreadState.IDLE, ThreadState.KEPT, ThreadState.KEPT_RUNNING
    assert states == [
        *(idle, ThreadState.HELD, idle, ThreadState.RUNNING),
        *(kept, again, kept, again, idle, ThreadState.CLOSED),
    ]
    setting.victim.require_healthy()


def test_a_kept_thread_is_dismissed_by_a_hold_and_by_the_end(setting: Setting) -> None:
    with setting.session() as (remote, guard):
        remote.hold()
        remote.launch(call_rows([RUNS_AFTER]), guard=guard, keep=True)
        remote.wait(10)
        assert remote.call(NR.GETPID) == setting.victim.pid
        remote.hold()
        remote.launch(call_rows([RUNS_AFTER]), guard=guard, keep=True)
        remote.wait(10)
    assert stale_scratch(setting.victim.pid) == []
    setting.victim.require_healthy()


def test_a_kept_thread_runs_nothing_without_its_guard(setting: Setting) -> None:
    with setting.session() as (remote, guard):
        remote.hold()
        remote.launch(call_rows([RUNS_AFTER]), guard=guard, keep=True)
        remote.wait(10)
        with pytest.raises(ValueError, match="guard"):
            remote.launch(call_rows([RUNS_AFTER]))
        assert not remote.stands_still
        assert remote.call(NR.GETPID) == setting.victim.pid
    setting.victim.require_healthy()


def test_a_kept_thread_whose_batch_is_cancelled_is_kept(setting: Setting) -> None:
    with setting.session() as (remote, guard):
        remote.hold()
        remote.launch(call_rows([RUNS_LONG, RUNS_AFTER]), guard=guard, keep=True)
        wait_for_syscall(setting.victim.pid, setting.victim.worker, POLL)
        remote.cancel()
        assert remote.wait(10).tolist() == [0, CANCELLED]
        remote.launch(call_rows([RUNS_AFTER]), guard=guard, keep=True)
        assert remote.wait(10).tolist() == [os.getpid()]
    setting.victim.require_healthy()


def test_signals_and_stops_do_not_end_the_wait_of_a_kept_thread(setting: Setting) -> None:
    victim = setting.victim
    assert victim.ask("handler 5") == "0"
    with setting.session() as (remote, guard):
        remote.hold()
        for _ in range(3):
            remote.launch(call_rows([RUNS_AFTER]), guard=guard, keep=True)
            assert remote.wait(10).tolist() == [os.getpid()]
            wait_for_syscall(victim.pid, victim.worker, RECVMSG)
            assert victim.ask("poke") == "0"
            os.kill(victim.pid, signal.SIGSTOP)
            os.kill(victim.pid, signal.SIGCONT)
            wait_for_syscall(victim.pid, victim.worker, RECVMSG)
            assert remote.stands_still
    victim.require_healthy()


@pytest.mark.parametrize("die_at", ["completed", "table-filled", "guarded"])
def test_killed_while_it_keeps_a_thread_that_goes_on(setting: Setting, die_at: str) -> None:
    """The second batch: a kill before its guard was given has none of its calls begun."""
    close = (NR.CLOSE, setting.their_mailbox)
    batches: list[list[tuple[int, ...]]] = [[RUNS_AFTER], [RUNS_LONG, close]]

    def launch() -> None:
        steps = {"completed": 1, "table-filled": 2, "guarded": 2}
        with setting.session(die_at, times=steps[die_at]) as (remote, guard):
            remote.hold()
            for calls in batches:
                remote.launch(call_rows(calls), guard=guard, keep=True)
                remote.wait(10)

    child = fork_and(launch)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    setting.forget()
    assert setting.is_held == (die_at == "guarded")
    setting.wait_until_let_go()
    victim = setting.victim
    victim.enter("nanosleep", 1)
    assert victim.result().result == 0
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        if die_at == "guarded":
            with pytest.raises(OSError, match="close"):
                remote.call(*close)
        else:
            remote.call(*close)
    assert stale_scratch(victim.pid) == []
    victim.require_healthy()


def test_a_thread_that_gets_no_descriptor_runs_nothing_and_is_not_kept(setting: Setting) -> None:
    """QEMU may have reached its limit of descriptors."""
    victim = setting.victim
    with setting.session() as (remote, guard):
        remote.hold()
        remote.launch(call_rows([RUNS_AFTER]), guard=guard, keep=True)
        remote.wait(10)
        before = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (0, before[1]))
        remote.launch(call_rows([RUNS_AFTER]), guard=guard, keep=True)
        assert remote.wait(10).tolist() == [CANCELLED]
        assert not remote.stands_still
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, before)
        remote.hold()
        remote.launch(call_rows([RUNS_AFTER]), guard=guard, keep=True)
        assert remote.wait(10).tolist() == [os.getpid()]
    victim.require_healthy()


def test_a_row_may_use_what_its_batch_holds(setting: Setting) -> None:
    """An ioctl on it, under a number that nobody knew before; none where it was not given."""
    in_use, not_for_pipes = 0x5451, 0x5401  # FIOCLEX, TCGETS
    with setting.session() as (remote, guard):
        assert remote.call_guarded(guard, GUARD_IOCTL, 0, in_use) == 0
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            remote.call_guarded(guard, GUARD_IOCTL, 0, not_for_pipes)
        with pytest.raises(OSError, match="Bad file descriptor"):
            remote.call(GUARD_IOCTL, 0, in_use)
        setting.forget()
        setting.wait_until_let_go()
    setting.victim.require_healthy()
