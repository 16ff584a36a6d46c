"""Descriptors lent to one VM's QEMU, and the copies of them that QEMU does not close.

Owns the fd sets that we have in one QEMU, from lending to taking back. QEMU before 10 closes
lent descriptors when a monitor disconnects; a number may then be that of any other file.
Promises that a copy is of the file that was lent, whatever monitors do meanwhile. Refuses to
go on otherwise: what is mapped, or waited on, by a wrong number would harm the guest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from vmdedup import faults
from vmdedup.attach.monitor import Monitor
from vmdedup.errors import MergeError, MonitorError
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.process import Process
from vmdedup.linux.unsynced_stat import file_behind

Lend = Callable[[int, str], int]
"""Gives QEMU a copy of a descriptor, for a purpose; returns its number there."""


class LentFds:
    """What is lent to the QEMU behind `monitor`."""

    def __init__(self, vm: str, monitor: Monitor, process: Process) -> None:
        self._vm = vm
        self._monitor = monitor
        self._process = process
        self._sets: Sequence[int] = ()
        """The fd sets that QEMU still has."""
        self._files: dict[int, tuple[int, int] | None] = {}
        """Device and inode of the file behind each number lent in the present block."""

    @contextmanager
    def lending(self) -> Iterator[Lend]:
        """Lend descriptors for the time of the block, and take all back at its end.

        Raises VmError. A set that a silent monitor cannot take back is taken back by the next
        block.
        """
        sets: list[int] = []
        self._take_back()

        def lend(fd: int, purpose: str) -> int:
            fdset, number = self._monitor.add_fd(fd, f"vmdedup-{purpose}", *sets)
            sets[:] = [fdset]
            self._files[number] = file_behind(os.getpid(), fd)
            faults.reached("lent")
            return number

        try:
            yield lend
        finally:
            self._sets = [*self._sets, *sets]
            self._files.clear()
            with suppress(MonitorError):
                self._take_back()

    def copies(self, remote: RemoteThread, numbers: Sequence[int]) -> list[int]:
        """Have QEMU's thread copy lent descriptors (`RemoteThread.own`); the copies' numbers.

        Raises MergeError if QEMU has closed one of them meanwhile, else as `RemoteThread.own`.
        """
        # SAFETY: the batch that copies goes on after our death; its copies are closed by the
        # next engine, and nobody has used one before it was compared here.
        made = remote.own(numbers)
        for number, copy in zip(numbers, made, strict=True):
            lent = self._files.get(number)
            if lent is None or file_behind(self._process.pid, copy) != lent:
                remote.own([])
                reason = "QEMU closed what it was lent: a monitor was disconnected; tried again"
                raise MergeError(self._vm, "add-fd", reason, pid=self._process.pid)
        return made

    def _take_back(self) -> None:
        """Have QEMU close what it was lent. Raises VmError; the next call retries."""
        if self._sets and self._process.alive():
            self._monitor.remove_fds(list(self._sets))
            self._sets = ()
            faults.reached("taken-back")
