"""A stable sort order of 64-bit digests, about ten times numpy's own speed.

Owns one function that the unstable tree, the stable tree and the census share.
Promises exactly `numpy.argsort(values, kind="stable")`.

numpy sorts plain uint64 values with vector instructions, but argsorts them
stably by merging. So each value's low bits are replaced by its index, the packed
values are sorted, and the indices read off: equal values come out in index
order. Digests that agree in all the remaining high bits may come out swapped;
for random digests that is a handful of pages, which are put right afterwards
(for values that all agree there, that repair is the ordinary argsort).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stable_order(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Indices (int64) that sort `values` (uint64, 1-D), ties in index order."""
    count = len(values)
    if count < 2:
        return np.arange(count, dtype=np.int64)
    index_mask = np.uint64((1 << (count - 1).bit_length()) - 1)
    packed = (values & ~index_mask) | np.arange(count, dtype=np.uint64)
    packed.sort()
    order = (packed & index_mask).astype(np.int64)
    ordered = values[order]
    if np.any(ordered[1:] < ordered[:-1]):
        packed &= ~index_mask
        _repair(order, ordered, packed)
    return order


def _repair(
    order: NDArray[np.int64], ordered: NDArray[np.uint64], high: NDArray[np.uint64]
) -> None:
    """Sort, in place, the blocks of equal high bits that hold several values."""
    same_block = high[1:] == high[:-1]
    block = np.concatenate(([0], np.cumsum(~same_block)))
    mixed = np.zeros(int(block[-1]) + 1, dtype=np.bool_)
    mixed[block[1:][same_block & (ordered[1:] != ordered[:-1])]] = True
    at = np.flatnonzero(mixed[block])
    # Blocks stand in the order of their high bits, so sorting all mixed blocks
    # together keeps each value inside its own block.
    order[at] = order[at][np.argsort(ordered[at], kind="stable")]
