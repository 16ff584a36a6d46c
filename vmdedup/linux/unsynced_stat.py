"""What file a path leads to, asked without waiting for a server of its filesystem.

Another process may have files open on storage that hangs: FUSE, NFS, CIFS. A plain stat of its
descriptor asks that server, and returns when it answers. `AT_STATX_DONT_SYNC` takes what the
kernel knows. Owns that call, and the layout of its answer (include/uapi/linux/stat.h). The
answer is exact for filesystems of this host; for others the size may be old. Reads only.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

from vmdedup.linux.syscalls import NR, syscall

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC_STATS = 0x7FF
_STATX_BYTES = 256
_MODE = struct.Struct("=28xH")
_INODE_AND_SIZE = struct.Struct("=32xQQ")
_DEVICE = struct.Struct("=136xII")


@dataclass(frozen=True)
class FileStatus:
    """The file's identity, and what is known of it."""

    device: int
    """As `st_dev`."""
    inode: int
    mode: int
    size_bytes: int


def stat_unsynced(path: str) -> FileStatus:
    """The status of the file at `path`, symbolic links followed. Raises OSError."""
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    name = ctypes.create_string_buffer(os.fsencode(path))
    syscall(
        NR.STATX,
        _AT_FDCWD,
        ctypes.addressof(name),
        _AT_STATX_DONT_SYNC,
        _STATX_BASIC_STATS,
        ctypes.addressof(answer),
    )
    inode, size_bytes = _INODE_AND_SIZE.unpack_from(answer)
    (mode,) = _MODE.unpack_from(answer)
    return FileStatus(os.makedev(*_DEVICE.unpack_from(answer)), inode, mode, size_bytes)
