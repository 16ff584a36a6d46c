"""The result that KSM would reach on given contents, by the rules of `mm/ksm.c` (6.18).

Pure. Owns the rule of `max_page_sharing`: a KSM page has at most so many mappings. Pages
beyond that wait until two of them can make a further KSM page of the same content (a
"dup" of a chain), so a single one stays as it is. Promises the state after KSM has scanned
contents that hold still; KSM never merges a page that changes between two scans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.sorting import stable_sort

RMAP_ITEM_BYTES = 64
"""struct ksm_rmap_item: KSM keeps one for each page that it scans."""


def ksm_sites(
    digests: Sequence[NDArray[np.uint64]], max_page_sharing: int
) -> list[NDArray[np.int64]]:
    """For each VM the number of the KSM page behind each of its pages that are merged.

    `digests`: of all pages that KSM scans, by VM; equal digests are equal contents. KSM
    knows no trust domains: pages of all VMs are compared with each other.
    """
    every = np.concatenate([np.empty(0, dtype=np.uint64), *digests])
    order, ordered = stable_sort(every)
    at = np.arange(len(ordered))
    begins = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    rank = at - np.maximum.accumulate(np.where(begins, at, 0))
    node = np.cumsum(rank % max_page_sharing == 0) - 1
    is_shared = np.bincount(node)[node] > 1 if len(node) else begins
    vm = np.repeat(np.arange(len(digests)), [len(each) for each in digests])[order]
    return [node[is_shared & (vm == number)] for number in range(len(digests))]
