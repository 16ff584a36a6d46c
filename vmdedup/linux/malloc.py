"""Our own heap: what was freed goes back to the kernel, but not while it is needed again.

Owns two calls to the C library, and what Python's collector walks. What we hold counts
against what we save, and glibc keeps what it was given back for the next time: it lets
large arrays into its heap, once it has seen some freed, and there one small thing above
them holds all of them. On the other hand each page of what goes back at once costs a fault
when the next array needs it: a tenth of the time of a merge. Refuses nothing: another C
library knows neither call, and all stays as it was.
"""

from __future__ import annotations

import ctypes
import gc

_libc = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""malloc.h; set by hand, glibc no longer raises the thresholds by itself."""
_LARGE_BYTES = 1 << 20
"""At 256 KiB merging small VMs takes a tenth longer, for the page faults of its arrays."""
_KEPT_BYTES = 128 << 10
_LARGE_IN_HASTE_BYTES = 4 << 20
_KEPT_IN_HASTE_BYTES = 32 << 20


def give_back() -> None:
    """Give freed memory back to the kernel, and from now on what is freed, as it is.

    What is large gets a mapping of its own, which goes with it. All threads share one
    heap, as they share Python's lock. Takes some 0.4 ms.
    """
    _set(_M_ARENA_MAX, 1)
    _set(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    _set(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def settle() -> None:
    """What is there now stays: have Python's collector pass over it from now on.

    It walks tens of thousands of objects of imported modules else, for 20 ms, also in a gate.
    """
    gc.collect()
    gc.freeze()


def keep() -> None:
    """While somebody waits for a merge: keep what is freed, until `give_back`."""
    _set(_M_MMAP_THRESHOLD, _LARGE_IN_HASTE_BYTES)
    _set(_M_TRIM_THRESHOLD, _KEPT_IN_HASTE_BYTES)


def _set(parameter: int, value: int) -> None:
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(parameter, value)
