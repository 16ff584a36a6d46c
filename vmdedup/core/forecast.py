"""What merged memory takes if all of it is written, against what is there.

Pure. Owns the arithmetic of overcommitment: of the host, and of each memory cgroup with a
limit. Promises integers of bytes, and that a place with several VMs counts each of them.

A guest that writes a merged page gets a page of its own: memory is needed for every merged
page, whether it stood on a store page or on the zero page. A store page is freed only once
nobody maps it, and a mapping stays after the guest has written the page. So nothing is
subtracted for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from vmdedup.core.trailing import Trailing
from vmdedup.units import PAGE_BYTES

RATE_WINDOW_S = 30.0
"""Time over which breaks are counted, seconds: longer than most passes, which find them."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The memory of one place, in bytes: the host, or a cgroup."""

    needed_bytes: int
    """New memory that is needed if all merged pages are written."""
    there_bytes: int
    """Memory that may still be taken, with what could be swapped out."""

    @property
    def lacking_bytes(self) -> int:
        """Bytes by which the need exceeds what is there, `0` if it does not."""
        return max(0, self.needed_bytes - self.there_bytes)

    def lasts_s(self, breaks_per_s: float | None) -> float | None:
        """Seconds until what is there is used up at that rate.

        `None` if that cannot happen, as the need is covered, or if the rate is unknown or 0.
        """
        if not self.lacking_bytes or not breaks_per_s:
            return None
        return self.there_bytes / (breaks_per_s * PAGE_BYTES)

    def merged_further(self, pages: int, new_store_pages: int) -> Forecast:
        """The forecast after a merge of so many pages, which gives back their memory.

        `new_store_pages`: pages that the merge takes of this place for the store.
        """
        freed = (pages - new_store_pages) * PAGE_BYTES
        return replace(
            self,
            needed_bytes=self.needed_bytes + pages * PAGE_BYTES,
            there_bytes=max(0, self.there_bytes + freed),
        )


class BreakRates:
    """Pages broken a second, by VM, from counters that only grow."""

    def __init__(self) -> None:
        self._breaks: dict[int, Trailing] = {}
        """Breaks of each VM by its number."""

    def note(self, now_s: float, breaks: Mapping[int, int]) -> None:
        """Note each VM's counter at this time; VMs that are not named are forgotten."""
        known, self._breaks = self._breaks, {}
        for vm, count in breaks.items():
            seen = known.get(vm)
            if seen is None or count < (seen.last or 0):  # new, or attached anew
                seen = Trailing(RATE_WINDOW_S)
            seen.note(now_s, count)
            self._breaks[vm] = seen

    def of(self, vms: Iterable[int]) -> float | None:
        """The rate of all these VMs together; `None` if it is known of none of them."""
        seen = [self._breaks[vm] for vm in vms if vm in self._breaks]
        rates = [each.change / each.span_s for each in seen if each.span_s > 0]
        return sum(rates) if rates else None
