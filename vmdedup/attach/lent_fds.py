"""Descriptors lent to QEMU: their owners, and taking back those no longer used.

Owns the labels of the fd sets that we make. QEMU 7.2 closes a set by itself only when
its last monitor disconnects (monitor/misc.c: monitor_fdset_cleanup); QEMU 10 never
does. Descriptors that a killed engine lent, or that ours lent over a broken connection,
would stay open for as long as the VM lives. Never touches another client's set, a running
engine's set, or descriptors that an open connection of our own has lent.
"""

from __future__ import annotations

import os
import secrets

from vmdedup.attach import replies
from vmdedup.attach.monitor import Monitor
from vmdedup.linux.process import ProcessId, is_running, read_process_id

_FIRST_FDSET = 1 << 40
"""First of our fd sets: others number theirs from 0, or let QEMU take the lowest free one."""

_open_connections: set[str] = set()


def opened(connection: str) -> None:
    """Note a connection of this process that will lend descriptors; call `closed` at its end."""
    _open_connections.add(connection)


def closed(connection: str) -> None:
    """Note that descriptors lent over that connection are no longer used. Idempotent."""
    _open_connections.discard(connection)


def fresh_fdset() -> int:
    """A number for a new fd set of ours that no other client uses.

    The lowest free number may be the one that another client uses next: its descriptors
    would join our set, and be removed with it.
    """
    return _FIRST_FDSET + secrets.randbits(40)


def label_of(purpose: str, connection: str) -> str:
    """The label of a descriptor that this process lends over `connection` (one word)."""
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
    """Remove our fd sets that are no longer used. Raises MonitorError, VmGoneError."""
    stale = []
    for found in monitor.query("query-fdsets", replies.FdSets):
        labels = [entry.opaque or "" for entry in found.fds]
        if labels and all(map(is_stale, labels)):
            stale.append(found.fdset_id)
    monitor.remove_fds(stale)
