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
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.pagemap import HUGE
from vmdedup.units import PAGE_SHIFT


def blocks_of(space: PageSpace) -> Blocks:
    """The blocks of a VM's page space, as its addresses have them."""
    lead = (space.address >> PAGE_SHIFT) % BLOCK_PAGES
    return Blocks(space.first_page, lead, space.pages)


def huge_blocks(blocks: Blocks, categories: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which blocks are huge pages, by the categories that PAGEMAP_SCAN gave each page."""
    return blocks.full(categories & HUGE != 0)
