"""What is refused, with which reason, and that nothing was touched then."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from tests.harness.kernel import mappings
from tests.harness.skips import require
from tests.process.victims import Victim, fork_and, wait_for_syscall
from vmdedup.errors import InjectionError, VmGoneError
from vmdedup.inject.borrow import BorrowedThread
from vmdedup.inject.ptrace import Tracee
from vmdedup.inject.remote import RemoteThread, call_rows, find_idle_thread
from vmdedup.inject.scratch_files import scratch_mappings
from vmdedup.inject.threads import executable_data, refusal
from vmdedup.linux.maps import read_maps
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process

_POLL = 7
_NOBODY = 65534


@contextmanager
def _child(body: Callable[[], object]) -> Iterator[int]:
    """A forked child that runs `body`, says so, and then waits to be killed."""
    hear, tell = os.pipe()

    def run() -> None:
        body()
        os.write(tell, b"1")
        signal.pause()

    child = fork_and(run)
    os.close(tell)
    try:
        assert os.read(hear, 1) == b"1", "the child failed"
        yield child
    finally:
        os.close(hear)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _refused(victim: Victim, match: str, *, hold_timeout_s: float = 2.0) -> None:
    with (
        pytest.raises(InjectionError, match=match) as failure,
        RemoteThread("victim", victim.pid, victim.worker, hold_timeout_s=hold_timeout_s),
    ):
        pass
    assert not failure.value.started
    assert failure.value.pid == victim.pid


def _usable(victim: Victim) -> None:
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        assert remote.call(NR.GETPID) == victim.pid
    victim.require_healthy()
    victim.require_no_scratch()


def test_a_debugger_is_attached(victim: Victim) -> None:
    with _child(lambda: Tracee("victim", victim.pid, victim.worker).seize()) as debugger:
        _refused(victim, f"debugger \\(pid {debugger}\\)")
    _usable(victim)


def test_a_debugger_comes_while_the_session_is_open(victim: Victim) -> None:
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        with (
            _child(lambda: Tracee("victim", victim.pid, victim.worker).seize()) as debugger,
            pytest.raises(InjectionError, match=f"debugger \\(pid {debugger}\\)"),
        ):
            remote.call(NR.GETPID)
        assert remote.call(NR.GETPID) == victim.pid
    _usable(victim)


def test_another_vmdedup_works_on_it(victim: Victim) -> None:
    with _child(RemoteThread("victim", victim.pid, victim.worker).open) as other:
        _refused(victim, f"vmdedup \\(pid {other}\\) works on it already")
    _usable(victim)


def test_two_sessions_of_one_process(victim: Victim) -> None:
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        _refused(victim, "works on it already")
        assert remote.call(NR.GETPID) == victim.pid
    _usable(victim)


def test_no_permission(victim: Victim) -> None:
    if os.geteuid() != 0:
        require("needs root, to become another user")

    def as_nobody() -> None:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _refused(victim, "CAP_SYS_PTRACE")

    child = fork_and(as_nobody)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    _usable(victim)


@pytest.mark.parametrize(("state", "seen"), [("spin", "running"), ("read", NR.READ)])
def test_a_thread_that_is_not_idle(victim: Victim, state: str, seen: int | str) -> None:
    victim.enter(state, 1000)
    wait_for_syscall(victim.pid, victim.worker, seen)
    _refused(victim, "not idle", hold_timeout_s=0.1)
    victim.ask("feed")
    victim.result()
    _usable(victim)


def test_a_process_that_is_stopped(victim: Victim) -> None:
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        _refused(victim, "SIGSTOP", hold_timeout_s=0.5)
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    _usable(victim)


def test_a_32_bit_process(tmp_path: Path, programs: dict[str, Path]) -> None:
    source = tmp_path / "small.c"
    source.write_text("#include <unistd.h>\nint main(void) { for (;;) pause(); }\n")
    command = ["gcc", "-m32", "-static", str(source), "-o", str(tmp_path / "small")]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        require("gcc cannot build 32-bit programs here")
    try:
        process = subprocess.Popen([str(tmp_path / "small")])
    except OSError as error:
        require(f"this kernel runs no 32-bit programs: {error}")
        return
    try:
        with (
            pytest.raises(InjectionError, match="32-bit"),
            RemoteThread("small", process.pid, process.pid),
        ):
            pass
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_shadow_stacks() -> None:
    """No machine here has them: only how the kernel's words are read."""
    assert "shadow stacks" in (refusal({"x86_Thread_features": "shstk wrss"}) or "")
    assert refusal({"x86_Thread_features": ""}) is None
    assert refusal({}) is None


def test_another_python_thread(victim: Victim) -> None:
    caught: list[BaseException] = []

    def use() -> None:
        try:
            remote.release()
        except RuntimeError as error:
            caught.append(error)

    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        remote.hold()
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert "the thread that attached" in str(caught[0])
        remote.release()
        assert remote.call(NR.GETPID) == victim.pid


# --- the process ends ---------------------------------------------------------------


def test_gone_before(victim: Victim) -> None:
    victim.kill()
    with pytest.raises(VmGoneError), RemoteThread("victim", victim.pid, victim.worker):
        pass


@pytest.mark.parametrize("step", ["seized", "stopped", "frames-written", "regs-set", "copied"])
def test_gone_while_opening(victim: Victim, step: str, stub: bool) -> None:
    def fault(reached: str) -> None:
        if reached == step:
            victim.kill_only()

    remote = RemoteThread("victim", victim.pid, victim.worker, stub=stub, fault_point=fault)
    with pytest.raises(VmGoneError):
        remote.open()
    remote.close()


@pytest.mark.parametrize("step", ["seized", "stopped", "table-filled", "regs-set", "detached"])
def test_gone_in_a_call(victim: Victim, step: str, stub: bool) -> None:
    armed = False

    def fault(reached: str) -> None:
        if armed and reached == step:
            victim.kill_only()

    remote = RemoteThread("victim", victim.pid, victim.worker, stub=stub, fault_point=fault)
    remote.open()
    armed = True

    def call_on() -> None:
        for _ in range(1000):  # killed while it runs, a call may still get its result
            remote.call(NR.GETPID)

    with pytest.raises(VmGoneError):
        call_on()
    remote.close()


def test_gone_while_waiting(victim: Victim, stub: bool) -> None:
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
        remote.hold()
        remote.launch(call_rows([(_POLL, 0, 0, 60_000)]))
        wait_for_syscall(victim.pid, victim.worker, _POLL)
        victim.kill_only()
        with pytest.raises(VmGoneError):
            remote.wait(30)


# --- which thread -----------------------------------------------------------------


def test_the_second_thread_is_found(victim: Victim) -> None:
    assert find_idle_thread(victim.pid, lambda: [victim.pid, victim.busy]).tid == victim.worker


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_heap_is_not_the_executables_data(
    kind: str, programs: dict[str, Path], tmp_path: Path
) -> None:
    """Also where addresses are not randomized, and the heap begins in the same mapping."""
    plain = tmp_path / "plain"
    plain.write_text(f"#!/bin/sh\nexec setarch -R {programs[kind]}\n")
    plain.chmod(0o700)
    for program in (programs[kind], plain):
        with Victim(program) as running:
            data = executable_data("victim", running.pid, read_maps("victim", running.pid))
            heap = [m for m in mappings(running.pid) if m.path == "[heap]"]
            assert heap
            assert heap[-1].end - 1 not in data
            assert 0 < len(data) < 32 << 20
            assert find_idle_thread(running.pid, list).tid == running.worker


def test_the_second_thread_is_found_where_thread_ids_began_anew(
    programs: dict[str, Path],
) -> None:
    last, most = (Path("/proc/sys/kernel") / name for name in ("ns_last_pid", "pid_max"))
    require(None if os.access(last, os.W_OK) else "ns_last_pid may not be written here")
    for _ in range(50):  # others take ids meanwhile
        last.write_text(str(int(most.read_text()) - 2))
        with Victim(programs["dynamic"]) as wrapped:
            if wrapped.worker < wrapped.pid:
                assert find_idle_thread(wrapped.pid, lambda: [wrapped.busy]).tid == wrapped.worker
                return
    pytest.fail("no victim's threads got smaller ids than its own")


def test_an_excluded_thread_is_never_taken(victim: Victim) -> None:
    with pytest.raises(InjectionError, match="vCPU or I/O thread"):
        find_idle_thread(victim.pid, lambda: [victim.worker])


def test_a_thread_that_is_known_is_not_asked_about_again(victim: Victim) -> None:
    def nobody() -> list[int]:
        raise AssertionError("asked")

    found = find_idle_thread(victim.pid, list)
    assert find_idle_thread(victim.pid, nobody, known=found) == found
    earlier = found._replace(start_ticks=found.start_ticks - 1)
    with pytest.raises(InjectionError, match="vCPU or I/O thread"):
        find_idle_thread(victim.pid, lambda: [found.tid], known=earlier)


def test_a_busy_second_thread_is_not_taken(victim: Victim) -> None:
    victim.enter("read")
    wait_for_syscall(victim.pid, victim.worker, NR.READ)
    with pytest.raises(InjectionError, match="not idle"):
        find_idle_thread(victim.pid, list)


def test_a_process_with_one_thread() -> None:
    with _child(lambda: None) as child, pytest.raises(InjectionError, match="no second thread"):
        find_idle_thread(child, list)


def test_a_process_that_ended(victim: Victim) -> None:
    victim.kill()
    with pytest.raises(VmGoneError):
        find_idle_thread(victim.pid, list)


def test_the_thread_goes_on_where_its_scratch_memory_can_not_be_removed(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next session removes it."""
    remote = RemoteThread("victim", victim.pid, victim.worker)
    remote.open()
    with monkeypatch.context() as patch:
        patch.setattr(BorrowedThread, "run_on_stack", _no_descriptor_left)
        with pytest.raises(OSError, match="no descriptor left"):
            remote.close()
    status = Path(f"/proc/{victim.pid}/task/{victim.worker}/status").read_text()
    assert "TracerPid:\t0\n" in status
    assert scratch_mappings(victim.pid)
    _usable(victim)


def _no_descriptor_left(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, "no descriptor left")
