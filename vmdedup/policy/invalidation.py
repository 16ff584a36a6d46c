"""The work that a changed control makes void, and that the engine therefore does again.

Owns the table of it, one row for each control. Promises that a control which changes only
the pace, or only the next gate, discards no knowledge. Pure: the engine compares the old
controls with the new ones, and acts.

A pass that finds nothing new costs next to nothing: the engine nominates only among pages
that changed since its last nomination. Once that is forgotten (`Engine.use`, `Engine.limit`),
each candidate of each VM is considered again; new digests require reading all memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, Final


class Redo(IntEnum):
    """How much must be done again; each includes those below it."""

    NOTHING = 0
    """The next slice, gate or pass uses the new value."""
    NOMINATION = 1
    """The next nomination considers all candidates, not only new ones."""
    DIGESTS = 2
    """Stores are opened again, and each page is read again."""


REDONE: Final[Mapping[str, Redo]] = {
    "run": Redo.NOTHING,
    "pages_to_scan": Redo.NOTHING,
    "sleep_millisecs": Redo.NOTHING,
    # Candidates that the limit held back do not count as new.
    "max_kernel_pages": Redo.NOMINATION,
    # The sites of each store page are counted only while there is a limit.
    "max_page_sharing": Redo.NOMINATION,
    # Digests of one kind mean nothing in the other, and each kind has its own stores.
    "merge_across_nodes": Redo.DIGESTS,
    # Zero pages become candidates, or cease to be.
    "use_zero_pages": Redo.NOMINATION,
    # Decides only which pages are read next.
    "smart_scan": Redo.NOTHING,
    "advisor_mode": Redo.NOTHING,
    "advisor_target_scan_time": Redo.NOTHING,
    "advisor_max_cpu": Redo.NOTHING,
    "advisor_min_pages_to_scan": Redo.NOTHING,
    "advisor_max_pages_to_scan": Redo.NOTHING,
    # A changed budget admits other pages.
    "vma_budget": Redo.NOMINATION,
    # Each gate reads it.
    "gate_deadline_ms": Redo.NOTHING,
    # Other huge pages are worth splitting.
    "huge_page_density": Redo.NOMINATION,
    "pressure_threshold_percent": Redo.NOTHING,
    "pressure_hysteresis_percent": Redo.NOTHING,
    # They change nothing that is looked at or merged.
    "reserve_bytes": Redo.NOTHING,
    "reserve_percent": Redo.NOTHING,
    "shortage_say": Redo.NOTHING,
    "shortage_page_out": Redo.NOTHING,
    "shortage_hook": Redo.NOTHING,
    "shortage_pause": Redo.NOTHING,
    "cold_after_s": Redo.NOTHING,
    "cold_max_refaults": Redo.NOTHING,
    "cold_max_cpu": Redo.NOTHING,
}
"""The work to do again, by control."""


def redone_by(changed: Iterable[str]) -> Redo:
    """How much these changes make void.

    Settings that are no controls change only with SIGHUP, which is rare: for these all
    candidates are considered again.
    """
    return max((REDONE.get(name, Redo.NOMINATION) for name in changed), default=Redo.NOTHING)


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """The names whose values differ."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
