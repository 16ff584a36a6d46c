"""Descriptors lent to QEMU: whose they are, and taking back a dead maker's.

Owns the labels of the fd sets that we make. QEMU closes a set by itself only when
its last monitor disconnects (monitor/fds.c: monitor_fdset_cleanup), so beside
another client what a killed engine had lent would stay open for as long as the VM
lives. Never touches a set of anybody else's, nor of an engine that runs.
"""

from __future__ import annotations

import os

from vmdedup.attach import replies
from vmdedup.attach.monitor import Monitor
from vmdedup.procfs.process import ProcessId, is_running, read_process_id


def label_of(purpose: str) -> str:
    """The label of a descriptor that this process lends."""
    maker = read_process_id(os.getpid())
    return f"{purpose}@{maker.pid}.{maker.start_ticks}"


def is_stale(label: str) -> bool:
    """Whether a process of ours that has ended made this label."""
    purpose, _, maker = label.rpartition("@")
    pid, _, start_ticks = maker.partition(".")
    if not (purpose.startswith("vmdedup") and pid.isdecimal() and start_ticks.isdecimal()):
        return False
    return not is_running(ProcessId(int(pid), int(start_ticks)))


def take_back_stale(monitor: Monitor) -> None:
    """Remove the fd sets that dead engines left. Raises MonitorError, VmGoneError."""
    for found in monitor.query("query-fdsets", replies.FdSets):
        labels = [entry.opaque or "" for entry in found.fds]
        if labels and all(map(is_stale, labels)):
            monitor.remove_fd(found.fdset_id)
