"""Waking the loop: signals, and other threads, through one pipe.

Owns the handlers of SIGTERM, SIGINT and SIGHUP for as long as it is entered, and the
pipe that wakes the loop. Promises that a wake between two waits is not lost. Refuses to
act by itself: a signal only sets a flag that the loop asks for.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Self

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """A context manager, for the main thread."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        """Set when merging should end soon, after the current gate."""
        self.ended = False
        """Whether the loop should end."""
        self._reload_wanted = False
        self._read_fd = self._wake_fd = -1
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._read_fd, self._wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._exits.callback(self._close)
        for number in _NUMBERS:
            self._exits.callback(signal.signal, number, signal.signal(number, self._on_signal))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def _close(self) -> None:
        write_fd, self._wake_fd = self._wake_fd, -1
        os.close(self._read_fd)
        os.close(write_fd)

    def end(self) -> None:
        """Have the loop end soon. From any thread or signal handler."""
        self.ended = True
        self.stop.set()
        self.wake()

    def wake(self) -> None:
        """End the loop's wait. From any thread or signal handler."""
        with suppress(BlockingIOError, OSError):
            os.write(self._wake_fd, b"x")

    def wait(self, other_fd: int, longest_s: float) -> None:
        """Wait to be woken, or for the other descriptor to become readable."""
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        poll.register(other_fd, select.POLLIN)
        poll.poll(max(0.0, longest_s) * 1000)
        with suppress(BlockingIOError):
            os.read(self._read_fd, 4096)

    def take_reload(self) -> bool:
        """Whether SIGHUP has come since this was asked last."""
        wanted, self._reload_wanted = self._reload_wanted, False
        return wanted

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload_wanted = True
            self.wake()
        else:
            self.end()
