"""Files with holes: finding the allocated parts, and freeing parts.

Owns SEEK_DATA, hole punching and the question whether a path lies on tmpfs. Promises that
a file's size stays the same.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.errors import StoreError
from vmdedup.linux.syscall_batch import call_columns, require_done, run_calls
from vmdedup.linux.syscalls import NR

_libc = ctypes.CDLL(None, use_errno=True)

_TMPFS_MAGIC = 0x01021994
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_PUNCHES_AT_ONCE = 256


def punch_holes(
    fd: int, offset_bytes: npt.NDArray[np.int64], length_bytes: npt.NDArray[np.int64]
) -> None:
    """Free ranges of a file without changing its size; OSError on failure."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    calls = call_columns(NR.FALLOCATE, fd, mode, offset_bytes, length_bytes)
    for first in range(0, len(calls), _PUNCHES_AT_ONCE):
        results = run_calls(calls[first : first + _PUNCHES_AT_ONCE])
        require_done(results, "fallocate(PUNCH_HOLE)")
        faults.reached("hole-punched")


def data_segments(fd: int, end_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) byte ranges of a file that are allocated, by SEEK_DATA and SEEK_HOLE."""
    position = 0
    while position < end_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            return
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(position, end_bytes)


def is_on_tmpfs(path: Path) -> bool:
    """Whether an existing path lies on tmpfs. Raises StoreError."""
    return _filesystem_magic(path) == _TMPFS_MAGIC


def _filesystem_magic(path: Path) -> int:
    buffer = (ctypes.c_long * 32)()
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        raise StoreError(f"{path}: statfs: {os.strerror(ctypes.get_errno())}")
    return int(buffer[0])
