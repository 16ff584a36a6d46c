"""Finding VMs as they come: a thread that looks and attaches, so the engine never waits.

Owns the search for VMs that are not attached yet, and the connections to their
monitors until the engine takes them. Promises that a monitor that is busy or
broken delays nobody, and that a VM that could not be attached to is tried again
ever less often. Touches no VM's memory.
"""

from __future__ import annotations

import errno
import glob
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from vmdedup.attach.discover import (
    Attachment,
    Candidate,
    Unreachable,
    attach,
    expand,
    running_qemus,
)
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.errors import VmdedupError, VmError

LOOK_EVERY_S = 1.0
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_PARALLEL = 16
_END_LIMIT_S = 0.5
"""A connection attempt under way does not delay the end; the thread is a daemon thread."""


@dataclass
class _Failure:
    """A candidate that could not be attached to, and when to try it again."""

    retry_at: float
    pause_s: float


class Scout:
    """Looks for VMs behind `patterns`, or for all of this host without any.

    `results` receives an Attachment (the taker owns it) or an Unreachable for each
    attempt; `found` is called after each, from the scout's thread. A context manager.
    """

    def __init__(
        self,
        loop: MonitorLoop,
        patterns: Sequence[str],
        *,
        timeout_s: float,
        found: Callable[[], None],
        results: SimpleQueue[Attachment | Unreachable],
    ) -> None:
        self.results = results
        self._loop = loop
        self._patterns = list(patterns)
        self._timeout_s = timeout_s
        self._found = found
        self._known: frozenset[Path | int] = frozenset()
        self._lock = threading.Lock()
        self._handed: dict[int, Path | int] = {}
        """Processes attached to by us, and not taken by the engine yet, with their sockets."""
        self._failures: dict[Path | int, _Failure] = {}
        self._let_go: dict[Path | int, int] = {}
        """Left alone while the process with this pid lives."""
        self._looks_begun = 0
        self._looks_done = 0
        self._changed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="vmdedup-scout", daemon=True)

    def __enter__(self) -> Scout:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._changed.set()
        self._thread.join(_END_LIMIT_S)

    def attached(self, keys: Collection[Path | int]) -> None:
        """These processes and sockets are attached: leave them alone."""
        self._known = frozenset(keys)

    def welcome(self, pid: int, socket_path: Path | None) -> None:
        """A VM was attached to on request: `leave_alone` is over."""
        for key in (pid, socket_path):
            if key is not None:
                self._failures.pop(key, None)
                self._let_go.pop(key, None)

    def leave_alone(self, pid: int, socket_path: Path | None) -> None:
        """A VM was let go of on request: do not take it again by ourselves.

        Another VM that comes with the same socket is not meant.
        """
        for key in (pid, socket_path):
            if key is not None:
                self._let_go[key] = pid

    def refused(self, pid: int, socket_path: Path | None) -> None:
        """A VM that was found must not be merged now: look at it again later."""
        for key in (pid, socket_path):
            if key is not None:
                self._fail(key)

    def taken(self, pid: int) -> None:
        """The engine has taken a result, or closed it; what is attached it says itself."""
        with self._lock:
            self._handed.pop(pid, None)

    def follow(self, patterns: Sequence[str]) -> None:
        """Look behind these patterns from now on."""
        self._patterns = list(patterns)
        self.look_now()

    def look_now(self) -> int:
        """Look at once instead of at the next turn; the look to ask `has_looked` about."""
        look = self._looks_begun + 1
        self._changed.set()
        return look

    def has_looked(self, look: int) -> bool:
        """Whether this look is over and all its results have been taken."""
        return self._looks_done >= look and self.results.empty()

    def _run(self) -> None:
        while not self._ended:
            self._looks_begun += 1
            due = [candidate for candidate in self._candidates() if self._is_due(candidate)]
            if due:
                # Side by side: one that is busy keeps the others waiting no longer.
                with ThreadPoolExecutor(min(_PARALLEL, len(due))) as pool:
                    list(pool.map(self._try, due))
            self._looks_done = self._looks_begun
            self._found()
            self._changed.wait(LOOK_EVERY_S)
            self._changed.clear()

    def _candidates(self) -> list[Candidate]:
        try:
            if not self._patterns:
                return running_qemus()
            found = expand(self._patterns)
        except OSError:
            return []
        # A glob that matches nothing is no VM: it waits for one.
        return [each for each in found if not glob.has_magic(each.name) or _exists(each)]

    def _is_due(self, candidate: Candidate) -> bool:
        keys: list[Path | int] = [*candidate.sockets]
        if candidate.pid is not None:
            keys.append(candidate.pid)
        with self._lock:
            known = self._known | self._handed.keys() | set(self._handed.values())
        if not known.isdisjoint(keys) or any(self._is_let_go(key) for key in keys):
            return False
        now = time.monotonic()
        return all(key not in self._failures or self._failures[key].retry_at <= now for key in keys)

    def _is_let_go(self, key: Path | int) -> bool:
        pid = self._let_go.get(key)
        if pid is not None and not os.path.exists(f"/proc/{pid}"):
            self._let_go.pop(key, None)
            pid = None
        return pid is not None

    def _try(self, candidate: Candidate) -> None:
        key: Path | int = candidate.sockets[0] if candidate.sockets else candidate.pid or 0
        try:
            attachment = attach(candidate, self._loop, timeout_s=self._timeout_s)
        except (VmError, VmdedupError) as error:
            # One that is not there yet costs nothing to look for, so it is found at once.
            self._fail(key, _LAST_RETRY_S if _exists(candidate) else _FIRST_RETRY_S)
            reason = error.reason if isinstance(error, VmError) else str(error)
            pid = error.pid if isinstance(error, VmError) else candidate.pid
            # What a VM that was killed leaves behind is no VM, unless it is looked for by name.
            wanted = candidate.pid is not None or candidate.name in self._patterns
            if wanted or not _is_left_over(candidate):
                self.results.put(Unreachable(candidate.name, pid, reason))
        else:
            self._hand_over(attachment, key)
        self._found()

    def _hand_over(self, attachment: Attachment, key: Path | int) -> None:
        """Give the engine an attachment, unless it or the engine has one of that process."""
        pid = attachment.identity.pid
        with self._lock:
            is_new = pid not in self._known and pid not in self._handed
            if is_new and not self._is_let_go(pid):
                self._handed[pid] = key
                self.results.put(attachment)
                return
        attachment.close()
        self._fail(key)

    def _fail(self, key: Path | int, longest_s: float = _LAST_RETRY_S) -> None:
        before = self._failures.get(key)
        pause_s = _FIRST_RETRY_S if before is None else min(longest_s, before.pause_s * 2)
        self._failures[key] = _Failure(time.monotonic() + pause_s, pause_s)


def _exists(candidate: Candidate) -> bool:
    return any(path.exists() for path in candidate.sockets)


def _is_left_over(candidate: Candidate) -> bool:
    """Whether nothing listens at any of its sockets."""
    return bool(candidate.sockets) and not any(map(_listens, candidate.sockets))


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)
        except OSError:
            return False  # a path too long for a socket
