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
    how = (_AT_STATX_DONT_SYNC, _STATX_BASIC_STATS)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), *map(ctypes.c_uint, how), answer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    inode, size_bytes = _INODE_AND_SIZE.unpack_from(answer)
    (mode,) = _MODE.unpack_from(answer)
    return FileStatus(os.makedev(*_DEVICE.unpack_from(answer)), inode, mode, size_bytes)
