"""The file behind a memory backend.

Owns finding it among a process's mappings and descriptors, and naming its
filesystem, which decides whether synchronous write protection works:
only anonymous memory, tmpfs and memfd have it. Reads only.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass

import numpy as np

from vmdedup.attach.monitor import one_line
from vmdedup.errors import VmGoneError
from vmdedup.linux import mounts as mounts_seen
from vmdedup.linux.descriptors import descriptor_links
from vmdedup.linux.maps import Maps, is_merged_onto
from vmdedup.linux.mounts import mounts
from vmdedup.linux.process import Process
from vmdedup.linux.unsynced_stat import stat_unsynced

_MEMFD = "/memfd:"
_SHARED_ANONYMOUS = "/dev/zero (deleted)"
"""How the kernel prints MAP_SHARED|MAP_ANONYMOUS (mm/shmem.c: shmem_zero_setup)."""


@dataclass(frozen=True)
class RamFile:
    """A RAM file: its identity, its path, and the backend's offset in it."""

    identity: tuple[int, int]
    offset_bytes: int
    path: str


def find_ram_file(
    process: Process, part: Maps, start: int, size_bytes: int, *, share: bool, path: str
) -> RamFile:
    """The file mapped in `part`, the mappings of a backend that begins at `start`.

    `path` is the beginning of the file's path, as far as QEMU tells ("" if it does
    not). The file is found by mappings that remain; if everything was merged, by the
    only open descriptor of the right size. Raises LookupError if neither decides it.
    """
    flag = "s" if share else "p"
    # Shared and writable: the kernel allows that mapping only with write access to the file.
    kind = "rw-" + flag
    # What has no path is no file, but a ring of io_uring, say (fs/anon_inodes.c).
    rows = [
        r
        for r in np.flatnonzero(part.inode != 0).tolist()
        if part.permissions[r] == kind and part.path[r].startswith("/")
    ]
    named = [r for r in rows if path and part.path[r].startswith(path)]
    # If QEMU has its own mount namespace, the path can look different from here.
    for row in named or [r for r in rows if share or not is_merged_onto(part.path[r])]:
        offset = int(part.offset_bytes[row]) - (int(part.start[row]) - start)
        if offset < 0:
            raise LookupError("its file is mapped at unexpected offsets")
        return RamFile((int(part.device[row]), int(part.inode[row])), offset, part.path[row])
    return _by_descriptor(process, size_bytes, path, share=share)


def check_mappings(part: Maps, start: int, file: RamFile | None, *, share: bool) -> bool:
    """Whether `part`, the mappings of a backend that begins at `start`, has merged pages.

    Raises LookupError for any other mapping than the backend's own, of the right kind
    and at the right offset, or one that pages are merged onto.
    """
    merged = False
    for index in range(len(part)):
        permissions, path = part.permissions[index], part.path[index]
        identity = (int(part.device[index]), int(part.inode[index]))
        low = int(part.start[index])
        if permissions[:2] != "rw":
            raise LookupError("read-only memory (ROM)")
        if permissions[2] != "-":
            raise LookupError(f"executable memory at {low:#x} is no guest RAM")
        if file is not None and identity == file.identity:
            if permissions[3] != ("s" if share else "p"):
                raise LookupError("its mapping and its share property disagree")
            if int(part.offset_bytes[index]) != low - start + file.offset_bytes:
                raise LookupError("its file is mapped at unexpected offsets")
        elif permissions[3] == "p" and identity != (0, 0) and is_merged_onto(path):
            merged = True
        elif file is not None or identity != (0, 0) or permissions[3] != "p":
            raise LookupError(f"unexpected mapping at {low:#x}: {one_line(path, 120)}")
    return merged


def _by_descriptor(process: Process, size_bytes: int, prefix: str, *, share: bool) -> RamFile:
    """The open RAM file of exactly this size that no mapping shows any more.

    If it is to be written (`share`), QEMU itself must have it open for writing: it
    may name any file that it can merely read.
    """
    try:
        links = descriptor_links(process.pid)
    except OSError as error:
        raise VmGoneError(process.vm, "the VM's process ended", pid=process.pid) from error
    found: dict[tuple[int, int], str] = {}
    for fd, path in links.items():
        with contextlib.suppress(OSError):
            status = stat_unsynced(f"/proc/{process.pid}/fd/{fd}")
            ours = is_merged_onto(path) and not (prefix and path.startswith(prefix))
            fits = stat.S_ISREG(status.mode) and status.size_bytes == size_bytes
            if fits and path[:1] == "/" and not ours and not (share and process.only_reads(fd)):
                found[status.device, status.inode] = path
    if len(found) != 1:
        raise LookupError("its RAM file cannot be told apart from other open files")
    (identity, path), *_ = found.items()
    return RamFile(identity, 0, path)


def filesystem_of(pid: int, file: RamFile) -> str:
    """`memfd` (also shared anonymous memory), or the filesystem type, or `unknown`.

    Memfds live on a mount of the kernel's own that no mountinfo lists.
    """
    if file.path.startswith(_MEMFD) or file.path == _SHARED_ANONYMOUS:
        return "memfd"
    device = f"{os.major(file.identity[0])}:{os.minor(file.identity[0])}"
    return _types_by_device(pid).get(device) or filesystem_at(pid, file.path)


def _types_by_device(pid: int) -> dict[str, str]:
    return {mount.device: mount.filesystem for mount in mounts(pid)}


def filesystem_at(pid: int, path: str) -> str:
    """Type of the filesystem under `path` as process `pid` sees it; `unknown` if none."""
    return mounts_seen.filesystem_at(mounts(pid), path)
