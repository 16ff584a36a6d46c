"""Many system calls, and calls of C functions, in one batch.

Owns a loop of 78 bytes of machine code, in a page that is executable and never
writable. It runs a table of calls as the loop stub does inside QEMU (`inject`).
A call made from Python costs about two microseconds more than the call itself: most
of the time of the tens of thousands of ioctls, reads, digests and punches of a pass.
Promises the same results without the loop, only slower: if executable memory is
denied, or on another architecture, Python makes the calls.

The GIL is released for the whole table. Refuses nothing: a result is -errno, as the
kernel gives it, or the function's return value, and the caller judges it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from vmdedup.errors import BorderError

_ARGUMENTS = 7
"""Words of a call: its number and six arguments; the eighth word of a row takes the result."""

_LEAST_ADDRESS = 4096
"""Lowest address of a C function; smaller numbers name system calls."""

LOOP = bytes.fromhex(
    "5355"
    "4883ec08"
    "4889fb"
    "4889f5"  # push rbx; push rbp; sub rsp, 8; mov rbx, rdi; mov rbp, rsi
    "4839eb"
    "7436"  # next: cmp rbx, rbp; je done
    "488b03"
    "488b7b08"
    "488b7310"  # mov rax, [rbx]; rdi, [rbx + 8]; rsi, [rbx + 16]
    "488b5318"
    "4c8b5320"
    "4c8b4328"
    "4c8b4b30"  # rdx, r10, r8, r9 likewise
    "483d00100000"
    "730c"  # cmp rax, 4096; jae function
    "0f05"
    "48894338"
    "4883c340"
    "ebcc"  # syscall; result: mov [rbx + 56], rax; add rbx, 64; jmp next
    "4c89d1"
    "ffd0"
    "ebef"  # function: mov rcx, r10; call rax; jmp result
    "4883c408"
    "5d"
    "5b"
    "c3"  # done: add rsp, 8; pop rbp; pop rbx; ret
)
"""`void loop(uint64_t *first_row, uint64_t *behind_last_row)`, System V x86-64."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Uint64s = npt.NDArray[np.uint64]
_CFunction = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * (_ARGUMENTS - 1))
Column = int | npt.NDArray[np.int64] | Uint64s


def call_columns(number: int, *arguments: Column) -> Uint64s:
    """Rows of one system call, or of the C function at the address `number`: (n, 7).

    Each argument is a column or the same for all; a function takes integers and pointers.
    """
    count = max((len(column) for column in arguments if not isinstance(column, int)), default=1)
    rows = np.zeros((count, _ARGUMENTS), dtype=np.uint64)
    rows[:, 0] = number
    for index, column in enumerate(arguments, 1):
        rows[:, index] = column
    return rows


def run_calls(rows: Uint64s, *, native: bool = True) -> npt.NDArray[np.int64]:
    """Run each row's call, in order: int64, shape (n,), -errno if a system call fails.

    `rows`: uint64, shape (n, 7). All are run, even if some fail. Memory that the
    arguments point to must live until this returns. `native=False` does without
    the machine code.
    """
    table = call_table(rows)
    if len(table):
        run_table(table.ctypes.data, table.ctypes.data + table.nbytes, native=native)
    return table[:, _ARGUMENTS].view(np.int64).copy()


def require_done(results: npt.NDArray[np.int64], call: str) -> None:
    """Raise OSError, which names `call`, if any of the results is an error."""
    failed = results[results < 0]
    if len(failed):
        error = -int(failed[0])
        raise OSError(error, f"{call}: {os.strerror(error)}")


def call_table(rows: Uint64s) -> Uint64s:
    """The rows with a word for each result behind them: (n, 8)."""
    if rows.ndim != 2 or rows.shape[1] != _ARGUMENTS or rows.dtype != np.uint64:
        raise BorderError(f"calls of shape {rows.shape} and type {rows.dtype}")
    table = np.empty((len(rows), _ARGUMENTS + 1), dtype=np.uint64)
    table[:, :_ARGUMENTS] = rows
    return table


def run_table(first: int, behind: int, *, native: bool = True) -> None:
    """Run the rows of the table between these addresses, as `run_calls` does."""
    if not 0 < first <= behind or (behind - first) % ((_ARGUMENTS + 1) * 8):
        raise BorderError(f"a table from {first:#x} to {behind:#x}")
    loop = _loop() if native else None
    if loop is not None:
        loop(first, behind)
        return
    words = (ctypes.c_uint64 * ((behind - first) // 8)).from_address(first)
    table = np.ctypeslib.as_array(words).reshape(-1, _ARGUMENTS + 1)
    for row in table:
        row[_ARGUMENTS] = _call(row[:_ARGUMENTS].tolist()) & 0xFFFF_FFFF_FFFF_FFFF


def _call(row: list[int]) -> int:
    if row[0] >= _LEAST_ADDRESS:
        returned: int = _CFunction(row[0])(*row[1:])
        return returned
    result: int = _libc.syscall(*(ctypes.c_ulong(word) for word in row))
    return result if result >= 0 else -ctypes.get_errno()


@cache
def _loop() -> Callable[[int, int], None] | None:
    """The loop as a function, `None` if there is none."""
    address = loop_address()
    return None if address is None else _LoopFunction(address)


@cache
def loop_address() -> int | None:
    """The address of the loop's code, `None` if there is none."""
    return code_at(LOOP) if platform.machine() == "x86_64" else None


@cache
def code_at(code: bytes) -> int | None:
    """The address of this machine code, mapped for good and never writable; `None` if denied."""
    fd = os.memfd_create("vmdedup-loop", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, code, 0)
        mapped = mmap.mmap(fd, len(code), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
    except OSError:
        return None
    finally:
        os.close(fd)
    _kept.append(mapped)
    return int(np.frombuffer(mapped, dtype=np.uint8).ctypes.data)


_LoopFunction = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_size_t)
_kept: list[mmap.mmap] = []
"""The mapped code, kept: it must not be unmapped while a function points at it."""
