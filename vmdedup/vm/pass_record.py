"""The engine's notes about a VM between passes. Owns no decision: the engine makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmdedup.guest.large_folios import NOTHING_KEPT, KeptMemory
from vmdedup.policy.cold_pace import FIRST_PACE, ColdPace


def _no_pages() -> npt.NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass
class PassRecord:
    """The record of one VM, since it was attached or its looks were forgotten."""

    passes: int = 0
    """Number of times a merge of the VM was tried."""
    trouble: str | None = None
    """Why the last pass ended early on this VM, `None` if it did not."""
    missed_pages: int = 0
    """Pages in gates of the last pass that were opened at their deadline."""
    deferred: npt.NDArray[np.int64] = field(default_factory=_no_pages)
    """Pages that wait for VMAs: int64, shape (n,)."""
    needed_max_map_count: int | None = None
    """vm.max_map_count with which no page would wait for VMAs, `None` if none does."""
    waiting_pages: int = 0
    """Pages that have an equal and wait for room in the store."""
    kept_in_huge_pages: int = 0
    """Pages that have an equal, in huge pages that are not worth splitting for them."""
    collapse_refused: npt.NDArray[np.int64] = field(default_factory=_no_pages)
    """Blocks of 2 MiB that could not be made a huge page."""
    collapse_refused_at: float = -math.inf
    """Time of the first of them, seconds (time.monotonic)."""
    crowded: str | None = None
    """Why the VM has more mappings than it should, `None` if it has not."""
    leaving: bool = False
    """Whether to unmerge the VM before anything else: its present sharing is not allowed."""
    left_reason: str | None = None
    """Why the last unmerge left pages merged, `None` if it left none."""
    resting: bool = False
    """Whether it was unmerged on request: no pass reads or merges it until somebody asks."""
    cache_freed_at: float = -math.inf
    """Time of the last try to free memory that a filesystem keeps of merged pages, seconds
    (time.monotonic)."""
    kept: KeptMemory = NOTHING_KEPT
    """Old memory of its merged pages that large folios keep."""
    cold_pace: ColdPace = FIRST_PACE
    """The pace at which its cold pages are paged out, and how many come back."""
    kept_since: float = 0.0
    """Time at which `kept` was found, seconds (time.monotonic)."""
