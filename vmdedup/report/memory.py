"""What merged memory takes if all of it is written, in words.

Pure. Shared by the reports, the plan, `vmdedup doctor` and the dashboard, so that all say
the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmdedup.models import MemoryPlace
from vmdedup.report.words import duration, size

_LONGEST_FOLDER = 40


def shown(places: Sequence[MemoryPlace]) -> list[MemoryPlace]:
    """The host, and each cgroup in which memory would not suffice, or is short."""
    return [
        place
        for number, place in enumerate(places)
        if number == 0 or place.is_lacking or place.paused_vms
    ]


def title(place: MemoryPlace) -> str:
    """`host`, or `cgroup …/vms/web` with the end of a long folder."""
    if not place.place.startswith("/"):
        return place.place
    folder = place.place
    if len(folder) > _LONGEST_FOLDER:
        folder = "…/" + "/".join(folder.rsplit("/", 2)[-2:])
    return f"cgroup {folder}"


def told(place: MemoryPlace) -> str:
    """The need, what is there, the rate, and how long that lasts."""
    there = f"{size(place.there_bytes)} are there"
    if place.swap_bytes:
        there += f" ({size(place.swap_bytes)} of it by swapping)"
    parts = [f"if all is written, {size(place.needed_bytes)} are needed", there]
    if place.breaks_per_s is not None:
        parts.append(f"{place.breaks_per_s:,.0f} pages are broken a second")
    if place.lasts_s is not None:
        parts.append(f"it lasts {duration(place.lasts_s)} at that rate")
    if place.short:
        parts.append("memory is short")
    if place.paused_vms:
        parts.append(f"paused until there is memory: {', '.join(place.paused_vms)}")
    return ", ".join(parts)


def line(place: MemoryPlace) -> str:
    """All of it in one line."""
    return f"memory of {title(place)}: {told(place)}"
