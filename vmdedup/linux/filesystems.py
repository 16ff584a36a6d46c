"""What is known of filesystems, by their types as mountinfo names them.

Owns the tables of types, and the question whether a path lies on tmpfs. Memory of a memfd has the
type `memfd`, anonymous memory the empty one.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from vmdedup.errors import StoreError

_libc = ctypes.CDLL(None, use_errno=True)

_TMPFS_MAGIC = 0x01021994

LOCAL_FILESYSTEMS = frozenset(
    (
        "btrfs",
        "erofs",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "overlay",
        "ramfs",
        "squashfs",
        "tmpfs",
        "xfs",
        "zfs",
    )
)
"""Filesystems whose files no other host serves, so that reading one ends."""

IN_MEMORY = frozenset({"memfd", "tmpfs"})
"""Filesystems of RAM files whose pages exist nowhere but in memory."""

WRITE_PROTECTABLE = IN_MEMORY | {""}
"""Types of guest RAM that userfaultfd can write-protect synchronously."""

UNLIMITED = frozenset({"", "memfd"})
"""Types of guest RAM that no full or failing filesystem can keep from getting a page."""


def is_on_tmpfs(path: Path) -> bool:
    """Whether an existing path lies on tmpfs. Raises StoreError."""
    return _filesystem_magic(path) == _TMPFS_MAGIC


def _filesystem_magic(path: Path) -> int:
    buffer = (ctypes.c_long * 32)()
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        raise StoreError(f"{path}: statfs: {os.strerror(ctypes.get_errno())}")
    return int(buffer[0])
