"""Which processes a libvirt's daemon and its QEMUs are, also in another pid namespace.

A pod has a libvirt and a QEMU of its own (KubeVirt). Such a QEMU names its threads as its own
namespace does; the kernel tells both names of each thread (`NSpid`). Promises a QEMU only in
the namespace of the libvirt that was asked. Reads only.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

from vmdedup.linux.proc_file import read_record

_SOCKETS = ("/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock")
_PROBE_S = 1.0


def daemon_of(uri: str) -> int | None:
    """The process that listens for the libvirt at `uri`; with socket activation that is pid 1."""
    given = parse_qs(urlsplit(uri).query).get("socket", [])
    return next((pid for path in given or _SOCKETS if (pid := _listener_pid(path))), None)


def _listener_pid(path: str) -> int | None:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(path)
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return None
    pid: int = struct.unpack("3i", raw)[0]
    return pid if pid > 0 else None


def qemu_of(uri: str, uuid: str, thread_id: int) -> int | None:
    """The QEMU of domain `uuid`, which calls one of its threads `thread_id`; `None` if unseen."""
    with suppress(OSError, StopIteration):
        record = read_record(f"/proc/{thread_id}/status")
        pid = int(next(_values(record, "Tgid:")))
        if _is_of(pid, uuid):
            return pid
    daemon = daemon_of(uri)
    with suppress(OSError):
        namespace = os.readlink(f"/proc/{daemon}/ns/pid")
        if daemon is not None and namespace != os.readlink("/proc/self/ns/pid"):
            return next(_inside(namespace, uuid, thread_id), None)
    return None


def _inside(namespace: str, uuid: str, thread_id: int) -> Iterator[int]:
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace and _is_of(pid, uuid):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    record = read_record(f"/proc/{pid}/task/{thread}/status")
                    if str(thread_id) in list(_values(record, "NSpid:"))[-1:]:
                        yield pid


def _values(record: str, name: str) -> Iterator[str]:
    """The words of a line of /proc/PID/status."""
    for line in record.splitlines():
        if line.startswith(name):
            yield from line.split()[1:]


def _is_of(pid: int, uuid: str) -> bool:
    """Whether a command line names the domain. Raises OSError."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return uuid.encode() in file.read().split(b"\0")
