"""Our own heap: freed memory goes back to the kernel, unless it is soon needed again.

Owns two calls to the C library, and the set of objects Python's collector walks. Memory
that we hold reduces the savings, and glibc keeps freed memory for later. Once it has seen
large arrays freed, it puts further ones into its heap, where one small object above them
keeps them all. But each page returned at once costs a fault when the next array needs it:
a tenth of a merge's time. Refuses nothing: another C library knows neither call, and all
stays as it was.
"""

from __future__ import annotations

import ctypes
import gc

_libc = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Parameters of mallopt (malloc.h). Once they are set, glibc no longer raises the thresholds."""
_LARGE_BYTES = 1 << 20
"""Size from which an allocation gets its own mapping, bytes. At 256 KiB merging small VMs
takes a tenth longer, for the page faults of its arrays."""
_KEPT_BYTES = 128 << 10
_LARGE_IN_HASTE_BYTES = 4 << 20
_KEPT_IN_HASTE_BYTES = 32 << 20


def give_back() -> None:
    """Give freed memory back to the kernel, and from now on as soon as it is freed.

    A large allocation gets a mapping of its own, which is unmapped with it. All threads
    share one heap, as they share Python's lock. Takes some 0.4 ms.
    """
    _set(_M_ARENA_MAX, 1)
    _set(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    _set(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def settle() -> None:
    """Have Python's collector pass over all present objects from now on: they stay.

    Else it walks tens of thousands of objects of imported modules for 20 ms, also in a gate.
    """
    gc.collect()
    gc.freeze()


def keep() -> None:
    """Keep freed memory until `give_back`, while somebody waits for a merge."""
    _set(_M_MMAP_THRESHOLD, _LARGE_IN_HASTE_BYTES)
    _set(_M_TRIM_THRESHOLD, _KEPT_IN_HASTE_BYTES)


def _set(parameter: int, value: int) -> None:
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(parameter, value)
