"""Descriptors that cannot be turned into writable ones.

Owns the opening of a file through a read-only mount of its own, which no mount
namespace shows. A QEMU that runs as root and is lent such a descriptor cannot
open it again for writing through /proc/self/fd, nor change the file's mode: both
give EROFS. The mount cannot be changed any more once its root is closed. If the
kernel or the privileges do not allow such a mount, the descriptor is an ordinary
read-only one; `is_unwritable` tells.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from vmdedup.linux.syscalls import NR, syscall

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOEXEC = 1, 2, 4, 8


class _MountAttr(ctypes.Structure):
    """`struct mount_attr` (include/uapi/linux/mount.h)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")
    )


def open_unwritable(path: Path) -> int:
    """A read-only descriptor of `path`, through a read-only mount if that is possible.

    In mappings and links its name begins at the mount: `/FOLDER/NAME` if the folder is
    not itself a mount point, else `/NAME`. Raises OSError when it cannot be opened.
    """
    folder = path.parent
    if folder.stat().st_dev == folder.parent.stat().st_dev:
        folder = folder.parent
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        tree = _read_only_clone(folder)
    except OSError:
        return os.open(path, flags)
    try:
        return os.open(path.relative_to(folder), flags, dir_fd=tree)
    finally:
        # From now on no process can reach the mount itself to make it writable.
        os.close(tree)


def is_unwritable(fd: int) -> bool:
    """Whether the descriptor lies on a read-only mount."""
    return bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)


def _read_only_clone(folder: Path) -> int:
    """A detached read-only copy of the mount below `folder`. Raises OSError."""
    name = ctypes.create_string_buffer(os.fsencode(folder))
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    tree = syscall(NR.OPEN_TREE, _AT_FDCWD, ctypes.addressof(name), flags)
    attributes = _MountAttr(
        attr_set=_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
    )
    empty = ctypes.create_string_buffer(b"")
    try:
        syscall(
            NR.MOUNT_SETATTR,
            tree,
            ctypes.addressof(empty),
            _AT_EMPTY_PATH,
            ctypes.addressof(attributes),
            ctypes.sizeof(attributes),
        )
    except BaseException:
        os.close(tree)
        raise
    return tree
