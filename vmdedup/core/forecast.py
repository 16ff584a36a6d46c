"""What merged memory takes if all of it is written, against what is there.

Pure. Owns the arithmetic of overcommitment: of the host, and of each memory cgroup with a
limit. Promises integers of bytes, and that a place with several VMs counts each of them.

A guest that writes a merged page gets a page of its own: memory is needed for every merged
page, whether it stood on a store page or on the zero page. A store page is freed only once
nobody maps it, and a mapping stays after the guest has written the page. So nothing is
subtracted for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

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
        self._seen: dict[int, deque[tuple[float, int]]] = {}
        """Times in seconds, and breaks until then, by the VM's number."""

    def note(self, now_s: float, breaks: Mapping[int, int]) -> None:
        """Note each VM's counter at this time; VMs that are not named are forgotten."""
        self._seen = {vm: self._seen.get(vm, deque()) for vm in breaks}
        for vm, count in breaks.items():
            seen = self._seen[vm]
            if seen and count < seen[-1][1]:
                seen.clear()  # attached anew
            seen.append((now_s, count))
            while len(seen) > 2 and seen[1][0] <= now_s - RATE_WINDOW_S:
                seen.popleft()

    def of(self, vms: Iterable[int]) -> float | None:
        """The rate of all these VMs together; `None` if it is known of none of them."""
        rates = [rate for vm in vms if (rate := self._rate(vm)) is not None]
        return sum(rates) if rates else None

    def _rate(self, vm: int) -> float | None:
        seen = self._seen.get(vm)
        if seen is None or seen[-1][0] <= seen[0][0]:
            return None
        return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])
