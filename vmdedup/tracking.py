"""Change tracking: which pages a guest wrote since the last look.

Owns a userfaultfd in asynchronous mode over a VM's regions, between sessions.
The kernel resolves its faults by itself (0.8 us a page and look), and
PAGEMAP_SCAN takes and resets the set of written pages in one step.

Promises a hint, no more: DMA into pinned pages, hole punching and writes through
another mapping are missed, so bytes still decide at the gate. A mapping belongs
to one userfaultfd only: `handed_over` lets go of ranges for the time of a
session and takes them back. Killed at any point: the kernel lifts everything.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.smart_scan import ScanAges
from vmdedup.memory.space import PageSpace
from vmdedup.memory.userfault import Userfault
from vmdedup.procfs.pagemap import PRESENT, SWAPPED, Pagemap
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES, PAGE_SHIFT

_WINDOW_BYTES = HUGE_PAGE_BYTES
WINDOW_PAGES = _WINDOW_BYTES // PAGE_BYTES
"""Pages that are asked for together: those of one page table."""
_BRIDGED_WINDOWS = 3
"""Between two that are due are asked for along with them: walking them is less than a call."""


@dataclass(frozen=True)
class Written:
    """Pages written since they were last asked for, ascending, and what they are now.

    `page`: int64, shape (n,); `categories`: uint8, shape (n,), as `Pagemap.categories`.
    """

    page: npt.NDArray[np.int64]
    categories: npt.NDArray[np.uint8]

    @classmethod
    def nothing(cls) -> Written:
        """No page."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint8))


class ChangeTracker:
    """Tracks writes to all regions of one VM. Takes ownership of `userfault`.

    Raises OSError when the kernel can not track one of the mappings.
    """

    def __init__(self, userfault: Userfault, pagemap: Pagemap, space: PageSpace) -> None:
        self._userfault = userfault
        self._pagemap = pagemap
        self._space = space
        self._ages = [ScanAges(-(-pages // WINDOW_PAGES)) for pages in space.region_pages.tolist()]
        try:
            self._cover(space.spans())
        except BaseException:
            userfault.close()
            raise

    def close(self) -> None:
        """Stop tracking; lifts everything."""
        self._userfault.close()

    def _cover(self, spans: Sequence[tuple[int, int]]) -> None:
        for start, end in spans:
            self._userfault.register(start, end)

    def take_written(self, *, everywhere: bool) -> Written:
        """What was written (or is new) since the last call; resets it.

        Unless `everywhere`, windows that nobody wrote to are passed over now and then,
        on the schedule of smart scan: what a merged VM's page tables cost to walk is
        its mappings, and most of them are never touched. What is passed over is told
        of when its window's turn comes. A mapping that is not tracked, as QEMU has
        just made it, counts as written whole, and is tracked from now on.
        """
        found = [Written.nothing()]
        for region, ages in enumerate(self._ages):
            every_window = np.arange(len(ages))
            due = every_window[ages.visit(every_window, smart=not everywhere)]
            found += [
                self._take(region, first, windows) for first, windows in _joined(due).tolist()
            ]
        return Written(
            np.concatenate([part.page for part in found]),
            np.concatenate([part.categories for part in found]),
        )

    def _take(self, region: int, first_window: int, windows: int) -> Written:
        """What was written in these windows of a region, which are young again then."""
        begin, end = self._space.span(region)
        start = begin + first_window * _WINDOW_BYTES
        end = min(end, start + windows * _WINDOW_BYTES)
        try:
            found = self._pagemap.written(start, end)
        except PermissionError:
            self._cover([(begin, end)])
            found = self._pagemap.scan(start, end, anyof=PRESENT | SWAPPED)
        first = (found.start - begin) >> PAGE_SHIFT
        pages = (found.end - found.start) >> PAGE_SHIFT
        page = np.repeat(first - np.cumsum(pages) + pages, pages) + np.arange(int(pages.sum()))
        window = page // WINDOW_PAGES
        self._ages[region].restart(window[np.diff(window, prepend=-1) != 0])
        return Written(
            page + self._space.first_page[region],
            np.repeat(found.categories, pages).astype(np.uint8),
        )

    @contextmanager
    def handed_over(self, spans: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Leave `spans` to another userfaultfd for the time of the block.

        What is tracked again afterwards reads as written once.
        """
        for start, end in spans:
            self._userfault.unregister(start, end)
        faults.reached("handed-over")
        try:
            yield
        finally:
            try:
                self._cover(self._space.spans())
            except OSError as error:
                # Gone with its VM, or unplugged: the next look finds out.
                if error.errno not in (errno.ENOMEM, errno.ESRCH, errno.EINVAL):
                    raise


def _joined(window: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ascending windows as (first, windows) rows over narrow gaps: int64, shape (n, 2)."""
    if not len(window):
        return np.empty((0, 2), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(window) > _BRIDGED_WINDOWS)
    first = window[np.append(0, breaks + 1)]
    last = window[np.append(breaks, len(window) - 1)]
    return np.column_stack((first, last - first + 1))
