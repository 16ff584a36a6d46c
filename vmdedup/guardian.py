"""The guardian: a tiny process that outlives the engine by a moment.

While the engine has a VM armed, a gate closed, a VM paused or a thread of QEMU
stopped, it must show that it lives. The guardian watches that heartbeat: an engine
that is silent for longer than the hang limit is killed, which closes its
userfaultfds, and so the kernel releases every guest. When the engine is dead, for
whatever reason, the guardian resumes the VMs that the engine's stop notes name, and
ends.

Promises: the process holds no userfaultfd and touches no guest memory; it ends by
itself once the engine has ended and no VM of a dead engine is left to resume; a
VM is resumed only when the very process of the note still runs and QEMU calls
its state `paused`. Sleeps without any wake-up while nothing is armed.

`Guardian` is the engine's side; the process is `guardian_process`.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmdedup import privileges
from vmdedup.closing import Closing
from vmdedup.guardian_process import ARMED, LAST_BEAT_NS

_END_LIMIT_S = 3.0
_BEAT_INTERVAL_S = 0.05

_BOOT = """
import sys
sys.path.insert(0, sys.argv[1])
from vmdedup.guardian_process import main
main()
"""


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
        self._words[LAST_BEAT_NS] = time.monotonic_ns()

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
                if not self._words[ARMED]:
                    self._arm()
            yield
        finally:
            with self._counting:
                self._watches -= 1
                if not self._watches:
                    self._words[ARMED] = 0

    def _arm(self) -> None:
        self._words[ARMED] = 1
        try:
            os.write(self._wake_fd, b"a")
        except (BrokenPipeError, BlockingIOError):
            self._restart()
