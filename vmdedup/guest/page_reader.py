"""The contents of a VM's pages: their digests, with a copy or without; their equality with ours.

Owns the calls of a C function on each page right after it was copied, while it is still in
the L2 cache. The copies and calls for thousands of pages are one table
(`linux.syscall_batch`), so other threads run meanwhile. Promises the same as
`guest.vm_readv`: it sees the guest's own view and does not change the VM. The caller names
only pages that are present.

All functions also raise StuckError if a page does not come (`linux.bounded`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from vmdedup.core.sorting import breaks, lengths
from vmdedup.errors import BorderError
from vmdedup.guest.vm_readv import page_buffer, require_read
from vmdedup.linux import bounded
from vmdedup.linux.borders import require_inside, require_lengths
from vmdedup.linux.syscall_batch import Column, call_columns
from vmdedup.linux.syscalls import NR, iovecs
from vmdedup.units import MIB, PAGE_BYTES

_PIECE_PAGES = MIB // PAGE_BYTES
"""Pages copied at once: 1 MiB stays in the L2 cache."""
_TABLE_PAGES = 32 * _PIECE_PAGES
"""Pages in one table, which takes 64 bytes a page."""
_IOVEC_BYTES = 16
_INT_BITS = 0xFFFF_FFFF
"""The bits of a 64-bit register that hold a C int."""

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


def digests_at(vm: str, pid: int, address: Int64s, seed: int) -> tuple[Uint64s, Bools]:
    """Digests of the pages at these ascending addresses of process `pid`, and which are valid.

    XXH3-64 of each page; both results have shape (n,). A page that is not mapped has no
    valid digest. Raises VmGoneError when the process ended.
    """
    return _called_on(vm, pid, address, _digest_function(), PAGE_BYTES, seed)


def copies_at(
    vm: str, pid: int, address: Int64s, seed: int, copies: npt.NDArray[np.uint8]
) -> tuple[Uint64s, Bools]:
    """Like `digests_at`, and leaves the pages in `copies`, uint8 of shape (n, PAGE_BYTES).

    If a page could not be read, its copy and those behind it hold arbitrary bytes.
    """
    return _run_table(vm, pid, address, copies, _digest_function(), [PAGE_BYTES, seed])


def equal_at(vm: str, pid: int, address: Int64s, expected: Int64s) -> Bools:
    """Whether each page at these ascending addresses equals a page of our memory: (n,).

    `expected`: the addresses of our pages. A page that is not mapped equals nothing. Raises
    VmGoneError when the process ended.
    """
    difference, is_read = _called_on(vm, pid, address, _memcmp(), expected, PAGE_BYTES)
    return np.asarray(is_read & (difference & np.uint64(_INT_BITS) == 0))


def _called_on(
    vm: str, pid: int, address: Int64s, function: int, *arguments: Column
) -> tuple[Uint64s, Bools]:
    """The result of a C function for each page, and whether the page was read.

    The function's first argument is the address of the page's copy, `arguments` follow.
    """
    results = np.empty(len(address), dtype=np.uint64)
    is_read = np.empty(len(address), dtype=np.bool_)
    buffer = page_buffer(min(len(address), _PIECE_PAGES))
    for first in range(0, len(address), _TABLE_PAGES):
        part = slice(first, first + _TABLE_PAGES)
        some = [one if isinstance(one, int) else one[part] for one in arguments]
        results[part], is_read[part] = _run_table(vm, pid, address[part], buffer, function, some)
    return results, is_read


def _run_table(
    vm: str,
    pid: int,
    address: Int64s,
    buffer: npt.NDArray[np.uint8],
    function: int,
    arguments: Sequence[Column],
) -> tuple[Uint64s, Bools]:
    """Fill the buffer with one piece after the other, and call the function on each page."""
    if buffer.shape[1:] != (PAGE_BYTES,) or not buffer.flags.c_contiguous:
        raise BorderError(f"a buffer of shape {buffer.shape}")
    piece, place = np.divmod(np.arange(len(address)), len(buffer))
    begins = np.flatnonzero(breaks(address, PAGE_BYTES) | (place == 0))
    run_pages = lengths(begins, len(address))
    remote = iovecs(address[begins], run_pages * PAGE_BYTES)
    piece_pages = np.bincount(piece)
    require_lengths(piece_pages, len(address))
    require_inside(place, place + 1, 0, len(buffer))
    local = iovecs(buffer.ctypes.data, piece_pages * PAGE_BYTES)
    pieces = np.arange(len(piece_pages))
    first_run = np.searchsorted(piece[begins], pieces)
    read_row = pieces * (len(buffer) + 1)
    page_row = np.arange(1, len(address) + 1) + piece
    rows = np.empty((len(address) + len(pieces), 7), dtype=np.uint64)
    rows[read_row] = call_columns(
        NR.PROCESS_VM_READV,
        pid,
        local.ctypes.data + pieces * _IOVEC_BYTES,
        1,
        remote.ctypes.data + first_run * _IOVEC_BYTES,
        lengths(first_run, len(begins)),
    )
    rows[page_row] = call_columns(function, buffer.ctypes.data + place * PAGE_BYTES, *arguments)
    results = bounded.run(vm, pid, rows, local, remote, buffer, *arguments)
    copied_pages = require_read(vm, pid, results[read_row]) // PAGE_BYTES
    return results[page_row].view(np.uint64), place < copied_pages[piece]


@cache
def _memcmp() -> int:
    return _address(ctypes.CDLL(None).memcmp)


@cache
def _digest_function() -> int:
    """`XXH3_64bits_withSeed(data, size, seed)` of the xxhash package.

    The package's extension module contains that library and exports its functions. If a
    build does not, Python digests page by page, which takes several times as long.
    """
    library = ctypes.CDLL(getattr(sys.modules.get("xxhash._xxhash"), "__file__", None))
    for name in ("XXH3_64bits_withSeed_dispatch", "XXH3_64bits_withSeed"):
        if (function := getattr(library, name, None)) is not None:
            return _address(function)
    return _address(_asking_python)


def _digest_by_python(data: int, size: int, seed: int) -> int:
    return xxh3_64_intdigest((ctypes.c_char * size).from_address(data), seed)


_asking_python = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
)(_digest_by_python)


def _address(function: ctypes._FuncPointer) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None, "no function stands at 0"
    return address
