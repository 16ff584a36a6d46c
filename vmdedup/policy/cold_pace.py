"""The pace at which a VM's cold pages are paged out: as fast as they do not come back.

Pure. Owns the rule, which is Senpai's (facebookincubator/senpai) with page-ins in place of
pressure: what was paged out and is back within a minute was not cold. While more of it comes
back than the limit allows, the pace is halved; otherwise it rises slowly. Pressure on memory
that the kernel tells of (PSI) counts as too much as well. Promises: the pace stays between
`LEAST_PER_S` and `MOST_PER_S`; it never rises while the limit is exceeded; a halving has time
to show before the next one. Refuses to measure: counts and times are arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

LEAST_PER_S: Final = 32.0
"""Slowest pace, pages a second: so few tell when it may be faster again."""
MOST_PER_S: Final = 65_536.0
"""Fastest pace, pages a second: 256 MiB. The share of a CPU mostly ends it before."""
_FIRST_PER_S: Final = 2_048.0
_RISE: Final = 1.03
"""Growth in a second: twice the pace in 23 s."""
_AVERAGED_S: Final = 5.0
"""Time over which refaults are averaged, seconds."""
_SHORTEST_S: Final = 0.001
"""Shortest time that a rate is taken over, seconds."""
_PAUSE_S: Final = 10.0
"""Least time between two halvings, seconds: pages that are out already come back meanwhile."""
MOST_PRESSURE_PERCENT: Final = 10.0
"""Share of the last 10 s in which some task waited for memory, above which nothing rises."""


@dataclass(frozen=True, slots=True)
class ColdPace:
    """The pace of one VM, and what it follows."""

    pages_per_s: float = _FIRST_PER_S
    refaults_per_s: float = 0.0
    """Pages that were paged out and came back within a minute: average of the last seconds."""
    since_halved_s: float = math.inf

    def due_pages(self, elapsed_s: float) -> int:
        """Pages to page out after so much time."""
        return int(self.pages_per_s * elapsed_s)


FIRST_PACE: Final = ColdPace()
"""The pace of a VM whose cold pages are wanted for the first time."""


def next_pace(
    pace: ColdPace,
    *,
    elapsed_s: float,
    refaults: int,
    most_refaults_per_s: float,
    pressure_percent: float | None,
) -> ColdPace:
    """The pace after `elapsed_s` in which so many pages came back.

    `pressure_percent`: PSI's `some avg10` of memory, `None` where it is off.
    """
    elapsed_s = max(elapsed_s, _SHORTEST_S)
    weight = 1 - math.exp(-elapsed_s / _AVERAGED_S)
    rate = pace.refaults_per_s + weight * (refaults / elapsed_s - pace.refaults_per_s)
    since_s = pace.since_halved_s + elapsed_s
    measured = replace(pace, refaults_per_s=rate, since_halved_s=since_s)
    strained = pressure_percent is not None and pressure_percent > MOST_PRESSURE_PERCENT
    if rate > most_refaults_per_s or strained:
        if since_s < _PAUSE_S:
            return measured
        halved = max(LEAST_PER_S, pace.pages_per_s / 2)
        return replace(measured, pages_per_s=halved, since_halved_s=0.0)
    # Bounded before it is raised: after a long time the power would exceed any float.
    most_s = math.log(MOST_PER_S / LEAST_PER_S) / math.log(_RISE)
    risen = pace.pages_per_s * _RISE ** min(elapsed_s, most_s)
    return replace(measured, pages_per_s=min(MOST_PER_S, risen))
