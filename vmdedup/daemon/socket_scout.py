"""The scout for QMP sockets: it looks behind named ones, or for every QEMU of the host.

Owns the search for VMs by their sockets and processes. Promises what `scout` promises,
and that a glob that matches nothing waits for a VM. Touches no VM's memory.
"""

from __future__ import annotations

import errno
import glob
import socket
import threading
from collections.abc import Callable, Sequence
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
from vmdedup.daemon.scout import Key, Patience, Scout
from vmdedup.errors import VmdedupError, VmError
from vmdedup.settings import MonitorUse

_LOOK_EVERY_S = 1.0
_PATIENCE = Patience(first_retry_s=1.0, longest_retry_s=30.0, parallel=16)


class SocketScout(Scout):
    """Looks for VMs behind `patterns`; without any, for all of this host."""

    def __init__(
        self,
        loop: MonitorLoop,
        patterns: Sequence[str],
        *,
        timeout_s: float,
        use: MonitorUse,
        found: Callable[[], None],
        results: SimpleQueue[Attachment | Unreachable],
    ) -> None:
        super().__init__("vmdedup-scout", _PATIENCE, results=results, found=found)
        self._loop = loop
        self._patterns = list(patterns)
        self._timeout_s = timeout_s
        self._use = use
        self._changed = threading.Event()

    def follow(self, patterns: Sequence[str]) -> None:
        """Look behind these patterns from now on."""
        self._patterns = list(patterns)
        self.look_now()

    def _keys_of(self, pid: int, socket_path: Path | None) -> list[Key]:
        return [pid] if socket_path is None else [pid, socket_path]

    def _look(self) -> None:
        due = [candidate for candidate in self._candidates() if self._wants(candidate)]
        self._side_by_side(self._try, due)

    def _sleep(self) -> None:
        self._changed.wait(_LOOK_EVERY_S)
        self._changed.clear()

    def _wake(self) -> None:
        self._changed.set()

    def _candidates(self) -> list[Candidate]:
        try:
            if not self._patterns:
                return running_qemus()
            found = expand(self._patterns)
        except OSError:
            return []
        # A glob that matches nothing is not a VM: it waits for one.
        return [each for each in found if not glob.has_magic(each.name) or _exists(each)]

    def _wants(self, candidate: Candidate) -> bool:
        """Whether a candidate should be tried now."""
        keys: list[Key] = [*candidate.sockets, *candidate.foreign]
        if candidate.pid is not None:
            keys.append(candidate.pid)
        if self._is_taken(keys) or any(self._is_let_go(key) for key in keys):
            return False
        return self._is_due(keys)

    def _try(self, candidate: Candidate) -> None:
        key: Key = candidate.sockets[0] if candidate.sockets else candidate.pid or 0
        try:
            attachment = attach(candidate, self._loop, timeout_s=self._timeout_s, use=self._use)
        except VmdedupError as error:
            # A missing socket costs nothing to look for, so a new one is found at once.
            self._fail(key, None if _exists(candidate) else _PATIENCE.first_retry_s)
            reason = error.reason if isinstance(error, VmError) else str(error)
            pid = error.pid if isinstance(error, VmError) else candidate.pid
            # The socket of a killed VM is not a VM, unless it is looked for by name.
            wanted = candidate.pid is not None or candidate.name in self._patterns
            if wanted or not _is_left_over(candidate):
                self.results.put(Unreachable(candidate.name, pid, reason))
        else:
            if not self._hand_over(attachment, key):
                self._fail(key)
        self._found()


def _exists(candidate: Candidate) -> bool:
    return any(path.exists() for path in candidate.sockets)


def _is_left_over(candidate: Candidate) -> bool:
    """Whether nothing listens on any of its sockets."""
    return bool(candidate.sockets) and not any(map(_listens, candidate.sockets))


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)
        except OSError:
            return False  # a path too long for a socket
