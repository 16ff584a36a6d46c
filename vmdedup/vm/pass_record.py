"""What an engine notes about a VM between passes. Owns no decision: the engine makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmdedup.guest.large_folios import NOTHING_KEPT, KeptMemory


def _no_pages() -> npt.NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass
class PassRecord:
    """Of one VM, since it was attached or its looks were forgotten."""

    passes: int = 0
    """Merges of it that were tried."""
    trouble: str | None = None
    """Why the last pass ended early on this VM, `None` if it did not."""
    missed_pages: int = 0
    """Pages in gates of the last pass that were opened at their deadline."""
    deferred: npt.NDArray[np.int64] = field(default_factory=_no_pages)
    """Pages that wait for VMAs: int64, shape (n,)."""
    needed_max_map_count: int | None = None
    """vm.max_map_count with which none would wait for VMAs, `None` where none does."""
    waiting_pages: int = 0
    """Pages that have an equal and wait for room in the store."""
    crowded: str | None = None
    """Why it has more mappings than it should, `None` if it has not."""
    leaving: bool = False
    """Whether it is to be unmerged before anything else: it must not share as it does."""
    left_reason: str | None = None
    """Why the last unmerge left pages merged, `None` if it left none."""
    resting: bool = False
    """Unmerged on request: neither scanned nor merged until somebody asks for it."""
    cache_freed_at: float = -math.inf
    """When memory that a filesystem kept of merged pages was last tried to be freed
    (time.monotonic)."""
    kept: KeptMemory = NOTHING_KEPT
    """What large folios keep of the memory that its merged pages had."""
    kept_since: float = 0.0
    """When that was found (time.monotonic)."""
