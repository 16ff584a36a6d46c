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

import numpy as np
import numpy.typing as npt

from vmdedup.memory.space import PageSpace
from vmdedup.memory.userfault import Userfault
from vmdedup.procfs.pagemap import Pagemap
from vmdedup.units import PAGE_SHIFT


class ChangeTracker:
    """Tracks writes to all regions of one VM. Takes ownership of `userfault`.

    Raises OSError when the kernel can not track one of the mappings.
    """

    def __init__(self, userfault: Userfault, pagemap: Pagemap, space: PageSpace) -> None:
        self._userfault = userfault
        self._pagemap = pagemap
        self._space = space
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

    def take_written(self) -> npt.NDArray[np.bool_]:
        """Pages written (or new) since the last call, as a mask; resets the set.

        A mapping that is not tracked, as QEMU has just made it, counts as written
        whole, and is tracked from now on.
        """
        written = np.zeros(self._space.pages, dtype=np.bool_)
        for region, (start, end) in enumerate(self._space.spans()):
            inside = written[self._space.slice_of(region)]
            try:
                found = self._pagemap.written(start, end)
            except PermissionError:
                self._cover([(start, end)])
                inside[:] = True
                continue
            for low, high in zip(found.start.tolist(), found.end.tolist(), strict=True):
                inside[(low - start) >> PAGE_SHIFT : (high - start) >> PAGE_SHIFT] = True
        return written

    @contextmanager
    def handed_over(self, spans: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Leave `spans` to another userfaultfd for the time of the block.

        What is tracked again afterwards reads as written once.
        """
        for start, end in spans:
            self._userfault.unregister(start, end)
        try:
            yield
        finally:
            try:
                self._cover(self._space.spans())
            except OSError as error:
                # Gone with its VM, or unplugged: the next look finds out.
                if error.errno not in (errno.ENOMEM, errno.ESRCH, errno.EINVAL):
                    raise
