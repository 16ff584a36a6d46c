"""Whether the memory suffices if guests write all that is merged.

Pure: the places come with the report of the VMs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmdedup.doctor.words import fine, note
from vmdedup.models import CheckedThing, MemoryPlace
from vmdedup.report.memory import title, told

_LIMITS = "limits"
_REMEDY = (
    "guests that write it all meet the OOM killer: leave more memory or swap free, move VMs to"
    " another host, or unmerge some while it still fits"
)


def memory_checks(places: Sequence[MemoryPlace]) -> Iterator[CheckedThing]:
    """A row for the host, and one for each cgroup with a limit."""
    for place in places:
        name = f"memory of {title(place)}"
        if place.short:
            yield note(_LIMITS, name, told(place), f"less than the reserve is there: {_REMEDY}")
        elif place.is_lacking:
            yield note(_LIMITS, name, told(place), _REMEDY)
        else:
            yield fine(_LIMITS, name, told(place))
