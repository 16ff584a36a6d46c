"""The guardian process: it watches the engine, and resumes VMs that a dead engine had paused.

Owns the process that `guardian.Guardian` starts, and the words of the page in which the
engine shows that it lives. Promises what that module says. It holds no userfaultfd and
touches no guest memory. While it watches it imports next to nothing, since its memory
counts against the savings: the code that resumes VMs is loaded only if one needs it.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

LANES = 64
"""Number of lanes; in each, one thread of the engine shows that it lives."""
ARMED = 0
"""Index of a lane's word that says whether guests may wait for its thread."""
GIVEN_UP = b"g"
"""Word that the engine writes to the pipe when it has given up resuming a VM itself."""
LAST_BEAT_NS = 1
"""Index of a lane's word with the last sign of life, nanoseconds of CLOCK_MONOTONIC."""
PATIENCE_MS = 2
"""Index of a lane's word with the milliseconds that its thread may be silent above the limit."""
LANE_WORDS = 3

_WATCH_INTERVAL_MS = 50
_LATE_LOOK_MS = 2 * _WATCH_INTERVAL_MS
_MOST_STARVED_LIMITS = 10
"""Hang limits after which an engine is killed even if it only waited for a processor."""
_RESUME_PAUSE_S = 1.0
_STDERR_FD = 2


class _Starvation:
    """How long a silent engine was ready to run but got no processor.

    Then the host is overloaded and nothing hangs: killing the engine would help no guest.
    """

    def __init__(self, engine_pid: int) -> None:
        self._folder = f"/proc/{engine_pid}/task"
        self.forget()

    def forget(self) -> None:
        """Start again from zero, as the engine has shown that it lives."""
        self._cpu_ns: dict[str, int] = {}
        self._at_ns = time.monotonic_ns()
        self.ms = 0.0

    def look(self) -> None:
        """Count the time since the last look if a thread of the engine got no processor in it.

        A late look shows the same overload: the guardian itself got no processor.
        """
        now_ns = time.monotonic_ns()
        elapsed_ns, self._at_ns = now_ns - self._at_ns, now_ns
        before, self._cpu_ns = self._cpu_ns, {}
        starved = elapsed_ns > _LATE_LOOK_MS * 1e6
        for tid in os.listdir(self._folder):
            with suppress(OSError):
                stat = _text(f"{self._folder}/{tid}/stat")
                cpu_ns = int(_text(f"{self._folder}/{tid}/schedstat").split()[0])
                self._cpu_ns[tid] = cpu_ns
                is_ready = stat.rpartition(") ")[2].startswith("R")
                ran_ns = cpu_ns - before.get(tid, cpu_ns - elapsed_ns)
                starved = starved or (is_ready and ran_ns < elapsed_ns / 4)
        if starved:
            self.ms += elapsed_ns / 1e6


def _silent_ms(words: memoryview) -> float | None:
    """Longest silence of all armed threads beyond their patience, in milliseconds.

    `None` if no thread is armed.
    """
    now_ns = time.monotonic_ns()
    lanes = range(0, LANES * LANE_WORDS, LANE_WORDS)
    return max(
        (
            (now_ns - words[lane + LAST_BEAT_NS]) / 1e6 - words[lane + PATIENCE_MS]
            for lane in lanes
            if words[lane + ARMED]
        ),
        default=None,
    )


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def main() -> None:
    """The guardian process: watch until the engine is gone, then resume what it paused."""
    engine_pidfd, beats_fd, wake_fd, hang_limit_ms, engine_pid = map(int, sys.argv[2:7])
    runtime_dir = sys.argv[7]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    page = mmap.mmap(beats_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)
    words = memoryview(page).cast("Q")
    poll = select.poll()
    poll.register(engine_pidfd, select.POLLIN)
    poll.register(wake_fd, select.POLLIN)
    closed = killed = False
    resumer = 0
    starvation = _Starvation(engine_pid)
    while True:
        is_armed = any(words[ARMED::LANE_WORDS])
        ready = {fd for fd, _ in poll.poll(_WATCH_INTERVAL_MS if is_armed else None)}
        if engine_pidfd in ready:
            break
        if wake_fd in ready:
            told = os.read(wake_fd, 4096)
            if not told:
                closed = True
                break
            if GIVEN_UP in told:
                resumer = _resume_beside(resumer, runtime_dir, (engine_pidfd, wake_fd))
        silent_ms = _silent_ms(words)
        if silent_ms is None or silent_ms < hang_limit_ms / 4:
            starvation.forget()
            continue
        with suppress(OSError):
            starvation.look()
        hangs = silent_ms - starvation.ms > hang_limit_ms
        if not killed and (hangs or silent_ms > _MOST_STARVED_LIMITS * hang_limit_ms):
            # SAFETY: only the engine holds the userfaultfds; its death releases every
            # guest thread. SIGKILL also ends a stopped (SIGSTOP) engine.
            signal.pidfd_send_signal(engine_pidfd, signal.SIGKILL)
            killed = True
            _tell_killed(engine_pid, silent_ms, hang_limit_ms)
    _resume_all(runtime_dir, engine_pid if closed else None)


def _tell_killed(engine_pid: int, silent_ms: float, hang_limit_ms: int) -> None:
    """Say so on the engine's stderr, in a process of its own: nobody may read it, nor end it."""
    line = (
        f"vmdedup: the guardian killed vmdedup (pid {engine_pid}): one of its threads gave no sign"
        f" of life for {silent_ms:.0f} ms (hang_limit_ms = {hang_limit_ms}) while guests might"
        " wait for it; they run on and stay merged, and the next vmdedup goes on\n"
    )
    _forked(lambda: os.write(_STDERR_FD, line.encode()))


def _forked(work: Callable[[], object]) -> int:
    """The pid of a child that does the work, and then ends whatever came of it."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            work()
        os._exit(0)
    return child


def _resume_all(runtime_dir: str, closed_engine_pid: int | None = None) -> None:
    """Resume until no VM is left; one whose disk hangs is resumed as soon as it answers."""
    from vmdedup.guardian.resume import resume_noted

    # Who reads the engine's messages must see their end, however long a VM takes to answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR_FD)
    while True:
        done = resume_noted(runtime_dir, closed_engine_pid=closed_engine_pid)
        if not (done.unreached or done.elsewhere):
            return
        time.sleep(_RESUME_PAUSE_S)


def _resume_beside(resumer: int, runtime_dir: str, watched: tuple[int, int]) -> int:
    """Fork a process that resumes given-up VMs of a living engine; this one keeps watching.

    `resumer`: the last such process, `0` if none; while it runs it also takes new notes.
    `watched`: descriptors by which the engine notices that this process has ended. Returns
    the process id.
    """
    if resumer:
        with suppress(ChildProcessError):
            if os.waitpid(resumer, os.WNOHANG) == (0, 0):
                return resumer

    def resume() -> None:
        for fd in watched:
            os.close(fd)
        _resume_all(runtime_dir)

    return _forked(resume)
