"""Tables of our own system calls, by machine code and without."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from vmdedup.callloop import call_columns, run_calls
from vmdedup.syscalls import NR

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


def test_no_calls_are_no_results(native: bool) -> None:
    assert run_calls(np.empty((0, 7), dtype=np.uint64), native=native).tolist() == []
