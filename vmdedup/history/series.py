"""Samples of the sharing, and the averaging of many into few.

Owns the figures of a sample and how each is combined when samples are joined:
levels are averaged, counters and peaks keep their highest. Pure: rows are tuples
in the order of COLUMNS, so that a year of them need not be models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from vmdedup.models import HistorySample, SharingReport, VmReport

LEVELS = (
    "saved_bytes",
    "present_bytes",
    "overhead_bytes",
    "pages_shared",
    "pages_sharing",
    "zero_pages",
    "vms",
    "cow_broken_pages",
    "unique_pages",
)
PEAKS = ("cow_breaks", "gates", "stopped_ms", "gate_p99_ms", "gate_max_ms")
COLUMNS = ("unix_s", *LEVELS, *PEAKS)

LONGEST_S = 400 * 86_400
"""Longest time back that a request may cover, seconds."""
MAX_POINTS = 6000
"""Most samples in one answer."""

_AVERAGED = 1 + len(LEVELS)
_WHOLE = frozenset(name for name in COLUMNS if name != "unix_s" and not name.endswith("_ms"))

Row = tuple[Any, ...]
"""A sample's figures in the order of COLUMNS; `None` for an unknown one."""


def sample_of(report: SharingReport, gates: int | None, unix_s: float) -> HistorySample:
    """A report as a sample. `gates`: how many there were since the start."""
    host = report.host
    served = [vm for vm in report.vms if vm.is_served]
    return HistorySample(
        unix_s=unix_s,
        saved_bytes=host.saved_bytes,
        present_bytes=sum(vm.present_bytes for vm in served),
        overhead_bytes=host.overhead_bytes,
        pages_shared=host.pages_shared,
        pages_sharing=host.pages_sharing,
        zero_pages=host.zero_pages,
        vms=len(served),
        cow_breaks=host.cow_breaks,
        gates=gates,
        stopped_ms=host.stopped_ms,
        gate_p99_ms=host.gate_ms.p99,
        gate_max_ms=host.gate_ms.max,
        cow_broken_pages=host.cow_broken_pages,
        unique_pages=host.pages_unshared,
    )


def vm_keys(vms: Sequence[VmReport]) -> list[str]:
    """A unique name for each VM: with its pid, if others have its name too."""
    often = Counter(vm.name for vm in vms)
    keys: dict[str, None] = {}
    for vm in vms:
        key = vm.name if often[vm.name] == 1 else f"{vm.name} (pid {vm.pid})"
        while key in keys:
            key += "'"
        keys[key] = None
    return list(keys)


def vm_samples_of(report: SharingReport, unix_s: float) -> dict[str, HistorySample]:
    """Each VM that is merged or scanned as a sample of its own, by its key."""
    return {
        key: HistorySample(
            unix_s=unix_s,
            saved_bytes=vm.saved_bytes,
            present_bytes=vm.present_bytes,
            pages_sharing=vm.merged_pages,
            zero_pages=vm.zero_pages,
            vms=1,
            cow_breaks=vm.cow_breaks,
            gates=vm.gates,
            cow_broken_pages=vm.cow_broken_pages,
            unique_pages=vm.unique_pages,
        )
        for key, vm in zip(vm_keys(report.vms), report.vms, strict=True)
        if vm.is_served
    }


def row_of(sample: HistorySample) -> Row:
    """The sample as a row."""
    return tuple(getattr(sample, name) for name in COLUMNS)


def model_of(row: Row) -> HistorySample:
    """The row as a sample. Raises ValueError, TypeError or OverflowError if it is none."""
    figures = dict(zip(COLUMNS, row, strict=True))
    for name in _WHOLE:
        if figures[name] is not None:
            figures[name] = round(figures[name])
    return HistorySample(**figures)


def width_s(span_s: float, max_points: int) -> float:
    """Width of slots, seconds, so that at most `max_points` of them cover the span."""
    # Slots lie at multiples of their width, so that the same samples are joined at every
    # look; a span then touches one slot more than it has room for.
    return span_s / (max_points - 1) if max_points > 1 else float("inf")


def thinned(rows: Iterable[Row], slot_s: float) -> Iterator[Row]:
    """One row for each slot that has any; `rows` come in order of time."""
    for _, slot in groupby(rows, key=lambda row: row[0] // slot_s):
        yield joined(list(slot))


def joined(rows: list[Row]) -> Row:
    """One row that joins several."""
    columns = [
        [figure for figure in column if figure is not None] for column in zip(*rows, strict=True)
    ]
    return tuple(
        None if not column else sum(column) / len(column) if at < _AVERAGED else max(column)
        for at, column in enumerate(columns)
    )
