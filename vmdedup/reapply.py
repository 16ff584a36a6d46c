"""What QEMU had set on a piece of guest RAM, to be set again on its new mapping.

Owns the calls that follow a remap in the same batch: the madvise flags and the
NUMA policy of the backend. A fresh mapping has none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.attach.ranges import Region
from vmdedup.syscalls import NR

MADV_DONTFORK = 10
MADV_MERGEABLE = 12
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16

_ADVICE_OF_FLAG = {
    "dc": MADV_DONTFORK,
    "dd": MADV_DONTDUMP,
    "hg": MADV_HUGEPAGE,
    "nh": MADV_NOHUGEPAGE,
    "mg": MADV_MERGEABLE,
}
"""VmFlags of a mapping (Documentation/filesystems/proc.rst) and the madvise that sets them."""

STORE_FLAGS = frozenset({"dc", "dd"})
"""What a mapping of the store is given: it is neither huge nor for KSM."""

_MPOL = {"preferred": 1, "bind": 2, "interleave": 3}
"""QEMU's names of NUMA policies and the kernel's modes (include/uapi/linux/mempolicy.h)."""
_MOST_NODES = 64

MOST_CALLS = len(_ADVICE_OF_FLAG) + 2
"""Calls that re-applying adds to a batch."""


@dataclass(frozen=True)
class Reapply:
    """Flags and NUMA policy of one region."""

    advices: tuple[int, ...]
    numa_mode: int
    """0: the process' own policy, nothing to set."""
    node_mask: int

    @classmethod
    def of(cls, region: Region, flags: Iterable[str]) -> Reapply:
        """What `region` needs, of the VmFlags that it had."""
        nodes = [node for node in region.host_nodes if node < _MOST_NODES]
        return cls(
            advices=tuple(_ADVICE_OF_FLAG[flag] for flag in _ADVICE_OF_FLAG if flag in set(flags)),
            numa_mode=_MPOL.get(region.policy, 0) if nodes else 0,
            node_mask=sum(1 << node for node in nodes),
        )

    def calls(
        self, start: int, end: int, first_row: int, row_address: Callable[[int], int]
    ) -> npt.NDArray[np.uint64]:
        """Calls for [start, end), to stand in a batch from row `first_row` on.

        mbind reads its node mask from memory of the process it runs in: an argument
        that getpid ignores, in the row before, is such memory (`row_address`).
        """
        rows: list[tuple[int, ...]] = [
            (NR.MADVISE, start, end - start, advice, 0, 0, 0) for advice in self.advices
        ]
        if self.numa_mode:
            mask_address = row_address(first_row + len(rows)) + _ARGUMENT_BYTES
            rows.append((NR.GETPID, self.node_mask, 0, 0, 0, 0, 0))
            rows.append(
                (NR.MBIND, start, end - start, self.numa_mode, mask_address, _MOST_NODES + 1, 0)
            )
        return np.array(rows, dtype=np.uint64).reshape(-1, 7)


_ARGUMENT_BYTES = 8
