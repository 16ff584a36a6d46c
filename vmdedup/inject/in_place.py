"""Pages of a VM read in place: digested and compared by QEMU's own borrowed thread.

Owns the rows that make the loop stub do it, and the part of the scratch memory they work
in. A page is then read once, from memory into a register. That takes a quarter of the time
of copying it out of the process first (process_vm_readv pins the page, and writes a copy).

SAFETY: a fault of these reads is the process's own. So they may name only pages in memory,
and only of mappings where a page discarded meanwhile reads as zeroes or as a new page
(`reads_safely`): private anonymous memory, memfds, the store. Never a file of a
filesystem that can be full or fail: that would be a SIGBUS in QEMU. No RAM block can be
unmapped meanwhile, since only QEMU's RCU thread unmaps them, and that thread does the
reading. Once it stands still, `RemoteThread.require_there` checks that none was unmapped
before. Memory that is known to be broken is no longer in the page tables. Memory that breaks
at that very moment ends the VM, as when the guest reads it (copied out, it would end the host).
Only results are written, in scratch memory. Killed at any point: the launched rows run to
their end, and the thread is as it was (see `stub`).

Promises the same numbers as `core.digest` and a comparison of copies.

JUSTIFICATION beside copies (`guest.page_reader`): a first merge of four frozen Debian guests
takes 15% more time and 21% more CPU without it (`python -m tests.benchmark.ways`, medians of
7 turns). Who waits for a merge, and guests that need the processors, lose without it. Copies
stay for RAM files that may fail, and for processes that allow no executable memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vmdedup.core.sorting import lengths, ranges
from vmdedup.inject.remote import RemoteThread
from vmdedup.inject.stub import COMPARE, DIGEST
from vmdedup.linux.borders import require_lengths, require_runs
from vmdedup.linux.filesystems import UNLIMITED
from vmdedup.units import PAGE_BYTES

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

Run = Callable[[Uint64s, Int64s], Int64s]
"""Runs rows (n, 7) on the borrowed thread; results (n,), negative for rows that were not run.

The second argument: the ascending addresses that they read, all of which must be mapped.
"""

_MOST_DIGESTED_PAGES = 512
"""Most pages digested by one row; a cancelled batch still ends the row that it has begun."""
_MOST_COMPARED_PAGES = 63
"""Most pages compared by one row: one bit for each in a result that is not negative."""

# Byte offsets in the workspace of the scratch memory.
_ZERO_PAGE, _SECRET, _DIGESTS = 0, PAGE_BYTES, 2 * PAGE_BYTES
_BATCH_PAGES = 16384
"""Most pages of one batch, whose digests have room. It takes some three milliseconds, at a
priority above ordinary threads."""
WORKSPACE_BYTES = _DIGESTS + _BATCH_PAGES * 8

_SECRET_DEFAULT = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578"
    "825ad07dccff7221b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea3"
    "71644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931"
    "c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""XXH3_kSecret (xxhash.h)."""
_FIRST_ACCUMULATORS = (
    0xC2B2AE3D,
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x85EBCA77,
    0x27D4EB2F165667C5,
    0x9E3779B1,
)
"""XXH3_INIT_ACC (xxhash.h)."""


def reads_safely(filesystem: str) -> bool:
    """Whether a region whose RAM file lies there ("" for none) may be read in place."""
    return filesystem in UNLIMITED


def digests_in_place(remote: RemoteThread, run: Run, address: Int64s, seed: int) -> Uint64s:
    """Digests of the present pages at these ascending addresses: uint64, (n,).

    XXH3-64 of each page. Raises as `run`, and InjectionError if not all rows were run.
    """
    start, pages = _pieces(address, _MOST_DIGESTED_PAGES, address)
    area = remote.workspace[0]
    secret = _secret(seed)
    remote.workspace[1][_SECRET : _SECRET + len(secret)] = secret
    found = np.empty(len(address), dtype=np.uint64)
    done = 0
    require_runs(start, pages)
    for part in _batches(pages, remote.max_calls):
        require_lengths(pages[part], _BATCH_PAGES)
        until = np.cumsum(pages[part])
        rows = np.zeros((len(until), 7), dtype=np.uint64)
        rows[:, 0] = DIGEST & 0xFFFF_FFFF_FFFF_FFFF
        rows[:, 1] = start[part]
        rows[:, 2] = pages[part]
        rows[:, 3] = area + _DIGESTS + (until - pages[part]) * 8
        rows[:, 4] = area + _SECRET
        if (run(rows, start[part]) < 0).any():
            raise remote.error("it was to read pages, and ended early", started=True)
        count = int(until[-1])
        digests = remote.workspace[1][_DIGESTS : _DIGESTS + count * 8]
        found[done : done + count] = digests.view(np.uint64)
        del digests  # the scratch memory could not be closed
        done += count
    return found


def differ_in_place(remote: RemoteThread, run: Run, address: Int64s, other: Int64s) -> Bools:
    """Which pages at these ascending addresses differ from the `other` ones in QEMU: (n,).

    An `other` of `0` stands for a page of zeroes. A page that was not compared counts as
    different. Raises as `run`.
    """
    start, pages = _pieces(address, _MOST_COMPARED_PAGES, other)
    require_runs(start, pages)
    require_lengths(pages, len(address))
    first = other[np.cumsum(pages) - pages]
    zero_page = remote.workspace[0] + _ZERO_PAGE
    rows = np.zeros((len(start), 7), dtype=np.uint64)
    rows[:, 0] = COMPARE & 0xFFFF_FFFF_FFFF_FFFF
    rows[:, 1] = start
    rows[:, 2] = np.where(first == 0, zero_page, first)
    rows[:, 3] = pages
    rows[:, 4] = np.where(first == 0, 0, PAGE_BYTES)
    masks = np.empty(len(start), dtype=np.int64)
    for part in _batches(pages, remote.max_calls):
        masks[part] = run(rows[part], start[part])
    # A negative result stands for a row that was not run: all its pages count as different.
    masks[masks < 0] = -1
    bit = ranges(np.zeros_like(pages), pages)
    return np.asarray((np.repeat(masks, pages) >> bit) & 1 != 0)


def _pieces(address: Int64s, most_pages: int, other: Int64s) -> tuple[Int64s, Int64s]:
    """Pages that follow each other in both columns (or are all `0` in `other`): (start, pages)."""
    step = np.diff(other)
    follows = (np.diff(address) == PAGE_BYTES) & (
        (step == PAGE_BYTES) | ((step == 0) & (other[1:] == 0))
    )
    begins = np.flatnonzero(np.concatenate([[True], ~follows]))
    length = lengths(begins, len(address))
    pieces = -(-length // most_pages)
    offset = ranges(np.zeros_like(pieces), pieces) * most_pages
    pages = np.minimum(np.repeat(length, pieces) - offset, most_pages)
    return address[np.repeat(begins, pieces) + offset], pages


def _batches(pages: Int64s, most_rows: int) -> Iterator[slice]:
    """Rows of pieces for one batch after another."""
    pages_until = np.cumsum(pages)
    first = before = 0
    while first < len(pages):
        last = int(np.searchsorted(pages_until, before + _BATCH_PAGES, side="right"))
        last = min(last, first + most_rows)
        yield slice(first, last)
        first, before = last, int(pages_until[last - 1])


@lru_cache(maxsize=16)
def _secret(seed: int) -> npt.NDArray[np.uint8]:
    """The secret of XXH3_initCustomSecret, followed by the accumulators."""
    words = np.frombuffer(_SECRET_DEFAULT, dtype=np.uint64).copy()
    words[0::2] += np.uint64(seed)
    words[1::2] -= np.uint64(seed)
    accumulators = np.array(_FIRST_ACCUMULATORS, dtype=np.uint64)
    return np.concatenate([words, accumulators]).view(np.uint8)
