"""Large folios that keep the old memory of merged pages from the host.

Unmapping a page of a large folio does not free it: the folio stays whole until it is split,
as long as another of its pages is mapped. Owns finding such folios of a VM, of any size and
any mapping, by their frames: the page table of 64 KiB folios looks like that of single
pages. Reads only; `remap.release` has them split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmdedup.core.rmap import OWN
from vmdedup.core.sorting import page_runs, ranges
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.kpageflags import PageFlags
from vmdedup.linux.pagemap import ENTRY_FILE, ENTRY_PRESENT, Pagemap, frames_of
from vmdedup.linux.proc_file import read_record
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES

_SIZES = Path("/sys/kernel/mm/transparent_hugepage")
MOST_FOLIO_PAGES = HUGE_PAGE_BYTES // PAGE_BYTES
"""Pages of a huge page; no folio of anonymous memory is larger."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KeptMemory:
    """Folios that still hold the old memory of merged pages; one row each, shape (n,)."""

    page: Int64s
    """A page of the VM that is still mapped from the folio."""
    pages: Int64s
    """Merged pages whose old memory is in the folio: so many pages are not free."""


NOTHING_KEPT = KeptMemory(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def suspects(page: Int64s, is_huge: npt.NDArray[np.bool_]) -> tuple[Int64s, int]:
    """The pages, of those just merged, that may have been part of a folio still whole.

    The second result is the most pages of such a folio. `is_huge`: whether each page was
    mapped as part of a huge page. Since Linux 6.12 the kernel counts the folios of the
    whole host that are mapped in part: mostly there is none.
    """
    # Sizes that only files have, such as 8 KiB, lack this count.
    counts = _SIZES.glob("hugepages-*/stats/nr_anon_partially_mapped")
    in_part = {_pages_of(path): int(read_record(path)) > 0 for path in counts}
    if in_part:
        most_pages = max((pages for pages, are in in_part.items() if are), default=0)
        return (page if most_pages else page[:0]), most_pages
    if any(map(_may_be_small, _SIZES.glob("hugepages-*"))):
        return page, MOST_FOLIO_PAGES
    return page[is_huge], MOST_FOLIO_PAGES


def _pages_of(path: Path) -> int:
    """Pages of a folio, by a path in its folder, such as `hugepages-64kB`."""
    name = next(part for part in path.parts if part.startswith("hugepages-"))
    return (int(name.removeprefix("hugepages-").removesuffix("kB")) << 10) // PAGE_BYTES


def _may_be_small(path: Path) -> bool:
    """Whether the kernel makes folios of this size, smaller than huge pages."""
    try:
        said = read_record(path / "enabled")
    except OSError:
        return False
    return _pages_of(path) < MOST_FOLIO_PAGES and "[never]" not in said


def kept_memory(
    pagemap: Pagemap, space: PageSpace, slot: npt.NDArray[np.int32], page: Int64s, most_pages: int
) -> KeptMemory | None:
    """The memory kept by folios of up to `most_pages` that had pages at or near these.

    `page`: ascending. `None` if frames may not be read. Raises VmGoneError.
    """
    if not len(page) or not most_pages:
        return NOTHING_KEPT
    near, frame = _own_near(pagemap, space, slot, page, most_pages)
    if not frame.all():
        return None
    frame, row = np.unique(frame, return_index=True)
    near = near[row]
    try:
        with PageFlags() as flags:
            is_large = flags.is_large(frame)
            near, frame = near[is_large], frame[is_large]
            around, folio = flags.folios(frame, most_pages)
    except OSError:
        return None
    return _kept(near, frame, around, folio, slot, space)


def still_kept(pagemap: Pagemap, space: PageSpace, kept: KeptMemory) -> KeptMemory:
    """The part of `kept` that is still kept after the folios were to be split."""
    order = np.argsort(kept.page)
    page, pages = kept.page[order], kept.pages[order]
    entries = pagemap.entries_of(space.hva(page), np.ones(len(page), dtype=np.int64))
    is_own = (entries & (ENTRY_PRESENT | ENTRY_FILE)) == ENTRY_PRESENT
    page, pages, frame = page[is_own], pages[is_own], frames_of(entries[is_own])
    order = np.argsort(frame)
    try:
        with PageFlags() as flags:
            whole = order[flags.is_large(frame[order])]
    except OSError:
        return NOTHING_KEPT
    return KeptMemory(page[whole], pages[whole])


def _own_near(
    pagemap: Pagemap, space: PageSpace, slot: npt.NDArray[np.int32], page: Int64s, most_pages: int
) -> tuple[Int64s, Int64s]:
    """The VM's own anonymous pages so near that they can be of one folio, and their frames."""
    start, length = page_runs(page, space.first_page)
    region = space.region_of(start)
    first = space.first_page[region]
    low = np.maximum(start - most_pages + 1, first)
    high = np.minimum(start + length + most_pages - 1, first + space.region_pages[region])
    is_apart = (low[1:] > high[:-1]) | (region[1:] != region[:-1])
    low, high = low[np.append(True, is_apart)], high[np.append(is_apart, True)]
    near = ranges(low, high - low)
    entries = pagemap.entries_of(space.hva(low), high - low)
    is_own = (entries & (ENTRY_PRESENT | ENTRY_FILE)) == ENTRY_PRESENT
    is_own &= slot[near] == OWN
    return near[is_own], frames_of(entries[is_own])


def _kept(
    near: Int64s,
    frame: Int64s,
    around: Int64s,
    folio: Int64s,
    slot: npt.NDArray[np.int32],
    space: PageSpace,
) -> KeptMemory:
    """The folios with merged pages; `frame` belongs to `near`, the number `folio` to `around`.

    A folio is mapped in the order of its frames, so one mapped page gives the places of all.
    """
    is_mapped = np.isin(around, frame, assume_unique=True)
    number, row = np.unique(folio[is_mapped], return_index=True)
    known_frame = around[is_mapped][row]
    known = near[np.searchsorted(frame, known_frame)]
    missing = ~is_mapped & np.isin(folio, number)
    at = np.searchsorted(number, folio[missing])
    place = known[at] + around[missing] - known_frame[at]
    region = space.region_of(known[at])
    is_merged = space.first_page[region] <= place
    is_merged &= place < space.first_page[region] + space.region_pages[region]
    is_merged[is_merged] = slot[place[is_merged]] != OWN
    pages = np.bincount(at[is_merged], minlength=len(number))
    keeps = pages > 0
    return KeptMemory(known[keeps], pages[keeps].astype(np.int64))
