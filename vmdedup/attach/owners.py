"""Whose a QMP socket is, as its path tells.

Pure. Owns the table of programs that manage VMs, with the places where they make the sockets
over which they themselves talk to QEMU. A socket that vmdedup is meant to have is known by
the word `vmdedup` in its file name or in its character device's id.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase

_OWNERS: tuple[tuple[str, str], ...] = (
    ("*/qemu-server/*.qmp", "Proxmox VE's"),
    ("*/libvirt/qemu/*/monitor.sock", "libvirt's"),
    ("*/qemu.monitor", "Incus' or LXD's"),
    ("*/ganeti/kvm-hypervisor/ctrl/*", "Ganeti's"),
    ("*/.lima/*/qmp.sock", "lima's"),
    ("*/qmp_podman*.sock", "podman's"),
)
"""Paths of sockets, and whose they are.

Proxmox VE: qemu-server, PVE/QemuServer/Helpers.pm; libvirt: qemuDomainSetPrivatePaths; Incus:
internal/server/instance/drivers/driver_qemu.go; Ganeti: lib/hypervisor/hv_kvm; lima:
pkg/store/filenames; podman: pkg/machine/qemu.
"""


def is_ours(path: str, device_id: str | None = None) -> bool:
    """Whether a socket was made for vmdedup, by its file name or its device's id."""
    return "vmdedup" in os.path.basename(path) or "vmdedup" in (device_id or "")


def owner_of(path: str) -> str | None:
    """Whose a socket is (`Proxmox VE's`), `None` if it is no known program's."""
    if is_ours(path):
        return None
    return next((owner for pattern, owner in _OWNERS if fnmatchcase(path, pattern)), None)
