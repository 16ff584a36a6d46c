"""How many pages must be savable in a huge page for it to be split: fewer as memory gets short.

Pure. Owns the states of memory between plenty and short, as VMware ESXi has them for its
large pages. Promises hysteresis: a state of more memory begins only that many percentage
points above the edge at which the state of less memory began. Refuses to read anything by
itself.

While memory is plenty, speed is worth more than the last savings; in the state of least
memory every page is merged, as KSM does it.
"""

from __future__ import annotations

from typing import Final

_USUAL_THRESHOLD_PERCENT: Final = 20
"""Threshold where `pressure_threshold_percent` is `0`: ksmtuned's KSM_THRES_COEF."""
_EDGES: Final = (1, 2, 4)
"""The edges of the states, as divisors of the threshold: at 20%, 10% and 5%."""
_DENSITIES: Final = (1, 2, 4, 0)
"""What the density is divided by in each state; `0`: it is `0`, all huge pages are split."""

PLENTY: Final = 0
"""The state of most memory."""


def state_of_memory(
    state: int,
    available_bytes: int,
    total_bytes: int,
    threshold_percent: int,
    hysteresis_percent: int,
) -> int:
    """The state from now on, given the one until now: from `PLENTY` up to 3 for short.

    The values are those of `pressure.decide`; threshold 0 is taken for 20%.
    """
    threshold = threshold_percent or _USUAL_THRESHOLD_PERCENT
    available = available_bytes * 100
    below = sum(available * divisor < threshold * total_bytes for divisor in _EDGES)
    above = sum(
        available * divisor < (threshold + hysteresis_percent * divisor) * total_bytes
        for divisor in _EDGES
    )
    return max(below, min(state, above))


def density_in(state: int, density: int) -> int:
    """The density in a state of memory, where `density` holds while memory is plenty."""
    divisor = _DENSITIES[state]
    return density // divisor if divisor else 0
