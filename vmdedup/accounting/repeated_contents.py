"""The most repeated contents of all merged pages, with descriptions.

Owns the reading of their store pages. Promises one page read for each row, and that the
result contains no guest bytes except the unit of a fill. If a store is gone or was replaced,
its rows have no description.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.core.content_kinds import describe
from vmdedup.guest.mapping_state import StoreId
from vmdedup.models import RepeatedContent
from vmdedup.store.stable_store import opened_store
from vmdedup.units import PAGE_BYTES

_MOST_ROWS = 12


@dataclass(frozen=True)
class Slots:
    """Store pages in use, one row each: number of the store, slot, number of the content."""

    store: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    content: npt.NDArray[np.int64]
    stores: tuple[StoreId, ...]


def repeated_contents(
    sites: Sequence[npt.NDArray[np.integer]], zero_pages: Sequence[int], slots: Slots
) -> list[RepeatedContent]:
    """Contents that several guest pages have, most pages first, zeroes among them.

    `sites[v]`: the row in `slots` of each merged page of VM v.
    """
    rows = []
    if sum(zero_pages):
        vms = sum(1 for pages in zero_pages if pages)
        rows.append(RepeatedContent(pages=sum(zero_pages), store_pages=0, vms=vms, what="zero"))
    if len(slots.slot):
        number, first, of_slot = np.unique(slots.content, return_index=True, return_inverse=True)
        per_vm = np.stack([np.bincount(of_slot[each], minlength=len(number)) for each in sites])
        pages = per_vm.sum(axis=0)
        store_pages = np.bincount(of_slot, minlength=len(number))
        vms_of = np.count_nonzero(per_vm, axis=0)
        for at in np.argsort(-pages, kind="stable")[:_MOST_ROWS]:
            if pages[at] < 2:
                break
            rows.append(
                RepeatedContent(
                    pages=int(pages[at]),
                    store_pages=int(store_pages[at]),
                    vms=int(vms_of[at]),
                    what=_what(slots, int(first[at])),
                )
            )
    return sorted(rows, key=lambda row: -row.pages)[:_MOST_ROWS]


def _what(slots: Slots, row: int) -> str | None:
    store = slots.stores[int(slots.store[row])]
    if store.path is None:
        return None
    try:
        with opened_store(store.path, store.device, store.inode) as fd:
            content = os.pread(fd, PAGE_BYTES, int(slots.slot[row]) * PAGE_BYTES)
    except OSError:
        return None
    return describe(np.frombuffer(content, dtype=np.uint8)) if len(content) == PAGE_BYTES else None
