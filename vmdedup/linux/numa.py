"""NUMA nodes of pages: the node of a page, and the node for new ones.

Owns the questions that `merge_across_nodes=0` raises, and moves of memory, asked of the
kernel each time: numa balancing moves pages, so no answer is kept. Promises that a
page that is not in memory, or the shared zero page, has `NO_NODE`. Changes
nothing in another process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmdedup.linux.syscalls import NR, syscall
from vmdedup.units import PAGE_BYTES

NO_NODE = -1

_NODES_WITH_MEMORY = Path("/sys/devices/system/node/has_memory")
"""Their numbers as a list of ranges: `0`, or `0-1,3`."""
_MPOL_DEFAULT = 0
_MPOL_PREFERRED = 1
"""Modes of set_mempolicy (include/uapi/linux/mempolicy.h)."""
_MOST_NODES = 1024
"""Bits of a node mask; CONFIG_NODES_SHIFT is at most 10."""


def nodes_of(pid: int, address: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The node of each page of process `pid`: int32, shape (n,).

    Uses move_pages(2) without target nodes, which only asks. Raises OSError
    (ESRCH: it ended, EPERM: it may not be traced).
    """
    address = np.ascontiguousarray(address, dtype=np.int64)
    status = np.full(len(address), NO_NODE, dtype=np.int32)
    if len(address):
        syscall(NR.MOVE_PAGES, pid, len(address), address.ctypes.data, 0, status.ctypes.data, 0)
    return np.maximum(status, NO_NODE)


def nodes_of_file(fd: int, page: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The node of each of these pages of a tmpfs file; they have to be allocated."""
    if not len(page):
        return np.empty(0, dtype=np.int32)
    length_bytes = (int(page.max()) + 1) * PAGE_BYTES
    with mmap.mmap(fd, length_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        content = np.frombuffer(view, dtype=np.uint8)
        base = content.ctypes.data
        touched = content[page * PAGE_BYTES]  # only a page that is mapped here has a node
        nodes = nodes_of(os.getpid(), base + page * PAGE_BYTES)
        del content, touched
    return nodes


def has_several_nodes() -> bool:
    """Whether this host has memory on more than one node."""
    try:
        nodes = _NODES_WITH_MEMORY.read_text().strip()
    except OSError:  # a kernel without NUMA
        return False
    return not nodes.isdigit()


@contextmanager
def allocating_on(node: int) -> Iterator[None]:
    """New pages of this thread come from `node` if it has any left; `NO_NODE` sets nothing."""
    if node == NO_NODE:
        yield
        return
    mask = (ctypes.c_ulong * (_MOST_NODES // 64))()
    mask[node // 64] = 1 << (node % 64)
    syscall(NR.SET_MEMPOLICY, _MPOL_PREFERRED, ctypes.addressof(mask), _MOST_NODES + 1)
    try:
        yield
    finally:
        syscall(NR.SET_MEMPOLICY, _MPOL_DEFAULT, 0, 0)
