"""Finding VMs as they come: a thread that looks and attaches, so the engine never waits.

Owns the search for VMs that are not attached yet, and the connections to their
monitors until the engine takes them. Promises that a monitor that is busy or
broken delays nobody, and that a VM that could not be attached to is tried again
ever less often. Touches no VM's memory.
"""

from __future__ import annotations

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
from vmdedup.attach.loop import MonitorLoop
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
    ) -> None:
        self.results: SimpleQueue[Attachment | Unreachable] = SimpleQueue()
        self._loop = loop
        self._patterns = list(patterns)
        self._timeout_s = timeout_s
        self._found = found
        self._known: frozenset[Path | int] = frozenset()
        self._failures: dict[Path | int, _Failure] = {}
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
        while not self.results.empty():
            left = self.results.get()
            if isinstance(left, Attachment):
                left.close()

    def attached(self, keys: Collection[Path | int]) -> None:
        """These processes and sockets are attached: leave them alone."""
        self._known = frozenset(keys)

    def welcome(self, pid: int, socket_path: Path | None) -> None:
        """A VM was attached to on request: `leave_alone` is over."""
        for key in (pid, socket_path):
            if key is not None:
                self._failures.pop(key, None)

    def leave_alone(self, pid: int, socket_path: Path | None) -> None:
        """A VM was let go of on request: do not take it again by ourselves."""
        for key in (pid, socket_path):
            if key is not None:
                self._failures[key] = _Failure(float("inf"), _LAST_RETRY_S)

    def refused(self, pid: int, socket_path: Path | None) -> None:
        """A VM that was found must not be merged now: look at it again later."""
        for key in (pid, socket_path):
            if key is not None:
                self._fail(key)

    def look_now(self) -> None:
        """Look at once instead of at the next turn."""
        self._changed.set()

    def _run(self) -> None:
        while not self._ended:
            due = [candidate for candidate in self._candidates() if self._is_due(candidate)]
            if due:
                # Side by side: one that is busy keeps the others waiting no longer.
                with ThreadPoolExecutor(min(_PARALLEL, len(due))) as pool:
                    list(pool.map(self._try, due))
            self._changed.wait(LOOK_EVERY_S)
            self._changed.clear()

    def _candidates(self) -> list[Candidate]:
        try:
            return expand(self._patterns) if self._patterns else running_qemus()
        except OSError:
            return []

    def _is_due(self, candidate: Candidate) -> bool:
        keys: list[Path | int] = [*candidate.sockets]
        if candidate.pid is not None:
            keys.append(candidate.pid)
        if not self._known.isdisjoint(keys):
            return False
        now = time.monotonic()
        return all(key not in self._failures or self._failures[key].retry_at <= now for key in keys)

    def _try(self, candidate: Candidate) -> None:
        key: Path | int = candidate.sockets[0] if candidate.sockets else candidate.pid or 0
        try:
            attachment = attach(candidate, self._loop, timeout_s=self._timeout_s)
        except (VmError, VmdedupError) as error:
            self._fail(key)
            reason = error.reason if isinstance(error, VmError) else str(error)
            self.results.put(Unreachable(candidate.name, candidate.pid, reason))
        else:
            if attachment.identity.pid in self._known:
                attachment.close()
                return
            # Until the engine has taken or refused it, it is ours: not again.
            self._known |= {attachment.identity.pid, key}
            self.results.put(attachment)
        self._found()

    def _fail(self, key: Path | int) -> None:
        before = self._failures.get(key)
        pause_s = _FIRST_RETRY_S if before is None else min(_LAST_RETRY_S, before.pause_s * 2)
        self._failures[key] = _Failure(time.monotonic() + pause_s, pause_s)
