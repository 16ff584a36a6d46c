"""How far a run has come, and what a pass did: the values that the engine hands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PassProgress:
    """How far a run has come; `done_pages` of `total_pages` in the stage at hand."""

    passes: int
    stage: str
    vm: str | None
    done_pages: int
    total_pages: int
    merged_pages: int


@dataclass(frozen=True)
class PassOutcome:
    """What one pass did."""

    merged_pages: int
    """Newly merged, zero pages included."""
    troubled: bool
    """Whether it ended early on some VM."""


ReportProgress = Callable[[PassProgress], None]
