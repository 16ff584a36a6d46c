"""The huge pages of a VM's RAM, by its page tables.

Owns the way from the categories of pages to blocks of 2 MiB. A block is a huge page while
one entry of the page table maps all of it: PAGEMAP_SCAN tells so for each page
(PAGE_IS_HUGE, Linux 6.7). Refuses to guess: raw entries of older kernels do not tell, then
nothing is known. Reads nothing itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmdedup.core.huge_pages import BLOCK_PAGES, Blocks
from vmdedup.core.rmap import OWN
from vmdedup.guest.mapping_state import MappingState
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.pagemap import HUGE, Pagemap
from vmdedup.units import PAGE_SHIFT


def blocks_of(space: PageSpace) -> Blocks:
    """The blocks of a VM's page space, as its addresses have them."""
    lead = (space.address >> PAGE_SHIFT) % BLOCK_PAGES
    return Blocks(space.first_page, lead, space.pages)


def huge_mask(pagemap: Pagemap, state: MappingState) -> npt.NDArray[np.bool_] | None:
    """Which pages are mapped as part of a huge page; `None` if this kernel does not tell."""
    return _are_huge(state, slice(None)) if pagemap.use_scan else None


def huge_among(
    pagemap: Pagemap, blocks: Blocks, state: MappingState, page: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The huge pages that these pages are in, each once; none if this kernel does not tell."""
    block = np.unique(blocks.of(page))
    if not pagemap.use_scan or not len(block):
        return block[:0]
    inside, begin = blocks.pages(block)
    return np.asarray(block[np.logical_and.reduceat(_are_huge(state, inside), begin)])


def count_split(blocks: Blocks, state: MappingState, block: npt.NDArray[np.int64]) -> int:
    """How many of these blocks, huge pages before, still have pages of the VM's own."""
    if not len(block):
        return 0
    inside, begin = blocks.pages(block)
    return int(np.count_nonzero(np.logical_or.reduceat(state.slot[inside] == OWN, begin)))


def huge_blocks(
    pagemap: Pagemap, blocks: Blocks, state: MappingState
) -> npt.NDArray[np.bool_] | None:
    """Which blocks are huge pages; `None` if this kernel does not tell."""
    mask = huge_mask(pagemap, state)
    return None if mask is None else blocks.full(mask)


def _are_huge(state: MappingState, page: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether each of these pages is the VM's own, and part of a huge page."""
    return np.asarray((state.categories[page] & HUGE != 0) & (state.slot[page] == OWN))
