"""The guardian: a tiny process that outlives the engine by a moment.

While the engine has a VM armed, a gate closed, a VM paused or a thread of QEMU
stopped, it must show that it lives. The guardian watches that heartbeat: an engine
that is silent for longer than the hang limit is killed, which closes its
userfaultfds, and so the kernel releases every guest. When the engine is dead, for
whatever reason, the guardian resumes the VMs that the engine's stop notes name, and
ends.

Promises: it holds no userfaultfd and touches no guest memory; it ends by
itself once the engine has ended and no VM of a dead engine is left to resume; a
VM is resumed only when the very process of the note still runs and QEMU calls
its state `paused`. Sleeps without any wake-up while nothing is armed.

`Guardian` is the engine's side, `main` the process. It imports only what it
needs, since its memory counts against what is saved.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vmdedup.closing import Closing

if TYPE_CHECKING:
    from vmdedup.runtime import StopNote

_ARMED = 0
_LAST_BEAT_NS = 1
_WATCH_INTERVAL_MS = 50
_LATE_LOOK_MS = 2 * _WATCH_INTERVAL_MS
_MONITOR_TIMEOUT_S = 2.0
_LIBVIRT_TIMEOUT_S = 10.0
_RESUME_ATTEMPTS = 10
_ATTEMPT_PAUSE_S = 0.1
_RESUME_PAUSE_S = 1.0
_END_LIMIT_S = 3.0
_IDLE_CALLS = ("202", "230")
"""futex and clock_nanosleep: what QEMU's RCU thread waits in, and no launched call is."""
_BEAT_INTERVAL_S = 0.05
_MOST_STARVED_LIMITS = 10
"""Hang limits after which an engine is killed even if it only waited for a processor."""

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from vmdedup.guardian import main; main()"


class Guardian(Closing):
    """Starts the guardian process and shows it that the engine lives.

    Use as a context manager. The process ends when this one does, or on `close`.
    """

    def __init__(self, runtime_dir: Path, hang_limit_ms: int) -> None:
        self._runtime_dir = runtime_dir
        self._hang_limit_ms = hang_limit_ms
        self._beats_fd = os.memfd_create("vmdedup-heartbeat", os.MFD_CLOEXEC)
        os.ftruncate(self._beats_fd, mmap.PAGESIZE)
        self._page = mmap.mmap(self._beats_fd, mmap.PAGESIZE)
        self._words = memoryview(self._page).cast("Q")
        self._process: subprocess.Popen[bytes] | None = None
        self._wake_fd = -1
        self._watches = 0
        self._counting = threading.Lock()
        self._start()

    @property
    def pid(self) -> int:
        """The guardian's process id."""
        assert self._process is not None
        return self._process.pid

    def _start(self) -> None:
        wake_read, self._wake_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._wake_fd, False)
        engine_pidfd = os.pidfd_open(os.getpid())
        command = [sys.executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).parent.parent)]
        numbers = (engine_pidfd, self._beats_fd, wake_read, self._hang_limit_ms, os.getpid())
        command += [str(number) for number in numbers]

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [*command, str(self._runtime_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(engine_pidfd, self._beats_fd, wake_read),
                start_new_session=True,
            )

        from vmdedup import privileges

        try:
            self._process = privileges.started_with(privileges.GUARDIAN, start)
        finally:
            os.close(wake_read)
            os.close(engine_pidfd)

    def _restart(self) -> None:
        os.close(self._wake_fd)
        self._wake_fd = -1
        self._end()
        self._start()

    def _end(self) -> None:
        """Wait for the process, which has been told to end; one that does not is killed."""
        assert self._process is not None
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the guardian process."""
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1
        if self._process is not None:
            self._end()
            self._process = None
            self._words.release()
            self._page.close()
            os.close(self._beats_fd)

    def beat(self) -> None:
        """Show that the engine lives."""
        self._words[_LAST_BEAT_NS] = time.monotonic_ns()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat while this thread waits for an answer. Only for waits with a bound of their own."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(_BEAT_INTERVAL_S):
                self.beat()

        thread = threading.Thread(target=beat, name="vmdedup-heartbeat", daemon=True)
        self.beat()
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While guests may wait for us: from before the first protection to after the last lift.

        May be nested, on any thread. Starts the guardian anew if it was killed meanwhile,
        or has not listened for so long that the pipe is full.
        """
        self.beat()
        with self._counting:
            self._watches += 1
        try:
            with self._counting:
                if not self._words[_ARMED]:
                    self._arm()
            yield
        finally:
            with self._counting:
                self._watches -= 1
                if not self._watches:
                    self._words[_ARMED] = 0

    def _arm(self) -> None:
        self._words[_ARMED] = 1
        try:
            os.write(self._wake_fd, b"a")
        except (BrokenPipeError, BlockingIOError):
            self._restart()


class _Starvation:
    """How long a silent engine was ready to run and got no processor.

    That is an overloaded host, not a hang: killing the engine would help no guest.
    """

    def __init__(self, engine_pid: int) -> None:
        self._folder = f"/proc/{engine_pid}/task"
        self.forget()

    def forget(self) -> None:
        """The engine was heard of: begin anew."""
        self._cpu_ns: dict[str, int] = {}
        self._at_ns = time.monotonic_ns()
        self.ms = 0.0

    def look(self) -> None:
        """Count the time since the last look if a thread was kept waiting in it.

        A look that comes late says the same of the host: the guardian was kept waiting.
        """
        now_ns = time.monotonic_ns()
        elapsed_ns, self._at_ns = now_ns - self._at_ns, now_ns
        before, self._cpu_ns = self._cpu_ns, {}
        starved = elapsed_ns > _LATE_LOOK_MS * 1e6
        for tid in os.listdir(self._folder):
            with suppress(OSError):
                stat = Path(self._folder, tid, "stat").read_text()
                cpu_ns = int(Path(self._folder, tid, "schedstat").read_text().split()[0])
                self._cpu_ns[tid] = cpu_ns
                is_ready = stat.rpartition(") ")[2].startswith("R")
                ran_ns = cpu_ns - before.get(tid, cpu_ns - elapsed_ns)
                starved = starved or (is_ready and ran_ns < elapsed_ns / 4)
        if starved:
            self.ms += elapsed_ns / 1e6


def main() -> None:
    """The guardian process: watch until the engine is gone, then resume what it paused."""
    engine_pidfd, beats_fd, wake_fd, hang_limit_ms, engine_pid = map(int, sys.argv[2:7])
    runtime_dir = Path(sys.argv[7])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    page = mmap.mmap(beats_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)
    words = memoryview(page).cast("Q")
    poll = select.poll()
    poll.register(engine_pidfd, select.POLLIN)
    poll.register(wake_fd, select.POLLIN)
    closed = False
    starvation = _Starvation(engine_pid)
    while True:
        armed = bool(words[_ARMED])
        ready = {fd for fd, _ in poll.poll(_WATCH_INTERVAL_MS if armed else None)}
        if engine_pidfd in ready:
            break
        if wake_fd in ready and not os.read(wake_fd, 4096):
            closed = True
            break
        silent_ms = (time.monotonic_ns() - words[_LAST_BEAT_NS]) / 1e6
        if not words[_ARMED] or silent_ms < hang_limit_ms / 4:
            starvation.forget()
            continue
        with suppress(OSError):
            starvation.look()
        hangs = silent_ms - starvation.ms > hang_limit_ms
        if hangs or silent_ms > _MOST_STARVED_LIMITS * hang_limit_ms:
            # SAFETY: only the engine holds the userfaultfds; its death releases
            # every guest thread. SIGKILL also ends a stopped (SIGSTOP) engine.
            signal.pidfd_send_signal(engine_pidfd, signal.SIGKILL)
    if closed:
        resume_noted(runtime_dir, closed_engine_pid=engine_pid)
        return
    # A QEMU that does not answer yet (its disk hangs) is resumed as soon as it does.
    while resume_noted(runtime_dir):
        time.sleep(_RESUME_PAUSE_S)


def resume_noted(runtime_dir: Path, *, closed_engine_pid: int | None = None) -> list[str]:
    """Resume every VM that an engine that is no more left paused.

    `closed_engine_pid` runs, but has nothing to do with VMs any more. A note stays
    when its VM could not be reached; the names of those VMs are returned.
    """
    from vmdedup.procfs.process import ProcessId, is_running
    from vmdedup.runtime import read_notes

    unreached = []
    for file, note in read_notes(runtime_dir):
        engine = ProcessId(note.engine_pid, note.engine_start_ticks)
        if engine.pid not in (os.getpid(), closed_engine_pid) and is_running(engine):
            continue
        if not resume(note):
            unreached.append(note.vm)
        else:
            file.unlink(missing_ok=True)
    return unreached


def resume(note: StopNote) -> bool:
    """Send `cont` to a noted VM if it is paused; False when it could not be reached."""
    from vmdedup.procfs.process import ProcessId, is_running

    if not is_running(ProcessId(note.pid, note.start_ticks)):
        return True
    for _ in range(_RESUME_ATTEMPTS):
        try:
            # SAFETY: calls that the dead engine launched may still be running. Only
            # when they have ended may the guest write again.
            if _is_idle(note.pid, note.thread_id):
                if "#" in note.monitor_path:
                    return _resume_by_libvirt(note)
                return _converse(note.monitor_path, note.pid)
        except (OSError, ValueError, subprocess.SubprocessError):
            pass
        time.sleep(_ATTEMPT_PAUSE_S)
    return False


def _is_idle(pid: int, thread_id: int) -> bool:
    try:
        call = Path(f"/proc/{pid}/task/{thread_id}/syscall").read_text()
    except FileNotFoundError:
        return True
    return call.startswith(_IDLE_CALLS)


def _resume_by_libvirt(note: StopNote) -> bool:
    """As `_converse`, for a libvirt domain (URI#UUID), in a process that can load libvirt."""
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        " from vmdedup.attach.libvirt_resume import main; main()"
    )
    words = [sys.executable, "-I", "-c", program, str(Path(__file__).parent.parent)]
    words += [note.monitor_path, str(note.pid)]
    done = subprocess.run(words, check=False, timeout=_LIBVIRT_TIMEOUT_S, capture_output=True)
    return done.returncode == 0


def _converse(monitor_path: str, pid: int) -> bool:
    import json
    import socket
    import struct

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(_MONITOR_TIMEOUT_S)
        peer.connect(monitor_path)
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[0] != pid:
            return True
        stream = peer.makefile("rw")

        def execute(command: str) -> object:
            name = f"vmdedup-guardian-{os.getpid()}-{command}"
            stream.write(json.dumps({"execute": command, "id": name}) + "\n")
            stream.flush()
            while line := stream.readline():
                answer = json.loads(line)
                if answer.get("id") == name:
                    return answer.get("return")
            raise ValueError("the monitor closed")

        stream.readline()
        execute("qmp_capabilities")
        status = execute("query-status")
        if isinstance(status, dict) and status.get("status") == "paused":
            # SAFETY: the note says that the engine paused it; without this it stays paused.
            execute("cont")
    return True
