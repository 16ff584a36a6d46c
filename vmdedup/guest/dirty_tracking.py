"""Dirty tracking: the pages that a guest wrote since the last look.

Owns a userfaultfd in asynchronous mode over a VM's regions, between sessions.
The kernel resolves its faults by itself (0.8 us a page and look).
PAGEMAP_SCAN takes and resets the set of written pages in one step.

Promises a hint, no more: DMA into pinned pages, hole punching and writes through
another mapping are missed, so bytes still decide at the gate. A mapping belongs
to one userfaultfd only: `handed_over` releases ranges for the time of a session
and takes them back. After a kill at any point the kernel lifts everything.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.sorting import page_runs, ranges
from vmdedup.core.window_schedule import WindowSchedule
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.pagemap import PRESENT, SWAPPED, Pagemap, PageRegions
from vmdedup.linux.userfaultfd import Userfault
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES, PAGE_SHIFT

_WINDOW_BYTES = HUGE_PAGE_BYTES
WINDOW_PAGES = _WINDOW_BYTES // PAGE_BYTES
"""Pages that are asked for together: the pages of one page table."""
_WINDOW_SHIFT = WINDOW_PAGES.bit_length() - 1
_NO_BREAKS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Written:
    """Pages written since they were last asked for, ascending, and their categories now.

    `page`: int64, shape (n,); `categories`: uint8, shape (n,), as `Pagemap.categories`.
    """

    page: npt.NDArray[np.int64]
    categories: npt.NDArray[np.uint8]


class DirtyTracking:
    """Tracks writes to all regions of one VM. Takes ownership of `userfault`.

    Raises OSError when the kernel cannot track one of the mappings.
    """

    def __init__(self, userfault: Userfault, pagemap: Pagemap, space: PageSpace) -> None:
        self._userfault = userfault
        self._pagemap = pagemap
        self._space = space
        windows = -(-space.region_pages // WINDOW_PAGES)
        self._first_window = np.cumsum(windows) - windows
        self._schedule = WindowSchedule(int(windows.sum()), turn=pagemap.pid)
        self.is_new = True
        """Whether nothing was asked yet: then the first answer reports every page that exists."""
        try:
            self._cover(space.spans())
        except BaseException:
            userfault.close()
            raise

    def close(self) -> None:
        """Stop tracking; lifts everything."""
        self._userfault.close()

    def _cover(self, spans: Sequence[tuple[int, int]]) -> None:
        self._userfault.register(spans)

    def take_written(self, *, everywhere: bool) -> Written | None:
        """Take and reset the pages written (or new) since the last call. `None` if passed over.

        Unless `everywhere` or new, windows are passed over now and then
        (`WindowSchedule`): walking a merged VM's page tables costs time for each mapping,
        however little of it was touched. A window passed over is reported at its next
        turn. A mapping that QEMU has just made, and that is not tracked yet, counts as
        written whole, and is tracked from now on.
        """
        due = self._schedule.next_round(everywhere=everywhere or self.is_new)
        self.is_new = False
        if not len(due):
            return None
        parts = [self._take(region, due) for region in range(len(self._first_window))]
        return Written(
            np.concatenate([part.page for part in parts]),
            np.concatenate([part.categories for part in parts]),
        )

    def _take(self, region: int, due: npt.NDArray[np.int64]) -> Written:
        """The pages written in the due windows of this region."""
        begin, end = self._space.span(region)
        window = due - self._first_window[region]
        inside = (window >= 0) & (window * _WINDOW_BYTES < end - begin)
        first, windows = page_runs(window[inside], _NO_BREAKS)
        start = begin + first * _WINDOW_BYTES
        stop = np.minimum(end, start + windows * _WINDOW_BYTES)
        found, refused = self._pagemap.written(start, stop)
        if refused.any():
            self._cover([(begin, end)])
            untracked = zip(start[refused].tolist(), stop[refused].tolist(), strict=True)
            whole = [self._pagemap.scan(*each, anyof=PRESENT | SWAPPED) for each in untracked]
            found = PageRegions.joined([found, *whole])
        pages = (found.end - found.start) >> PAGE_SHIFT
        page = ranges((found.start - begin) >> PAGE_SHIFT, pages)
        categories = np.repeat(found.categories.astype(np.uint8), pages)
        return Written(page + self._space.first_page[region], categories)

    def rounds(self, page: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Passes that the last `take_written` covered at each page; `0` if it passed over it."""
        return self._schedule.rounds[self._window(page)]

    def renew(self, page: npt.NDArray[np.int64]) -> None:
        """Make the windows of these pages young, as the pages were never looked at."""
        self._schedule.renew(self._window(page))

    def _window(self, page: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if len(self._first_window) == 1:
            return page >> _WINDOW_SHIFT
        region = self._space.region_of(page)
        within = (page - self._space.first_page[region]) >> _WINDOW_SHIFT
        return np.asarray(self._first_window[region] + within)

    @contextmanager
    def handed_over(self, spans: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Leave `spans` to another userfaultfd for the time of the block.

        Afterwards each page tracked again reads as written once.
        """
        self._userfault.unregister(spans)
        faults.reached("handed-over")
        try:
            yield
        finally:
            try:
                self._cover(self._space.spans())
            except OSError as error:
                # The memory is gone with its VM, or unplugged: the next look finds out.
                if error.errno not in (errno.ENOMEM, errno.ESRCH, errno.EINVAL):
                    raise
