"""The base of both scouts: a thread that looks for VMs and attaches, so the engine never waits.

Owns the thread, the VMs on their way to the engine, those to leave alone, and the growing
pauses before a failed VM is tried again. Promises that a VM is handed over once, that
looks can be waited for, and that a slow or broken VM delays no other. Touches no VM's
memory.

A subclass defines where VMs are found and by which keys it knows them: a process id, a
socket's path, or a libvirt domain's UUID.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Self, TypeVar

from vmdedup.attach.discover import Attachment, Unreachable

Key = Path | int | str
"""A socket's path, a process id, or a libvirt domain's UUID."""

_END_LIMIT_S = 0.5
"""Longest wait for the thread's end: a connection attempt must not delay it (daemon thread)."""

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Patience:
    """The pauses before new attempts, and how many VMs are attached to side by side."""

    first_retry_s: float
    longest_retry_s: float
    parallel: int


@dataclass(frozen=True)
class _Failure:
    """A VM that could not be attached to or was refused, and when to try it again."""

    retry_at: float
    pause_s: float


class Scout(ABC):
    """A thread that looks for VMs. A context manager.

    `results` receives an Attachment (the taker owns it) or an Unreachable for each
    attempt; `found` is called after each, from the scout's thread.
    """

    def __init__(
        self,
        thread_name: str,
        patience: Patience,
        *,
        results: SimpleQueue[Attachment | Unreachable],
        found: Callable[[], None],
    ) -> None:
        self.results = results
        self._found = found
        self._patience = patience
        self._lock = threading.Lock()
        self._known: frozenset[Path | int] = frozenset()
        """Processes and sockets of the attached VMs, from the engine's last call."""
        self._handed: dict[int, Key] = {}
        """Processes that we attached to and the engine has not taken yet, with their keys."""
        self._failures: dict[Key, _Failure] = {}
        self._let_go: dict[Key, int] = {}
        """Keys to leave alone while the process with this pid lives."""
        self._looks_begun = 0
        self._looks_done = 0
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=thread_name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._wake()
        self._thread.join(_END_LIMIT_S)

    # --- calls of the engine, on its thread -----------------------------------------------

    def attached(self, keys: Collection[Path | int]) -> None:
        """Note that these processes and sockets are attached: leave them alone."""
        self._known = frozenset(keys)

    def welcome(self, pid: int, socket_path: Path | None) -> None:
        """Note that a VM was attached to on request: ends `leave_alone`."""
        for key in self._keys_of(pid, socket_path):
            self._failures.pop(key, None)
        for named in (pid, socket_path):
            if named is not None:
                self._let_go.pop(named, None)

    def leave_alone(self, pid: int, socket_path: Path | None) -> None:
        """Note that a VM was let go of on request: do not attach to it again unasked.

        This does not apply to another VM that comes with the same socket.
        """
        for key in (pid, socket_path):
            if key is not None:
                self._let_go[key] = pid

    def refused(self, pid: int, socket_path: Path | None) -> None:
        """Note that a VM that was found must not be merged now: look at it again later."""
        for key in self._keys_of(pid, socket_path):
            self._fail(key)

    def taken(self, pid: int) -> None:
        """Note that the engine has taken a result, or closed it; `attached` follows."""
        with self._lock:
            self._handed.pop(pid, None)

    def look_now(self) -> int:
        """Look at once instead of at the next turn; returns the look to ask `has_looked` about."""
        look = self._looks_begun + 1
        self._wake()
        return look

    def has_looked(self, look: int) -> bool:
        """Whether this look is over and all its results have been taken."""
        return self._looks_done >= look and self.results.empty()

    # --- for subclasses -----------------------------------------------------------------

    @abstractmethod
    def _keys_of(self, pid: int, socket_path: Path | None) -> Iterable[Key]:
        """The keys under which failures of this VM are kept."""

    @abstractmethod
    def _look(self) -> None:
        """Look for VMs once, and try those that are due."""

    @abstractmethod
    def _sleep(self) -> None:
        """Wait for the next look, or for `_wake`."""

    @abstractmethod
    def _wake(self) -> None:
        """End `_sleep`, from any thread."""

    # --- the scout's thread -------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            self._looks_begun += 1
            self._look()
            self._looks_done = self._looks_begun
            self._found()
            self._sleep()

    def _side_by_side(self, attempt: Callable[[_Found], None], due: Sequence[_Found]) -> None:
        """Try all that are due in parallel: a busy one does not delay the others."""
        if due:
            with ThreadPoolExecutor(min(self._patience.parallel, len(due))) as pool:
                list(pool.map(attempt, due))

    def _hand_over(self, attachment: Attachment, key: Key) -> bool:
        """Give the engine an attachment; if the VM must not be taken, close it and return False.

        That is a VM that the engine already has, or will have, or has let go of.
        """
        pid = attachment.identity.pid
        with self._lock:
            is_new = pid not in self._known and pid not in self._handed
            if is_new and not self._is_let_go(pid):
                self._handed[pid] = key
                self.results.put(attachment)
                return True
        attachment.close()
        return False

    def _is_taken(self, keys: Collection[Key]) -> bool:
        """Whether the VM with any of these keys is attached, or on its way to the engine."""
        with self._lock:
            taken = self._known | self._handed.keys() | set(self._handed.values())
        return not taken.isdisjoint(keys)

    def _is_let_go(self, key: Key) -> bool:
        pid = self._let_go.get(key)
        if pid is not None and not os.path.exists(f"/proc/{pid}"):
            self._let_go.pop(key, None)
            pid = None
        return pid is not None

    def _is_due(self, keys: Collection[Key]) -> bool:
        """Whether the VM with these keys has not failed, or only long enough ago."""
        now = time.monotonic()
        failures = [self._failures[key] for key in keys if key in self._failures]
        return all(failure.retry_at <= now for failure in failures)

    def _fail(self, key: Key, longest_s: float | None = None) -> None:
        """Note that a VM failed, or was refused: each time its pause doubles."""
        before = self._failures.get(key)
        if before is None:
            pause_s = self._patience.first_retry_s
        else:
            pause_s = min(longest_s or self._patience.longest_retry_s, before.pause_s * 2)
        self._failures[key] = _Failure(time.monotonic() + pause_s, pause_s)
