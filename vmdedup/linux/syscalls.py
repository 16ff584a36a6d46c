"""The Linux system calls that Python does not wrap, checked the same way.

Owns the ctypes declarations and nothing else: each function is one system
call, takes plain integers and buffers, and raises OSError with the call's
name on failure. ctypes releases the GIL around every call. x86-64 numbers
stand in `NR`, since the same numbers are also run inside other processes.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class NR(IntEnum):
    """x86-64 system call numbers (arch/x86/entry/syscalls/syscall_64.tbl)."""

    READ = 0
    CLOSE = 3
    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    RT_SIGRETURN = 15
    IOCTL = 16
    PREAD64 = 17
    PWRITE64 = 18
    MREMAP = 25
    MINCORE = 27
    MADVISE = 28
    GETPID = 39
    RECVMSG = 47
    FCNTL = 72
    PTRACE = 101
    SCHED_SETSCHEDULER = 144
    FUTEX = 202
    RESTART_SYSCALL = 219
    CLOCK_GETTIME = 228
    CLOCK_NANOSLEEP = 230
    MBIND = 237
    SET_MEMPOLICY = 238
    READLINKAT = 267
    MOVE_PAGES = 279
    FALLOCATE = 285
    PROCESS_VM_READV = 310
    PROCESS_VM_WRITEV = 311
    MEMFD_CREATE = 319
    USERFAULTFD = 323
    OPEN_TREE = 428
    PIDFD_GETFD = 438
    PROCESS_MADVISE = 440
    MOUNT_SETATTR = 442


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ioctl.restype = ctypes.c_int
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

IOV_MAX = 1024
"""Most pieces one vectored call takes (include/uapi/linux/uio.h: UIO_MAXIOV)."""


def _check(result: int, name: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def syscall(number: NR, *args: int) -> int:
    """Run system call `number`; raises OSError on failure."""
    result: int = _libc.syscall(
        ctypes.c_long(number), *(ctypes.c_ulong(arg & 0xFFFF_FFFF_FFFF_FFFF) for arg in args)
    )
    return _check(result, NR(number).name.lower())


def ioctl(fd: int, request: int, argument: ctypes.Structure | ctypes.Array[ctypes.c_ulong]) -> int:
    """`ioctl(fd, request, &argument)`; the structure is updated in place."""
    return _check(
        _libc.ioctl(fd, request, ctypes.cast(ctypes.byref(argument), ctypes.c_void_p)), "ioctl"
    )


def futex_wait(address: int, expected: int, timeout_s: float) -> None:
    """Sleep while the 32-bit word at `address` is `expected`; also across processes.

    Returns after `timeout_s`, a wake or a signal alike: look at the word again.
    """
    whole_s = int(timeout_s)
    timeout = (ctypes.c_long * 2)(whole_s, int((timeout_s - whole_s) * 1_000_000_000))
    try:
        syscall(NR.FUTEX, address, 0, expected, ctypes.addressof(timeout), 0, 0)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
            raise


def sched_setscheduler(tid: int, policy: int, priority: int) -> None:
    """Like os.sched_setscheduler, but without the GIL: the caller may be preempted in it."""
    parameters = ctypes.c_int(priority)
    syscall(NR.SCHED_SETSCHEDULER, tid, policy, ctypes.addressof(parameters))


def pidfd_getfd(pidfd: int, remote_fd: int) -> int:
    """Copy `remote_fd` of the process behind `pidfd` into ours (close-on-exec)."""
    return syscall(NR.PIDFD_GETFD, pidfd, remote_fd, 0)


def iovecs(
    address: int | npt.NDArray[np.int64], length_bytes: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """`struct iovec` array, shape (n, 2), from addresses, or one for all, and lengths."""
    vectors = np.empty((len(length_bytes), 2), dtype=np.uint64)
    vectors[:, 0], vectors[:, 1] = address, length_bytes
    return vectors


def process_madvise(pidfd: int, ranges: Sequence[tuple[int, int]], advice: int) -> int:
    """Give `advice` for (address, length) ranges of another process.

    Returns the bytes advised. At most IOV_MAX ranges a call.
    """
    table = np.array(ranges, dtype=np.uint64).reshape(-1, 2)
    return syscall(NR.PROCESS_MADVISE, pidfd, table.ctypes.data, len(table), advice, 0)
