"""The progress of a run and the result of a pass: the values that the engine hands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PassProgress:
    """The progress of a run; `done_pages` of `total_pages` in the current stage."""

    passes: int
    stage: str
    vm: str | None
    done_pages: int
    total_pages: int
    merged_pages: int


@dataclass(frozen=True)
class PassOutcome:
    """The result of one pass."""

    merged_pages: int
    """Number of newly merged pages, including zero pages."""
    troubled: bool
    """Whether the pass ended early on some VM."""
    awaits_storage: bool
    """Whether a VM's drain is put off, and it is not known yet if its storage hangs."""


ReportProgress = Callable[[PassProgress], None]
