"""Tables of our own system calls, by machine code and without."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from vmdedup.linux.syscall_batch import call_columns, run_calls
from vmdedup.linux.syscalls import NR

pytestmark = [pytest.mark.process, pytest.mark.parametrize("native", [True, False])]


def test_calls_run_in_order_and_give_what_the_kernel_gives(native: bool) -> None:
    own = call_columns(NR.GETPID)
    fd = os.memfd_create("calls")
    close = call_columns(NR.CLOSE, np.array([fd, fd, 1 << 30]))
    results = run_calls(np.concatenate([own, close, own]), native=native)
    bad = -errno.EBADF
    assert results.tolist() == [os.getpid(), 0, bad, bad, os.getpid()]


def test_all_arguments_arrive(native: bool, tmp_path: Path) -> None:
    """Six of them: pieces of a file mapped at addresses of our choice show what they should."""
    pages = 100
    content = np.repeat(np.arange(pages, dtype=np.uint8), 4096)
    path = tmp_path / "pages"
    content.tofile(path)
    index = np.random.default_rng(7).permutation(pages)
    with path.open("rb") as file:
        fd = file.fileno()
        room = int(run_calls(call_columns(NR.MMAP, 0, pages * 4096, 0, 0x22, -1 % 2**64, 0))[0])
        rows = call_columns(
            NR.MMAP, room + np.arange(pages) * 4096, 4096, 1, 0x12, fd, index * 4096
        )
        assert run_calls(rows, native=native).tolist() == rows[:, 1].tolist()
    seen = np.empty(pages * 4096, dtype=np.uint8)
    read = os.preadv(os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC), [seen.data], room)
    assert read == seen.nbytes
    assert seen[::4096].tolist() == index.tolist()
    assert run_calls(call_columns(NR.MUNMAP, room, pages * 4096))[0] == 0


def test_functions_are_called_among_system_calls(native: bool) -> None:
    """With all six arguments, and they leave alone what the loop needs."""
    libc = ctypes.CDLL(None)
    mmap, memcmp = (ctypes.cast(one, ctypes.c_void_p).value for one in (libc.mmap, libc.memcmp))
    assert mmap is not None
    assert memcmp is not None
    fd = os.memfd_create("functions")
    os.pwrite(fd, b"abc" * 4096, 0)
    text = np.frombuffer(b"abcabdabc", dtype=np.uint8)
    at = text.ctypes.data
    mapped = run_calls(call_columns(mmap, 0, 4096, 1, 2, fd, 8192), native=native)
    seen = ctypes.string_at(int(mapped[0]), 3)
    rows = [
        call_columns(memcmp, at, at + np.array([6, 3]), 3),
        call_columns(NR.MUNMAP, mapped, 4096),
        call_columns(NR.CLOSE, np.array([fd, fd])),
        call_columns(memcmp, at, int(at), 9),
    ]
    results = run_calls(np.concatenate(rows), native=native)
    assert seen == (b"abc" * 4096)[8192:8195]
    assert (results & 0xFFFF_FFFF != 0).tolist() == [False, True, False, False, True, False]
    assert results[3:5].tolist() == [0, -errno.EBADF]


def test_no_calls_are_no_results(native: bool) -> None:
    assert run_calls(np.empty((0, 7), dtype=np.uint64), native=native).tolist() == []
