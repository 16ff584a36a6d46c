"""What file a path leads to, asked without waiting for a server of its filesystem.

Another process may have files open on storage that hangs: FUSE, NFS, CIFS. A plain stat of its
descriptor asks that server, and returns when it answers. `AT_STATX_DONT_SYNC` takes what the
kernel knows. Owns that call, and the layout of its answer (include/uapi/linux/stat.h). The
answer is exact for filesystems of this host; for others the size may be old. Reads only, and
imports nothing but the standard library: the guardian needs it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC_STATS = 0x7FF
_STATX_BYTES = 256
_ANSWER = struct.Struct("=20xI4xH2xQQ80xIIII")
"""uid, mode, inode, size, and major and minor numbers: the node's own, its filesystem's."""


@dataclass(frozen=True)
class FileStatus:
    """The file's identity, and what is known of it."""

    device: int
    """As `st_dev`."""
    inode: int
    mode: int
    uid: int
    size_bytes: int
    node: int
    """The device that a device node stands for, as `st_rdev`."""


def stat_unsynced(path: str) -> FileStatus:
    """The status of the file at `path`, symbolic links followed. Raises OSError."""
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    how = (_AT_STATX_DONT_SYNC, _STATX_BASIC_STATS)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), *map(ctypes.c_uint, how), answer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    uid, mode, inode, size_bytes, *numbers = _ANSWER.unpack_from(answer)
    node, device = os.makedev(*numbers[:2]), os.makedev(*numbers[2:])
    return FileStatus(device, inode, mode, uid, size_bytes, node)


def file_behind(pid: int, fd: int | str) -> tuple[int, int] | None:
    """Device and inode of the file behind a process's descriptor; `None` if it cannot be seen."""
    try:
        found = stat_unsynced(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return None
    return found.device, found.inode
