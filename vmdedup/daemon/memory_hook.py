"""The user's program that is told when memory is short, and when it suffices again.

Owns the process: no shell, a document on its stdin, nothing of ours besides. Promises that
the engine never waits for it, and that it ends within its time, with its process group. One
runs at a time; news that comes meanwhile waits, and older news of the same place is dropped.
Promises that after `close` none runs, nor the thread that waits for it, unless the kernel
holds one up. Refuses to judge what the program does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from vmdedup.closing import Closing

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

END_S: Final = 1.0
"""Longest that `close` waits for the thread, seconds. A killed program ends in milliseconds, but
not while it, or reading its file, hangs in the kernel."""

Told = Callable[[str], None]
"""Is told in one line how a run of the program ended, on another thread."""


class MemoryHook(Closing):
    """Runs a program for each document, until `close`."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[Sequence[str], float, str]] = {}
        """What is still to be run, by place."""
        self._running: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, command: Sequence[str], timeout_s: float, place: str, document: str) -> None:
        """Have the command run with the document on its stdin. Returns at once."""
        with self._lock:
            if self._closed:
                return
            self._waiting.pop(place, None)
            self._waiting[place] = command, timeout_s, document
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="vmdedup-hook", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                command, timeout_s, document = self._waiting.pop(next(iter(self._waiting)))
            self._told(self._run(command, timeout_s, document))

    def _run(self, command: Sequence[str], timeout_s: float, document: str) -> str:
        """Run it to its end, or kill it; returns how it ended."""
        try:
            # Not under the lock: it returns only once the program's file was read.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        except OSError as error:
            return f"{command[0]} cannot be started: {error.strerror or error}"
        with self._lock:
            self._running = process
            if self._closed:
                _kill_group(process)
        try:
            process.communicate(document.encode(), timeout_s)
        except subprocess.TimeoutExpired:
            _kill_group(process)
            process.communicate()
            return f"{command[0]} was killed after {timeout_s:g} s"
        finally:
            with self._lock:
                self._running = None
        if process.returncode == 0:
            return f"{command[0]} has ended"
        return f"{command[0]} ended with {process.returncode}"

    def close(self) -> None:
        """Run nothing more, kill what runs, and wait a moment for its end. Idempotent."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            if self._running is not None:
                _kill_group(self._running)
            thread = self._thread
        if thread is not None:
            thread.join(END_S)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # The program has a session of its own, so its group is only its own.
    with suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
