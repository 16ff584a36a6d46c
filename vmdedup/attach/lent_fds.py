"""Descriptors lent to QEMU: whose they are, and taking back what nobody uses any more.

Owns the labels of the fd sets that we make. QEMU 7.2 closes a set by itself only when
its last monitor disconnects (monitor/misc.c: monitor_fdset_cleanup), QEMU 10 never
does, so what a killed engine had lent, or ours over a connection that broke, would
stay open for as long as the VM lives. Never touches a set of anybody else's, nor of an
engine that runs, nor what an open connection of our own has lent.
"""

from __future__ import annotations

import os
import secrets

from vmdedup.attach import replies
from vmdedup.attach.monitor import Monitor
from vmdedup.linux.process import ProcessId, is_running, read_process_id

_FIRST_FDSET = 1 << 40
"""Others number theirs from 0, or have QEMU give them the lowest that is free."""

_open_connections: set[str] = set()


def opened(connection: str) -> None:
    """A connection of this process over which descriptors will be lent; `closed` when it ends."""
    _open_connections.add(connection)


def closed(connection: str) -> None:
    """What was lent over that connection is in use no more. Idempotent."""
    _open_connections.discard(connection)


def fresh_fdset() -> int:
    """A number for an fd set of ours that nobody else's has.

    The lowest that is free may be what another client means to use next: its descriptors
    would be put into our set, and go with it.
    """
    return _FIRST_FDSET + secrets.randbits(40)


def label_of(purpose: str, connection: str) -> str:
    """The label of a descriptor that this process lends over `connection` (a word)."""
    maker = read_process_id(os.getpid())
    return f"{purpose}@{maker.pid}.{maker.start_ticks}.{connection}"


def is_stale(label: str) -> bool:
    """Whether a process of ours that has ended, or a closed connection of this one, made it."""
    purpose, _, maker = label.rpartition("@")
    pid, _, rest = maker.partition(".")
    start_ticks, _, connection = rest.partition(".")
    if not (purpose.startswith("vmdedup") and pid.isdecimal() and start_ticks.isdecimal()):
        return False
    process = ProcessId(int(pid), int(start_ticks))
    if process == read_process_id(os.getpid()):
        return bool(connection) and connection not in _open_connections
    return not is_running(process)


def take_back_stale(monitor: Monitor) -> None:
    """Remove the fd sets that nobody uses any more. Raises MonitorError, VmGoneError."""
    stale = []
    for found in monitor.query("query-fdsets", replies.FdSets):
        labels = [entry.opaque or "" for entry in found.fds]
        if labels and all(map(is_stale, labels)):
            stale.append(found.fdset_id)
    monitor.remove_fds(stale)
