"""All ways of finding VMs, behind one interface.

Owns which scouts there are: libvirt's domains if a libvirt is named, QMP sockets if
some are named, and every QEMU of the host if nothing is. Promises the daemon one
queue of results and one question for each thing it has to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from vmdedup.attach.discover import Attachment, Unreachable
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.daemon.scout import Scout
from vmdedup.daemon.socket_scout import SocketScout
from vmdedup.settings import Settings

if TYPE_CHECKING:
    from vmdedup.daemon.libvirt_scout import LibvirtScout


class Scouts:
    """The scouts that the settings ask for. A context manager. Raises UsageError."""

    def __init__(self, loop: MonitorLoop, settings: Settings, found: Callable[[], None]) -> None:
        self.results: SimpleQueue[Attachment | Unreachable] = SimpleQueue()
        self._exits = ExitStack()
        timeout_s = settings.monitor_timeout_ms / 1000
        self.libvirt: LibvirtScout | None = None
        if settings.libvirt.uri is not None:
            from vmdedup.daemon.libvirt_scout import LibvirtScout

            self.libvirt = LibvirtScout(
                settings.libvirt.uri,
                results=self.results,
                found=found,
                timeout_s=timeout_s,
                longest_retry_s=settings.libvirt.longest_retry_s,
            )
        self._sockets: SocketScout | None = None
        if settings.qmp or self.libvirt is None:
            self._sockets = SocketScout(
                loop,
                settings.qmp,
                timeout_s=timeout_s,
                use=settings.monitor,
                found=found,
                results=self.results,
            )
        self._all: list[Scout] = [
            each for each in (self.libvirt, self._sockets) if each is not None
        ]
        self._looks: dict[int, list[int]] = {}
        self._looks_begun = 0

    def __enter__(self) -> Scouts:
        with ExitStack() as exits:
            exits.callback(self._close_left)
            for scout in self._all:
                exits.enter_context(scout)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def _close_left(self) -> None:
        while not self.results.empty():
            left = self.results.get()
            if isinstance(left, Attachment):
                left.close()

    def attached(self, keys: Collection[Path | int]) -> None:
        """Note that these processes and sockets are attached: leave them alone."""
        for scout in self._all:
            scout.attached(keys)

    def welcome(self, pid: int, socket_path: Path | None) -> None:
        """Note that a VM was attached to on request: ends `leave_alone`."""
        for scout in self._all:
            scout.welcome(pid, socket_path)

    def leave_alone(self, pid: int, socket_path: Path | None) -> None:
        """Note that a VM was let go of on request: do not attach to it again unasked."""
        for scout in self._all:
            scout.leave_alone(pid, socket_path)

    def refused(self, pid: int, socket_path: Path | None) -> None:
        """Note that a VM that was found must not be merged now: look at it again later."""
        for scout in self._all:
            scout.refused(pid, socket_path)

    def taken(self, pid: int) -> None:
        """Note that the engine has taken a result, or closed it."""
        for scout in self._all:
            scout.taken(pid)

    def follow(self, patterns: Sequence[str]) -> None:
        """Look behind these socket patterns from now on."""
        if self._sockets is not None:
            self._sockets.follow(patterns)

    def look_now(self) -> int:
        """Look at once instead of at the next turn; returns the look to ask `has_looked` about."""
        self._looks_begun += 1
        self._looks[self._looks_begun] = [scout.look_now() for scout in self._all]
        return self._looks_begun

    def has_looked(self, look: int) -> bool:
        """Whether this look is over and all its results have been taken."""
        parts = self._looks.get(look)
        if parts is None:
            return True
        over = all(scout.has_looked(part) for scout, part in zip(self._all, parts, strict=True))
        if over:
            del self._looks[look]
        return over
