"""/proc/kpageflags: which frames of the host belong to a folio of several pages.

Owns the reading of these flags (Documentation/admin-guide/mm/pagemap.rst), for root alone.
Refuses to read all memory: only the frames asked for are read, neighbours in one call.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from vmdedup.closing import Closing
from vmdedup.core.sorting import page_runs, ranges
from vmdedup.linux.syscall_batch import call_columns, require_done, run_calls
from vmdedup.linux.syscalls import NR

_FLAGS_BYTES = 8
_HEAD, _TAIL, _ZERO_PAGE = np.uint64(1 << 15), np.uint64(1 << 16), np.uint64(1 << 24)

Int64s = npt.NDArray[np.int64]


class PageFlags(Closing):
    """The file, held open. Raises OSError if it may not be read."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def is_large(self, frame: Int64s) -> npt.NDArray[np.bool_]:
        """Whether each of these ascending frames is of a large folio other than the zero folio."""
        flags = self._flags(frame)
        return np.asarray((flags & (_HEAD | _TAIL) != 0) & (flags & _ZERO_PAGE == 0))

    def folios(self, frame: Int64s, most_pages: int) -> tuple[Int64s, Int64s]:
        """All frames around these ascending ones, ascending, and the number of each one's folio.

        `most_pages`: most pages of a folio; a power of two, as folios lie aligned.
        """
        block = np.unique(frame // most_pages) * most_pages
        around = ranges(block, np.full(len(block), most_pages))
        return around, np.cumsum(self._flags(around) & _TAIL == 0, dtype=np.int64)

    def _flags(self, frame: Int64s) -> npt.NDArray[np.uint64]:
        start, count = page_runs(frame, np.empty(0, dtype=np.int64))
        flags = np.zeros(len(frame), dtype=np.uint64)
        target = flags.ctypes.data + (np.cumsum(count) - count) * _FLAGS_BYTES
        size, offset = count * _FLAGS_BYTES, start * _FLAGS_BYTES
        results = run_calls(call_columns(NR.PREAD64, self._fd, target, size, offset))
        require_done(results, "kpageflags")
        return flags
