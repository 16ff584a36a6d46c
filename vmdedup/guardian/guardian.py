"""The guardian: a tiny process that outlives the engine by a moment.

A thread of the engine that has a VM armed, a gate closed, a VM paused or a thread of
QEMU stopped must show that it lives. Each thread beats in a lane of its own, so that no
other thread can hide that it hangs. The guardian watches these lanes. If one is silent for
longer than the hang limit, it kills the engine, which closes the userfaultfds, and so the
kernel releases every guest. When the engine is dead, for whatever reason, the guardian resumes
the VMs that the engine's stop notes name, and ends. It also resumes VMs that a living engine
has given up because they do not answer. Under systemd it leaves the cgroup of the
engine's unit, so that a kill or a freeze of the unit does not affect it.

Promises: the process holds no userfaultfd and touches no guest memory. It ends by
itself once the engine has ended and no VM of a dead engine is left to resume. A
VM is resumed only if the very process of the note still runs and QEMU calls
its state `paused`. Sleeps without any wake-up while nothing is armed.

`Guardian` is the engine's side; the process is `guardian.process`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmdedup.closing import Closing
from vmdedup.guardian import scope
from vmdedup.guardian.process import ARMED, GIVEN_UP, LANE_WORDS, LANES, LAST_BEAT_NS, PATIENCE_MS
from vmdedup.guardian.resume import left_paused
from vmdedup.linux import bounded, capabilities

_END_LIMIT_S = 3.0
_BEAT_INTERVAL_S = 0.05

_BOOT = """
import sys
sys.path.insert(0, sys.argv[1])
from vmdedup.guardian.process import main
main()
"""


class Lane:
    """Shared words in which a thread shows that it lives while guests may wait for it."""

    def __init__(self, words: memoryview, number: int) -> None:
        self.number = number
        self.watches = 0
        """How many `watching` blocks use the lane; at `0` it belongs to no thread."""
        self._words = words
        self._first = number * LANE_WORDS

    @property
    def is_armed(self) -> bool:
        """Whether the guardian watches the lane."""
        return bool(self._words[self._first + ARMED])

    def arm(self, armed: bool = True, patience_ms: int = 0) -> None:
        """Tell the guardian to watch the lane, or no longer to watch it."""
        self._words[self._first + PATIENCE_MS] = patience_ms
        self._words[self._first + ARMED] = armed

    def beat(self) -> None:
        """Show that the thread lives."""
        self._words[self._first + LAST_BEAT_NS] = time.monotonic_ns()

    @property
    def beat_address(self) -> int:
        """Address to which `beat` writes time.monotonic_ns()."""
        words = ctypes.c_uint64 * len(self._words)
        return ctypes.addressof(words.from_buffer(self._words)) + 8 * (self._first + LAST_BEAT_NS)


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
        self._counting = threading.Lock()
        self._free = list(range(LANES))
        self._mine = threading.local()
        bounded.tell_while_waiting(self)
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
        command = [sys.executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).parents[2])]
        numbers = (engine_pidfd, self._beats_fd, wake_read, self._hang_limit_ms, os.getpid())
        command += [str(number) for number in numbers]

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [*command, str(self._runtime_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # If this process began without one, descriptor 2 may be anything.
                stderr=subprocess.DEVNULL if sys.__stderr__ is None else None,
                pass_fds=(engine_pidfd, self._beats_fd, wake_read),
                start_new_session=True,
            )

        try:
            self._process = capabilities.started_with(capabilities.GUARDIAN, start)
        finally:
            os.close(wake_read)
            os.close(engine_pidfd)
        # Do not wait: systemd may take a while, and a guest may be held now.
        where = (self._process.pid, f"vmdedup-guardian-{self._process.pid}")
        threading.Thread(target=scope.move_to_own, args=where, daemon=True).start()

    def _restart(self) -> None:
        os.close(self._wake_fd)
        self._wake_fd = -1
        self._end()
        self._start()

    def _end(self) -> None:
        """Wait for the process, which has been told to end; kill it if it does not.

        A process that still has a VM to resume is not killed: it continues without us.
        """
        assert self._process is not None
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            if left_paused(self._runtime_dir, closed_engine_pid=os.getpid()):
                self._process.returncode = 0  # nobody needs to wait for it any more
                return
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

    def keep(self) -> None:
        """Start the process again if it was killed, also in the middle of a long pause.

        Raises OSError if that fails; the next call tries again.
        """
        with self._counting:
            if self._process is not None and self._process.poll() is not None:
                self._restart()

    def beat(self) -> None:
        """Show that this thread lives, if guests may wait for it."""
        for lane in self._lanes():
            lane.beat()

    def _lanes(self) -> list[Lane]:
        """The watched lanes of this thread: its own, and the separate lane of a pause."""
        apart: Lane | None = getattr(self._mine, "apart", None)
        found = [self._armed_lane(), apart]
        return [lane for lane in found if lane is not None and lane.watches]

    def _armed_lane(self) -> Lane | None:
        lane: Lane | None = getattr(self._mine, "lane", None)
        return lane if lane is not None and lane.watches else None

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat while this thread waits for an answer; only for waits that have a timeout."""
        lanes = self._lanes()
        if not lanes:
            yield
            return
        done = threading.Event()

        def beat() -> None:
            while not done.wait(_BEAT_INTERVAL_S):
                for lane in lanes:
                    lane.beat()

        thread = threading.Thread(target=beat, name="vmdedup-heartbeat", daemon=True)
        self.beat()
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def watching(self, *, apart: bool = False, patience_ms: int = 0) -> Iterator[Lane]:
        """Have this thread watched while guests may wait for it.

        That is from before the first protection to after the last lift. May be nested, and end
        on another thread. `apart`: in a lane that only this thread beats, as only this thread
        can end what guests wait for (a pause). `patience_ms`: so much longer than the hang limit
        it may be silent, as guests stand still for long anyway. Restarts the guardian if it was
        killed meanwhile, or has not read for so long that the pipe is full.
        """
        with self._counting:
            lane = None if apart else self._armed_lane()
            lane = lane or Lane(self._words, self._free.pop())
            setattr(self._mine, "apart" if apart else "lane", lane)
            lane.watches += 1
        lane.beat()
        try:
            with self._counting:
                if not lane.is_armed:
                    lane.arm(patience_ms=patience_ms)
                    self._wake()
            yield lane
        finally:
            with self._counting:
                lane.watches -= 1
                if not lane.watches:
                    lane.arm(False)
                    self._free.append(lane.number)

    def take_over(self) -> None:
        """Make the process resume VMs that this engine has given up, as soon as they answer."""
        with self._counting:
            self._wake(GIVEN_UP)

    def _wake(self, word: bytes = b"a") -> None:
        """Wake the process by this word; the caller holds the lock `_counting`."""
        try:
            os.write(self._wake_fd, word)
        except (BrokenPipeError, BlockingIOError):
            self._restart()
            os.write(self._wake_fd, word)
