"""Files with holes: finding the allocated parts, and freeing parts.

Owns SEEK_DATA, hole punching, and the questions which pages a file has, and which of them
are in memory. Promises that a file's size stays the same.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.linux.syscall_batch import call_columns, require_done, run_calls
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES, pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

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


def allocated(fd: int, offset_bytes: int, count: int) -> npt.NDArray[np.bool_]:
    """Whether a file has each of `count` pages, in memory or swapped out; others are holes."""
    held = np.zeros(count, dtype=np.bool_)
    for low, high in data_segments(fd, offset_bytes + count * PAGE_BYTES):
        if high > offset_bytes:
            first = max(0, low - offset_bytes) // PAGE_BYTES
            held[first : pages(high - offset_bytes)] = True
    return held


def resident(fd: int, offset_bytes: int, count: int) -> npt.NDArray[np.bool_]:
    """Whether each of `count` pages of a file is in memory, by mincore, which reads none in.

    For tmpfs and memfd the other allocated pages are swapped out.
    """
    length = count * PAGE_BYTES
    answer = np.zeros(count, dtype=np.uint8)
    with mmap.mmap(
        fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=offset_bytes
    ) as view:
        column = np.frombuffer(view, dtype=np.uint8)
        failed = _libc.mincore(column.ctypes.data, length, answer.ctypes.data)
        del column
    if failed:
        error = ctypes.get_errno()
        raise OSError(error, f"mincore: {os.strerror(error)}")
    return np.asarray((answer & 1) != 0)
