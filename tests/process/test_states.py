"""A thread in any state goes on as if nothing had happened."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from tests.process.victims import Victim, parse_result, wait_for_syscall
from vmdedup.errors import InjectionError
from vmdedup.inject.ptrace import Tracee
from vmdedup.inject.remote import RemoteThread, call_rows
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process

PTRACE_GETREGSET, NT_X86_XSTATE = 0x4204, 0x202
_ETIMEDOUT = 110
_RESULTS = {
    "nanosleep": (0, 0),
    "poll": (0, 0),
    "ppoll": (0, 0),
    "select": (0, 0),
    "futex-relative": (-1, _ETIMEDOUT),
    "futex-absolute": (-1, _ETIMEDOUT),
    "spin": (0, 0),
}
_LOST_BY_SIGRETURN = ("nanosleep", "poll", "futex-relative")
_STATE_MS = 400
_PERIOD_S = 0.01
_FEWEST_INJECTIONS = 4


def _remote(victim: Victim, stub: bool, *, hold_timeout_s: float = 2.0) -> RemoteThread:
    return RemoteThread(
        "victim",
        victim.pid,
        victim.worker,
        stub=stub,
        require_futex=False,
        hold_timeout_s=hold_timeout_s,
    )


@pytest.mark.parametrize(
    ("state", "stub"),
    [(state, True) for state in _RESULTS]
    + [(state, False) for state in _RESULTS if state not in _LOST_BY_SIGRETURN],
    ids=lambda value: {True: "stub", False: "chain"}.get(value, value),
)
def test_an_interrupted_call_goes_on_where_it_was(victim: Victim, state: str, stub: bool) -> None:
    """Injects again and again: a timeout that began anew each time would never be reached."""
    with _remote(victim, stub) as remote:
        for state_ms in (_STATE_MS, 4 * _STATE_MS, 16 * _STATE_MS):
            if _injected_until_it_returned(victim, remote, state, state_ms) >= _FEWEST_INJECTIONS:
                break
        else:
            pytest.fail("this machine left us no time to inject")
    victim.require_healthy()


def _injected_until_it_returned(
    victim: Victim, remote: RemoteThread, state: str, state_ms: int
) -> int:
    """How many calls were injected while the victim was in the state for so long."""
    victim.enter(state, state_ms)
    victim.tell("result")
    injected = 0
    deadline = time.monotonic() + 100 * state_ms / 1000
    while not victim.has_answer(_PERIOD_S):
        assert remote.call(NR.GETPID) == victim.pid
        injected += 1
        assert time.monotonic() < deadline, "its timeout began anew with each injection"
    found = parse_result(victim.hear())
    assert (found.result, found.errno) == _RESULTS[state]
    assert found.took_ms >= state_ms
    assert found.errors == 0
    return injected


@pytest.mark.parametrize("state", _LOST_BY_SIGRETURN)
def test_a_chain_never_cuts_a_timed_wait_short(victim: Victim, state: str) -> None:
    with _remote(victim, False, hold_timeout_s=0.1) as remote:
        victim.enter(state, _STATE_MS)

        def call_until_it_waits() -> None:
            for _ in range(100_000):  # on a busy host it takes a while to get there
                remote.call(NR.GETPID)

        with pytest.raises(InjectionError, match="timed wait") as failure:
            call_until_it_waits()
        assert not failure.value.started
        found = victim.result()
        assert (found.result, found.errno) == _RESULTS[state]
        assert found.took_ms >= _STATE_MS
        assert remote.call(NR.GETPID) == victim.pid


def test_a_blocked_read_still_gets_its_data(victim: Victim, stub: bool) -> None:
    with _remote(victim, stub) as remote:
        victim.enter("read")
        wait_for_syscall(victim.pid, victim.worker, NR.READ)
        for _ in range(20):
            assert remote.call(NR.GETPID) == victim.pid
        victim.ask("feed")
        found = victim.result()
        assert (found.result, found.errno, found.errors) == (ord("F"), 0, 0)


def test_every_register_of_a_running_thread_is_kept(victim: Victim, stub: bool) -> None:
    """The busy thread checks all general, vector and mask registers, flags, MXCSR, red zone."""
    calls = call_rows([(NR.GETPID,)] * 10)
    with RemoteThread("victim", victim.pid, victim.busy, stub=stub, require_futex=False) as remote:
        for _ in range(300):
            remote.hold()
            remote.launch(calls)
            assert (remote.wait(10) == victim.pid).all()
    victim.require_healthy()


def test_without_xsave_x87_and_sse_are_kept(
    programs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, stub: bool
) -> None:
    """As where the processor has none: the kernel has no such register set to give.

    With this one's kernel the rest is initialised then: the victim must not use it.
    """
    asked: list[int] = []
    ptrace = Tracee._ptrace

    def without_xsave(tracee: Tracee, request: int, address: int = 0, data: int = 0) -> int:
        if request == PTRACE_GETREGSET:
            asked.append(address)
            if address == NT_X86_XSTATE:
                raise OSError(errno.ENODEV, "ptrace: No such device")
        return ptrace(tracee, request, address, data)

    monkeypatch.setattr(Tracee, "_ptrace", without_xsave)
    monkeypatch.setenv("VICTIM_SSE_ONLY", "1")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW")
    with Victim(programs["dynamic"]) as victim:
        test_every_register_of_a_running_thread_is_kept(victim, stub)
    assert NT_X86_XSTATE in asked


def test_signals_in_the_middle_of_a_batch(victim: Victim, stub: bool) -> None:
    """A handler with a deep stack runs on the borrowed thread all the time."""
    assert victim.ask("alarms 150") == "0"
    calls = call_rows([(NR.GETPID,)] * 500)
    with RemoteThread(
        "victim", victim.pid, victim.busy, stub=stub, require_futex=False, hold_timeout_s=20
    ) as remote:
        for _ in range(200):
            remote.hold()
            remote.launch(calls)
            assert (remote.wait(10) == victim.pid).all()
    assert int(victim.ask("alarmed")) > 10
    victim.require_healthy()
