"""Checks of the numbers that are handed to the kernel or to machine code by address.

Owns a few comparisons of whole columns, which cost less than the call that follows. Promises
that a call reads and writes nothing beside its arrays, and of a VM nothing beside the ranges
looked at. Else BorderError, and nothing was done. That matters if a CPU computes wrongly, as
an emulated one may.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmdedup.errors import BorderError
from vmdedup.units import PAGE_BYTES

Int64s = npt.NDArray[np.int64]


def require_lengths(pages: Int64s, most: int) -> None:
    """Require that each length is at least one page, and their sum at most `most`."""
    if len(pages) and (int(pages.min()) < 1 or int(pages.sum()) > most):
        raise BorderError(f"runs of {pages.sum()} pages, where {most} have room")


def require_runs(start: Int64s, pages: Int64s) -> None:
    """Require runs of whole pages by ascending address, none of which reaches into the next."""
    if len(start) != len(pages):
        raise BorderError(f"{len(start)} runs with {len(pages)} lengths")
    if not len(start):
        return
    end = start + pages * PAGE_BYTES
    is_wrong = pages.min() < 1 or (start[1:] < end[:-1]).any() or (start % PAGE_BYTES).any()
    if is_wrong or int(start[0]) < 0:
        raise BorderError(f"{len(start)} runs that do not ascend page by page")


def require_inside(start: Int64s, end: Int64s, low: int, high: int) -> None:
    """Require ranges within [low, high)."""
    if len(start) and not (low <= int(start.min()) and int(end.max()) <= high):
        raise BorderError(
            f"{int(start.min()):#x} to {int(end.max()):#x}, not within {low:#x} to {high:#x}"
        )
    if (end < start).any():
        raise BorderError("ranges that end before they begin")
