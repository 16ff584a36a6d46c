"""When memory is short, which steps are due then, and when to look again.

Pure. Owns the reserve, the table of steps, and the choice of the VM to pause. A place (the
host, or a cgroup) is short while less than its reserve is there and merged pages could still
take it. Promises hysteresis: short memory suffices again only well above the reserve.

How soon a look comes follows from the fastest that guests are taken to write. With twice as
much above the reserve as they could write until then, no look is too late.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vmdedup.core.forecast import Forecast

FASTEST_BYTES_PER_S: Final = 4 << 30
"""Memory that guests are taken to break a second at most: several vCPUs that only write."""
LEAST_INTERVAL_S: Final = 0.01
MOST_INTERVAL_S: Final = 1.0
HORIZON_S: Final = 0.1
"""Time from a look until a VM stands still, seconds: it is looked so far ahead."""
_ENOUGH_PERCENT: Final = 150
"""Percentage of the reserve above which short memory suffices again."""
_LEAST_PART: Final = 10
"""A VM is paused only if it takes this part of the memory that VMs take (one tenth)."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is done while memory is short."""

    below_percent: int
    """Percentage of the reserve below which it is done."""


SAY = Step(100)
PAGE_OUT = Step(100)
HOOK = Step(100)
PAUSE = Step(50)

STEPS: Final = (SAY, PAGE_OUT, HOOK, PAUSE)
"""In this order. Steps that only cost time come first, with the whole reserve to work in. Pausing
has the rest: VMs write on until they stand still."""


@dataclass(frozen=True, slots=True)
class Level:
    """How a place stands at a look."""

    forecast: Forecast
    reserve_bytes: int
    fall_bytes_per_s: float = 0.0
    """How fast it lost memory since the look before."""

    @property
    def wanted_bytes(self) -> int:
        """The reserve, or less: no more than merged pages can take."""
        return min(self.reserve_bytes, self.forecast.needed_bytes)

    @property
    def soon_bytes(self) -> float:
        """Memory that is there after the horizon, at this fall."""
        return self.forecast.there_bytes - max(0.0, self.fall_bytes_per_s) * HORIZON_S

    def is_short(self, *, before: bool = False) -> bool:
        """Whether memory is short, given whether it was at the look before."""
        wanted_bytes = self.wanted_bytes
        if before:
            enough_bytes = self.reserve_bytes * _ENOUGH_PERCENT // 100
            wanted_bytes = min(enough_bytes, self.forecast.needed_bytes)
        return self.soon_bytes < wanted_bytes

    def asks_for(self, step: Step) -> bool:
        """Whether memory is so short that this step is due."""
        return self.soon_bytes < self.wanted_bytes * step.below_percent / 100

    @property
    def interval_s(self) -> float:
        """Time until the next look, seconds."""
        spare_bytes = self.soon_bytes - self.wanted_bytes
        wanted_s = spare_bytes / (2 * FASTEST_BYTES_PER_S)
        return min(max(wanted_s, LEAST_INTERVAL_S), MOST_INTERVAL_S)


def reserve_bytes(size_bytes: int, least_bytes: int, percent: int) -> int:
    """The reserve of a place of that size: the larger of both controls."""
    return max(least_bytes, size_bytes * percent // 100)


def to_pause(
    candidates: Sequence[int], growth_bytes: Mapping[int, int], priority: Mapping[int, int]
) -> int | None:
    """The candidate to pause: the lowest priority of those that take memory, else `None`.

    Of equals it is the one that takes most. A pause gives no memory back, so it helps only
    where a VM takes some. `growth_bytes`: what each VM took lately.
    """
    total_bytes = sum(max(0, growth_bytes.get(vm, 0)) for vm in candidates)
    taking = [vm for vm in candidates if growth_bytes.get(vm, 0) * _LEAST_PART >= total_bytes > 0]
    return min(taking, key=lambda vm: (priority[vm], -growth_bytes[vm]), default=None)


def to_resume(paused: Collection[int], priority: Mapping[int, int]) -> int | None:
    """The VM to resume first: the highest priority; of equals the one paused last."""
    return max(reversed(list(paused)), key=lambda vm: priority[vm], default=None)
