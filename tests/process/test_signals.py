"""Signals that arrive after the registers were set and before the first injected call.

The handler then runs on top of calls that have not begun, and the thread may
look idle: the victim's handler waits in futex itself.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.process.victims import Victim, fork_and
from vmdedup.inject.remote import RemoteThread, call_rows, stale_scratch
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process

_HANDLER_MS = 300


class _Poke:
    """At a step, while the thread is stopped, sends it the signal; once."""

    def __init__(self, victim: Victim, step: str) -> None:
        self._victim = victim
        self._step = step
        self.armed = True

    def __call__(self, step: str) -> None:
        if self.armed and step == self._step:
            self.armed = False
            assert self._victim.ask("poke") == "0"


@pytest.fixture
def patient(victim: Victim) -> Victim:
    assert victim.ask(f"handler {_HANDLER_MS}") == "0"
    return victim


@pytest.mark.parametrize("step", ["frames-written", "copied"])
def test_a_chain_below_a_handler_is_waited_for(patient: Victim, step: str, stub: bool) -> None:
    poke = _Poke(patient, step)
    remote = RemoteThread(
        "victim", patient.pid, patient.worker, stub=stub, fault_point=poke, hold_timeout_s=20
    )
    started = time.monotonic()
    with remote:
        assert not poke.armed
        assert time.monotonic() - started >= _HANDLER_MS / 1000
        assert remote.call(NR.GETPID) == patient.pid
    patient.require_healthy()
    patient.require_no_scratch()


def test_a_batch_below_a_handler_is_waited_for(patient: Victim, stub: bool) -> None:
    poke = _Poke(patient, "table-filled")
    with RemoteThread(
        "victim", patient.pid, patient.worker, stub=stub, fault_point=poke, hold_timeout_s=20
    ) as remote:
        started = time.monotonic()
        remote.hold()
        remote.launch(call_rows([(NR.GETPID,)]))
        assert not poke.armed
        remote.hold()  # the handler sits in futex, but the batch is not over
        assert time.monotonic() - started >= _HANDLER_MS / 1000
        remote.release()
        assert remote.wait(10).tolist() == [patient.pid]
        assert remote.call(NR.GETPID) == patient.pid
    patient.require_healthy()
    patient.require_no_scratch()


def test_a_predecessors_batch_below_a_handler_keeps_its_scratch(
    patient: Victim, stub: bool
) -> None:
    """Unmapping it would crash the victim when the handler returns."""

    def poke_and_die(step: str) -> None:
        poke(step)
        if step == "detached" and not poke.armed:
            os.kill(os.getpid(), signal.SIGKILL)

    def die_launching() -> None:
        with RemoteThread(
            "victim", patient.pid, patient.worker, stub=stub, fault_point=poke_and_die
        ) as remote:
            remote.call(NR.GETPID)

    poke = _Poke(patient, "table-filled")
    child = fork_and(die_launching)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = stale_scratch(patient.pid)
    with RemoteThread("victim", patient.pid, patient.worker, stub=stub) as remote:
        assert stale_scratch(patient.pid) == left
        assert remote.call(NR.GETPID) == patient.pid
    time.sleep(2 * _HANDLER_MS / 1000)
    patient.require_healthy()
    with RemoteThread("victim", patient.pid, patient.worker, stub=stub) as remote:
        assert remote.call(NR.GETPID) == patient.pid
    patient.require_no_scratch()
