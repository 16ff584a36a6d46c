"""Setting QEMU's madvise flags and NUMA policy again on new mappings of guest RAM.

Owns the calls that follow a remap in the same batch, for the flags and the policy of the
backend. A fresh mapping has none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.attach.ranges import Region
from vmdedup.linux import mman
from vmdedup.linux.syscall_batch import call_columns
from vmdedup.linux.syscalls import NR

Addresses = npt.NDArray[np.int64] | npt.NDArray[np.uint64]

_ADVICE_OF_FLAG = {
    "dc": mman.MADV_DONTFORK,
    "dd": mman.MADV_DONTDUMP,
    "hg": mman.MADV_HUGEPAGE,
    "nh": mman.MADV_NOHUGEPAGE,
    "mg": mman.MADV_MERGEABLE,
}
"""VmFlags of a mapping (Documentation/filesystems/proc.rst) and the madvise that sets them."""

STORE_FLAGS = frozenset({"dc", "dd"})
"""Flags that our own mappings get: they are neither huge (`small_pages`) nor for KSM."""

_MPOL = {"preferred": 1, "bind": 2, "interleave": 3}
"""QEMU's names of NUMA policies and the kernel's modes (include/uapi/linux/mempolicy.h)."""
_MOST_NODES = 64


@dataclass(frozen=True)
class Reapply:
    """Flags and NUMA policy of one region."""

    advices: tuple[int, ...]
    numa_mode: int
    """The kernel's mode of the policy; `0`: the process' own policy, nothing to set."""
    node_mask: int

    @classmethod
    def of(cls, region: Region, flags: Iterable[str]) -> Reapply:
        """What `region` needs, given the VmFlags that it had."""
        nodes = [node for node in region.host_nodes if node < _MOST_NODES]
        return cls(
            advices=tuple(_ADVICE_OF_FLAG[flag] for flag in _ADVICE_OF_FLAG if flag in set(flags)),
            numa_mode=_MPOL.get(region.policy, 0) if nodes else 0,
            node_mask=sum(1 << node for node in nodes),
        )

    @property
    def calls_a_range(self) -> int:
        """Number of calls for each range, besides the one call that all ranges share."""
        return len(self.advices) + bool(self.numa_mode)

    def calls(
        self, start: Addresses, end: Addresses, first_row: int, row_address: Callable[[int], int]
    ) -> npt.NDArray[np.uint64]:
        """Calls for ranges of addresses, for a batch's rows from `first_row` on.

        mbind reads its node mask from memory of the process it runs in. The mask is put into
        an argument that getpid ignores, in the first row (`row_address`).
        """
        length = end - start
        parts = [call_columns(NR.MADVISE, start, length, advice) for advice in self.advices]
        if self.numa_mode:
            mask_address = row_address(first_row) + _ARGUMENT_BYTES
            mask = call_columns(NR.GETPID, np.array([self.node_mask], dtype=np.uint64))
            bound = (start, length, self.numa_mode, mask_address, _MOST_NODES + 1)
            parts = [mask, *parts, call_columns(NR.MBIND, *bound)]
        return np.concatenate([np.empty((0, 7), dtype=np.uint64), *parts])


_ARGUMENT_BYTES = 8

NOTHING = call_columns(NR.GETPID)
"""A call that does nothing."""
SETTINGS = (NR.MADVISE, NR.GETPID, NR.MBIND)
"""The calls of this module."""


def settings_within(
    calls: npt.NDArray[np.uint64], start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """A batch's settings alone, cut to where these ranges lie; other rows do nothing.

    The ranges are apart, in any order. Each call keeps its row: mbind reads its nodes from
    another one. A setting of several ranges also covers what lies between them.
    """
    start, end = np.sort(start), np.sort(end)
    low = calls[:, 1].astype(np.int64)
    high = low + calls[:, 2].astype(np.int64)
    first = np.searchsorted(end, low, side="right")
    last = np.searchsorted(start, high, side="left") - 1
    applies = np.isin(calls[:, 0], (NR.MADVISE, NR.MBIND)) & (first <= last)
    within = calls.copy()
    within[~applies & (calls[:, 0] != NR.GETPID)] = NOTHING
    low = np.maximum(low[applies], start[first[applies]])
    within[applies, 1] = low
    within[applies, 2] = np.minimum(high[applies], end[last[applies]]) - low
    return within
