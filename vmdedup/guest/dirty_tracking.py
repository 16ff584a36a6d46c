"""Dirty tracking: the pages that a guest wrote since the last look.

Owns a userfaultfd in asynchronous mode over a VM's regions, between sessions.
The kernel resolves its faults by itself (0.8 us a page and look).
PAGEMAP_SCAN takes and resets the set of written pages in one step.

Protecting a huge page would split it at the guest's next write. So windows that are huge
pages may be left alone: each time they are asked for they count as written whole.

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
        first = np.repeat(space.first_page - self._first_window * WINDOW_PAGES, windows)
        self._window_start = first + np.arange(len(first)) * WINDOW_PAGES
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

    def take_written(
        self,
        *,
        everywhere: bool,
        huge: npt.NDArray[np.bool_] | None = None,
        hurry: bool = False,
    ) -> Written | None:
        """Take and reset the pages written (or new) since the last call. `None` if passed over.

        Unless `everywhere` or new, windows are passed over now and then
        (`WindowSchedule`): walking a merged VM's page tables costs time for each mapping,
        however little of it was touched. A window passed over is reported at its next
        turn. A mapping that QEMU has just made, and that is not tracked yet, counts as
        written whole, and is tracked from now on.

        `huge`: for each page whether it is part of a huge page that is to stay whole. Windows
        of such pages alone are not protected, so they count as written whole. They are asked
        for more rarely still, also if `everywhere`, unless `hurry`.
        """
        alone = None if huge is None else np.logical_and.reduceat(huge, self._window_start)
        due = self._schedule.next_round(
            everywhere=everywhere or self.is_new, slow=None if hurry or self.is_new else alone
        )
        self.is_new = False
        if not len(due):
            return None
        left_alone = due[:0] if alone is None else due[alone[due]]
        tracked = due if alone is None else due[~alone[due]]
        regions = range(len(self._first_window))
        parts = [self._take(region, tracked, left_alone) for region in regions]
        return Written(
            np.concatenate([part.page for part in parts]),
            np.concatenate([part.categories for part in parts]),
        )

    def _spans(
        self, region: int, window: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The addresses (start, end) of those of these windows that are in this region."""
        begin, end = self._space.span(region)
        window = window - self._first_window[region]
        inside = (window >= 0) & (window * _WINDOW_BYTES < end - begin)
        first, windows = page_runs(window[inside], _NO_BREAKS)
        start = begin + first * _WINDOW_BYTES
        return start, np.minimum(end, start + windows * _WINDOW_BYTES)

    def _take(
        self, region: int, tracked: npt.NDArray[np.int64], left_alone: npt.NDArray[np.int64]
    ) -> Written:
        """The pages of this region written in `tracked` windows, and all that are left alone."""
        begin, end = self._space.span(region)
        start, stop = self._spans(region, tracked)
        found, refused = self._pagemap.written(start, stop)
        if refused.any():
            self._cover([(begin, end)])
            untracked = zip(start[refused].tolist(), stop[refused].tolist(), strict=True)
            whole = [self._pagemap.scan(*each, anyof=PRESENT | SWAPPED) for each in untracked]
            found = PageRegions.joined([found, *whole])
        if len(left_alone):
            present = self._pagemap.present(*self._spans(region, left_alone))
            found = PageRegions.joined([found, present])
        pages = (found.end - found.start) >> PAGE_SHIFT
        page = ranges((found.start - begin) >> PAGE_SHIFT, pages)
        categories = np.repeat(found.categories.astype(np.uint8), pages)
        return Written(page + self._space.first_page[region], categories)

    def leave_alone(self, start: int, size_bytes: int) -> None:
        """Stop protecting these addresses until they are asked for; they count as written then."""
        self._userfault.lift(np.array([start]), np.array([size_bytes]))

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
