"""The content of the screen, and the source that it comes from.

Owns what a live look and a replayed sample have in common: rows in an order, totals and
rates. Promises that an unknown figure is `None`, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from vmdedup.models import VmStatus


@dataclass(frozen=True)
class Row:
    """One VM. Rates are per second; `None` if there is nothing to compare."""

    name: str
    held_bytes: int
    saved_bytes: int
    merged_pages: int | None
    zero_pages: int | None
    broken_pages: int | None
    breaks: float | None
    gates: float | None
    status: VmStatus | None = None
    waiting_pages: int | None = None
    vmas: int | None = None


@dataclass(frozen=True)
class Rates:
    """Changes per second of all VMs; `None` if there is nothing to compare."""

    breaks: float | None = None
    gates: float | None = None
    scanned: float | None = None


@dataclass(frozen=True)
class View:
    """All VMs at one time."""

    when: str
    """What time it shows, or how the daemon is, in words."""
    rows: tuple[Row, ...]
    saved_bytes: int
    held_bytes: int
    overhead_bytes: int | None
    gate_p99_ms: float | None
    rates: Rates
    full_scans: int | None = None
    is_last: bool = False
    """Whether no other view will follow."""


COLUMNS: Mapping[str, str | None] = {
    "VM": "name",
    "status": None,
    "held": "held",
    "saved": "saved",
    "%": None,
    "merged": None,
    "zero": None,
    "broken": None,
    "breaks/s": "breaks",
    "gates/s": None,
    "waiting": "waiting",
    "VMAs": "vmas",
}
"""The table's columns, and the order that a click on each selects."""

ORDERS: dict[str, Callable[[Row], tuple[float | str, ...]]] = {
    "saved": lambda row: (-row.saved_bytes, row.name),
    "name": lambda row: (row.name,),
    "breaks": lambda row: (-(row.breaks or 0.0), -(row.broken_pages or 0), row.name),
    "held": lambda row: (-row.held_bytes, row.name),
    "waiting": lambda row: (-(row.waiting_pages or 0), row.name),
    "vmas": lambda row: (-(row.vmas or 0), row.name),
}
"""Sort orders by name; the largest first, names from A."""


class ViewSource(Protocol):
    """Where views come from, one after the other."""

    @property
    def title(self) -> str:
        """What to call it before it gives a view."""

    @property
    def columns(self) -> Collection[str]:
        """The columns of which it knows the figures."""

    @property
    def shortest_s(self) -> float:
        """Shortest interval between two views, seconds."""

    @property
    def has_steps(self) -> bool:
        """Whether it can go back, and on by more than one."""

    def look(self, steps: int = 1) -> View:
        """The view that many steps on from the last. Raises VmdedupError."""


def orders(columns: Collection[str]) -> list[str]:
    """The orders that go by one of these columns."""
    return [order for name, order in COLUMNS.items() if order is not None and name in columns]


def ordered(rows: tuple[Row, ...], order: str, *, reverse: bool = False) -> list[Row]:
    """The rows in one of `ORDERS`."""
    return sorted(rows, key=ORDERS[order], reverse=reverse)


def rate(now: float | None, before: float | None, span_s: float) -> float | None:
    """Growth of a counter per second; `None` if it fell, as it does when its engine ended."""
    if now is None or before is None or now < before or span_s <= 0:
        return None
    return (now - before) / span_s
