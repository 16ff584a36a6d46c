"""The scan-time advisor: how many pages to look at between two sleeps.

Pure. Owns the rule by which a measured pass yields `pages_to_scan` for the next pass
and the rest before it. Promises, for any input: `pages_to_scan` is never below
`advisor_min_pages_to_scan` nor above `advisor_max_pages_to_scan`; pass and rest
together keep `advisor_max_cpu`; the target is approached without oscillation.
Refuses to measure: times are arguments.

The base is KSM's rule (`scan_time_advisor` in `mm/ksm.c`, since 6.8):

    new_pages_to_scan = pages_to_scan * (scan_time / target_scan_time)

A pass over N pages takes N*sleep/pages_to_scan, plus the time it is busy. Let b be
the busy share of the target. Then each pass multiplies the distance to the right
pages_to_scan by b and keeps its sign. If the target can be reached (b < 1), this
converges and cannot overshoot. The CPU limit works in the same way: it is a least
time that the pass must take.

KSM then multiplies by a *change factor*, a moving average of scan_time over the
previous scan time. It follows each change one scan late and starts at 0, so the
first scan leaves 30 percent of the value it finds. KSM's floor is 10 percent CPU at the
last scan's cost per page, in whole percent and whole pages; `advisor_min_pages_to_scan`
is only its starting value. So it starves if pages are expensive (24 pages on a host
that needs 0.2 ms for one). If pages are cheap, it takes 10 percent CPU whatever the
target, and oscillates by a third (tests/unit/test_advisor.py shows both).
Differences here:

- No change factor. Deviations of less than a quarter are noise and corrected with
  KSM's weight of 30 percent; greater ones at once.
- The minimum is a minimum. If it exceeds the CPU limit, a rest after the pass
  compensates. A rest also follows a pass that ends sooner than the target: with
  dirty tracking most passes do, and KSM's next one would start at once.
- Much memory never seen before (a VM came, or boots) is looked at as fast as the
  CPU limit allows, until it is known; the pace before that is kept and resumed.

Limits: if one batch costs more CPU time than the sleep after it allows for, no pace
keeps the CPU limit; only the rest does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from vmdedup.controls import Controls

EWMA_WEIGHT: Final = 0.30
"""Weight of the newest pass against noise; KSM's EWMA_WEIGHT."""

ON_TARGET: Final = 1.05
"""Scan times within this factor of the target change nothing."""

NOISE: Final = 1.25
"""Scan times within this factor of the target are taken for noise."""

GREATEST_CHANGE: Final = 100.0
"""Largest factor by which one pass may change the pace; KSM computes in whole percent."""

_FASTEST: Final = float("inf")
"""A pace that only the maximum bounds."""

NEW_SHARE: Final = 1 / 32
"""Share of pages seen for the first time from which on a pass counts as catching up."""


@dataclass(frozen=True, slots=True)
class Scan:
    """The measures of one pass."""

    pages_scanned: int
    """Pages that were read."""
    covered_pages: int
    """Pages that were read, and those that dirty tracking or smart scan spared."""
    new_pages: int
    """Pages looked at for the first time."""
    scan_s: float
    """Time from begin to end, with the sleeps between batches, without the rest after it."""
    slept_s: float
    """Time spent in the sleeps alone."""
    cpu_s: float
    """CPU time of the engine's process during the pass."""


@dataclass(frozen=True, slots=True)
class Advice:
    """How to run the next pass."""

    pages_to_scan: int
    rest_s: float
    """Pause before the pass begins; a VM that comes may cut it short (`hurry`)."""
    catching_up: bool
    settled_pages_to_scan: int | None
    """The pace found while not catching up; `None` if there is none yet."""


def start(controls: Controls) -> Advice:
    """Advice for the first pass: all memory is new."""
    if controls.advisor_mode == "none":
        return Advice(controls.pages_to_scan, 0.0, catching_up=False, settled_pages_to_scan=None)
    most = controls.advisor_max_pages_to_scan
    return Advice(most, 0.0, catching_up=True, settled_pages_to_scan=None)


def hurry(advice: Advice, controls: Controls) -> Advice:
    """A VM has come: catch up from now on, without a rest."""
    return replace(start(controls), settled_pages_to_scan=advice.settled_pages_to_scan)


def readvise(advice: Advice, controls: Controls) -> Advice:
    """Advice under changed controls, before the next pass is measured."""
    if controls.advisor_mode == "none":
        return start(controls)
    settled = advice.settled_pages_to_scan
    return replace(
        advice,
        pages_to_scan=_clamp(advice.pages_to_scan, controls),
        rest_s=min(advice.rest_s, float(controls.advisor_target_scan_time)),
        settled_pages_to_scan=None if settled is None else _clamp(settled, controls),
    )


def advise(advice: Advice, scan: Scan, controls: Controls) -> Advice:
    """Advice for the next pass, from the one just done under `advice`."""
    if controls.advisor_mode == "none":
        return replace(start(controls), rest_s=_rest_by_hand(scan, controls))
    least_s = scan.cpu_s * 100 / controls.advisor_max_cpu
    goal_s = max(float(controls.advisor_target_scan_time), least_s)
    settled = advice.settled_pages_to_scan
    if scan.new_pages > NEW_SHARE * scan.covered_pages:
        pace = _clamp(_estimated(scan, least_s, controls), controls)
        return Advice(pace, max(0.0, least_s - scan.scan_s), True, settled)
    if advice.catching_up or settled is None:
        # A pass that catches up has seen few writes: no reason to go slower than before.
        wanted = max(_estimated(scan, goal_s, controls), settled or 0)
    else:
        wanted = _regulated(settled, scan, goal_s, controls)
    settled = _clamp(wanted, controls)
    return Advice(settled, max(0.0, goal_s - scan.scan_s), False, settled)


def _regulated(pages_to_scan: int, scan: Scan, goal_s: float, controls: Controls) -> float:
    """KSM's rule, damped within noise.

    `goal_s` grows with the pass's CPU time, so the same rule keeps the CPU limit.
    """
    if controls.sleep_millisecs == 0:
        return _FASTEST
    change = min(max(scan.scan_s / goal_s, 1 / GREATEST_CHANGE), GREATEST_CHANGE)
    if 1 / ON_TARGET < change < ON_TARGET:
        return pages_to_scan
    if 1 / NOISE < change < NOISE:
        change = change**EWMA_WEIGHT
    return pages_to_scan * change


def _estimated(scan: Scan, goal_s: float, controls: Controls) -> float:
    """The pace at which a pass like this one takes `goal_s`.

    Returns the fastest pace if none does: the pass is busy for longer, or has no sleeps to
    save. It wastes least; the rest after the pass keeps the CPU limit.
    """
    spare_s = goal_s - (scan.scan_s - scan.slept_s)
    if controls.sleep_millisecs == 0 or spare_s <= 0:
        return _FASTEST
    return scan.pages_scanned * controls.sleep_millisecs / 1000 / spare_s


def _rest_by_hand(scan: Scan, controls: Controls) -> float:
    """Without the advisor: the time that KSM would have taken for the spared pages.

    So `pages_to_scan` and `sleep_millisecs` set the same pace as in KSM, and a
    pass with nothing to read is not repeated every few milliseconds.
    """
    full_s = scan.covered_pages / controls.pages_to_scan * controls.sleep_millisecs / 1000
    return max(0.0, full_s - scan.scan_s)


def _clamp(pages_to_scan: float, controls: Controls) -> int:
    least, most = controls.advisor_min_pages_to_scan, controls.advisor_max_pages_to_scan
    return most if pages_to_scan >= most else max(least, round(pages_to_scan))
