"""Columns in which only written pages take memory.

Owns their allocation. Most of a large guest is never touched, and zeroes in a column
should take no memory. Promises a mapping of its own that the kernel fills in pages of
4 KiB. numpy would take used memory from the heap and clear it, and ask for huge pages.
Refuses nothing.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def zeroes(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """`count` zeroes, shape (count,), to be written."""
    size_bytes = count * np.dtype(dtype).itemsize
    if not size_bytes:
        return np.zeros(0, dtype=dtype)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=dtype)
