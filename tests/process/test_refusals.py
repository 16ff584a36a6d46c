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

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true, mappings
from tests.harness.skips import require
from tests.process.victims import Victim, as_nobody, fork_and, wait_for_syscall
from vmdedup.errors import InjectionError, VmGoneError
from vmdedup.inject.borrow import BorrowedThread, Unwatched
from vmdedup.inject.ptrace import Tracee
from vmdedup.inject.remote import Landmarks, RemoteThread, call_rows, find_idle_thread
from vmdedup.inject.scratch_files import scratch_fds, scratch_mappings
from vmdedup.inject.threads import executable_data, refusal, stack_pointer, thread_status
from vmdedup.linux.maps import read_maps
from vmdedup.linux.process import Process
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process

_POLL, _PAUSE, _VFORK = 7, 34, 58


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


def _borrowed(process: Process, tid: int, landmarks: Landmarks) -> BorrowedThread:
    return BorrowedThread(
        process,
        tid,
        require_futex=True,
        hold_timeout_s=2.0,
        fault=lambda _step: None,
        watch=Unwatched(),
        landmarks=landmarks,
    )


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
    require(root_missing())
    known = Landmarks()
    with RemoteThread("victim", victim.pid, victim.worker, landmarks=known):
        pass
    known.gap = 0
    with Process("victim", victim.pid) as process:
        thread = _borrowed(process, victim.worker, known)
        with as_nobody():
            _refused(victim, "CAP_SYS_PTRACE")
            for attempt in (thread.survey, Tracee("victim", victim.pid, victim.worker).seize):
                with pytest.raises(InjectionError, match="CAP_SYS_PTRACE"):
                    attempt()
            with pytest.raises(InjectionError, match="may not be read: run as root"):
                find_idle_thread(victim.pid, list)
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
        tracee = Tracee("small", process.pid, process.pid)
        tracee.seize()
        tracee.interrupt(10)
        with pytest.raises(InjectionError, match="32-bit"):
            tracee.registers()
        tracee.detach()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@contextmanager
def _bare(program: Path) -> Iterator[int]:
    """A program without libc, which idles in futex to the end."""
    process = subprocess.Popen([str(program)])
    try:
        wait_for_syscall(process.pid, process.pid, NR.FUTEX)
        yield process.pid
        wait_for_syscall(process.pid, process.pid, NR.FUTEX)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_a_program_without_what_every_libc_has(programs: dict[str, Path]) -> None:
    """It is used by what it has; a chain also needs a store, to deliver results."""
    with (
        _bare(programs["bare-no-restorer"]) as pid,
        pytest.raises(InjectionError, match="no signal restorer"),
        RemoteThread("bare", pid, pid),
    ):
        pass
    with _bare(programs["bare"]) as pid:
        assert not executable_data("bare", pid, read_maps("bare", pid))
        with RemoteThread("bare", pid, pid) as remote:
            assert [remote.call(NR.GETPID) for _ in range(3)] == [pid] * 3
        with (
            pytest.raises(InjectionError, match="neither stub nor chain"),
            RemoteThread("bare", pid, pid, stub=False),
        ):
            pass
        assert scratch_mappings(pid) == []
        assert scratch_fds(pid) == []


def _enter_own_stack(victim: Victim, kib: int) -> None:
    """The worker idles in futex, half a page below the end of a stack of its own."""
    victim.enter("stack", kib)
    assert becomes_true(lambda: (stack_pointer(victim.pid, victim.worker) or 0) % 4096 == 2048)


def test_nothing_is_written_below_a_stack_that_is_too_small(victim: Victim) -> None:
    _enter_own_stack(victim, 8)
    _refused(victim, "too little stack left")
    assert victim.ask("protect") == "0"
    _refused(victim, "no usable stack")
    assert victim.ask("unstack") == "0"
    assert victim.result().result == 0, "its stack was written to"
    _usable(victim)


def test_a_stack_that_became_read_only_is_not_written_to(victim: Victim) -> None:
    known = Landmarks()
    _enter_own_stack(victim, 256)
    remote = RemoteThread("victim", victim.pid, victim.worker, landmarks=known)
    remote.survey()
    assert known.stack is not None
    assert victim.ask("protect") == "0"
    with pytest.raises(InjectionError, match="could not be written"):
        remote.open()
    assert victim.ask("unstack") == "0"
    assert victim.result().result == 0, "its stack was written to"
    _usable(victim)


def test_a_thread_that_can_not_be_stopped_now_is_let_go_when_it_can(victim: Victim) -> None:
    victim.enter("vfork", 500)
    wait_for_syscall(victim.pid, victim.worker, _VFORK)
    tracee = Tracee("victim", victim.pid, victim.worker)
    tracee.seize()
    with pytest.raises(InjectionError, match=r"did not stop within 0\.05 s"):
        tracee.interrupt(0.05)
    tracee.detach()
    assert victim.result().result == 0
    _usable(victim)


def test_an_end_that_fails_is_told(victim: Victim) -> None:
    """But not in place of the error that ended the session."""
    status = Path(f"/proc/{victim.pid}/task/{victim.worker}/status")

    def stop_inside(error: Exception | None) -> None:
        with RemoteThread("victim", victim.pid, victim.worker, hold_timeout_s=0.2):
            os.kill(victim.pid, signal.SIGSTOP)
            assert becomes_true(lambda: "State:\tT" in status.read_text())
            if error:
                raise error

    for error, match in ((None, "SIGSTOP"), (InjectionError("victim", "first"), "first")):
        with pytest.raises(InjectionError, match=match):
            stop_inside(error)
        os.kill(victim.pid, signal.SIGCONT)
        _usable(victim)


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


def test_gone_between_two_looks(victim: Victim) -> None:
    """Not reaped yet at first: /proc shows some of it, and ptrace permits nothing."""
    known, leader = Landmarks(), Tracee("victim", victim.pid, victim.pid)
    with Process("victim", victim.pid) as process:
        thread = _borrowed(process, victim.worker, known)
        maps = read_maps("victim", victim.pid)
        victim.kill_only()
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        for look in (
            lambda: _borrowed(process, victim.pid, known),
            thread._find_gadgets,
            leader.seize,
        ):
            with pytest.raises(VmGoneError):
                look()
        victim.kill()
        for later_look in (
            leader.seize,
            lambda: executable_data("victim", victim.pid, maps),
            lambda: thread_status("victim", victim.pid, victim.pid),
            lambda: scratch_fds(victim.pid),
        ):
            with pytest.raises(VmGoneError):
                later_look()


def test_a_number_that_another_process_has_now_is_left_alone(victim: Victim) -> None:
    """Its thread is traced for a moment, and let go; else it could not even end."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    require(None if os.access(last, os.W_OK) else "ns_last_pid may not be written here")
    ended, victim_tid = f"thread {victim.worker} ended", victim.worker
    remote = RemoteThread("victim", victim.pid, victim_tid, require_futex=False)
    remote.open()
    victim.enter("end")
    assert becomes_true(lambda: not Path(f"/proc/{victim.pid}/task/{victim_tid}").exists())
    with pytest.raises(InjectionError, match=ended):
        remote.hold()
    with _process_numbered(last, victim_tid) as other:
        with pytest.raises(InjectionError, match=ended):
            remote.hold()
        assert "TracerPid:\t0\n" in Path(f"/proc/{other.pid}/status").read_text()
        other.terminate()
        assert other.wait(60) == -signal.SIGTERM
    for attempt in (remote.close, remote.open):
        with pytest.raises(InjectionError, match=ended):
            attempt()
    with RemoteThread("victim", victim.pid, victim.busy, require_futex=False) as remote:
        assert remote.call(NR.GETPID) == victim.pid
    victim.require_healthy()
    victim.require_no_scratch()


@contextmanager
def _process_numbered(last: Path, pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process with this number, which is free now."""
    for _ in range(50):  # others take ids meanwhile
        last.write_text(str(pid - 1))
        with subprocess.Popen(["sleep", "600"]) as process:
            try:
                if process.pid == pid:
                    yield process
                    return
            finally:
                process.kill()
    pytest.fail(f"the number {pid} was not to be had")


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
            whole = read_maps("victim", running.pid)
            assert executable_data("victim", running.pid, whole.within(0, data.stop)) == data


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


def test_a_thread_that_is_known_but_busy_is_not_taken(victim: Victim) -> None:
    found = find_idle_thread(victim.pid, list)
    victim.enter("read")
    wait_for_syscall(victim.pid, victim.worker, NR.READ)
    with pytest.raises(InjectionError, match="not idle"):
        find_idle_thread(victim.pid, list, known=found)


def test_no_thread_is_left_where_all_are_excluded(victim: Victim) -> None:
    with pytest.raises(InjectionError, match="each other thread of it is a vCPU or I/O thread"):
        find_idle_thread(victim.pid, lambda: [victim.worker, victim.busy])


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("eh", 1),
        ("pe", 2),
        ("hle", 3),
        ("hee", "threads [0-9]+, [0-9]+ all wait for events of QEMU's"),
        ("hl", "no thread of it waits as QEMU's RCU thread does"),
        ("pl", "is not idle"),
    ],
)
def test_the_rcu_thread_is_told_by_what_it_waits_for(
    programs: dict[str, Path], kinds: str, found: int | str
) -> None:
    """Events in the program's own data: where several wait for such, none is taken."""
    with subprocess.Popen([programs["idlers"], kinds], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            tids = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
            for tid, kind in zip(tids[1:], kinds, strict=True):
                wait_for_syscall(process.pid, tid, _PAUSE if kind == "p" else NR.FUTEX)
            if isinstance(found, int):
                assert find_idle_thread(process.pid, list).tid == tids[found]
            else:
                with pytest.raises(InjectionError, match=found):
                    find_idle_thread(process.pid, list)
        finally:
            process.kill()


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
