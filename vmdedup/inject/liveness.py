"""A word in shared memory that the kernel marks when this thread dies.

Owns one use of the robust futex list: the kernel sets FUTEX_OWNER_DIED in the
registered word of a dying thread before it takes down the thread's memory and
long before it closes its files (kernel/exit.c: do_exit runs exit_mm, which
releases robust futexes, before exit_files; kernel/futex/core.c:
exit_robust_list, handle_futex_death). A batch of calls that looks at the word
therefore stops before our userfaultfd is closed and guests may write again.

Refuses nothing; where the word is not marked (never seen) a batch runs to its end.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vmdedup import syscalls
from vmdedup.syscalls import NR

OWNER_DIED = 0x4000_0000
"""FUTEX_OWNER_DIED (include/uapi/linux/futex.h)."""


class _RobustListHead(ctypes.Structure):
    _fields_ = (
        ("list", ctypes.c_void_p),
        ("futex_offset", ctypes.c_long),
        ("list_op_pending", ctypes.c_void_p),
    )


def owner_word() -> int:
    """What the word must hold for the kernel to mark it: this thread's id."""
    return threading.get_native_id()


@contextmanager
def marked_on_death(address: int) -> Iterator[None]:
    """While in the block, the 32-bit word at `address` is marked if this thread dies.

    The word must hold `owner_word()` then. glibc registers a list for every thread
    and uses its pending entry only inside robust mutex calls, which Python and
    numpy never make; the entry's former value is put back.
    """
    head = _own_list()
    before = head.list_op_pending
    head.list_op_pending = address - head.futex_offset
    try:
        yield
    finally:
        head.list_op_pending = before


def _own_list() -> _RobustListHead:
    address, length = ctypes.c_void_p(), ctypes.c_size_t()
    syscalls.syscall(NR.GET_ROBUST_LIST, 0, ctypes.addressof(address), ctypes.addressof(length))
    if not address.value or length.value != ctypes.sizeof(_RobustListHead):
        raise OSError("the C library registers no robust futex list")
    return _RobustListHead.from_address(address.value)
