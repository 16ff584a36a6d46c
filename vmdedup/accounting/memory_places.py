"""The memory that merged pages may need: of the host, and of the cgroups that the VMs are in.

Owns which places there are and the reading of what is there; `core.forecast` has the
arithmetic. A page that a guest writes is charged to the cgroups of its QEMU, a store page to
ours, so a plan takes store pages of the host alone. Promises to follow a merge under way: what
is needed grows by each page that is merged, and shrinks when the VMs are counted again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vmdedup.controls import Controls
from vmdedup.core.forecast import BreakRates, Forecast
from vmdedup.core.shortage import Level, reserve_bytes
from vmdedup.linux.cgroup import GroupMemory, limited_groups
from vmdedup.linux.swap import host_room_bytes
from vmdedup.models import MemoryPlace
from vmdedup.units import PAGE_BYTES

HOST = "host"
"""Name of the host among the places."""


@dataclass(frozen=True)
class Tenant:
    """A VM whose merged pages may need memory."""

    name: str
    pid: int
    counted_pages: int
    """Pages on the store or on the zero page that the guest had not written when last counted."""
    merged_since: Callable[[], int] = lambda: 0
    """Tells how many pages were merged after that, so that a long merge is followed."""

    @property
    def merged_pages(self) -> int:
        """Pages that may be written now, at most."""
        return self.counted_pages + self.merged_since()


class PlaceRoom(NamedTuple):
    """The memory of a place, in bytes."""

    available: int
    swap: int
    """Memory that may be swapped out."""
    size: int
    """The host's memory, or the group's limit."""


@dataclass(frozen=True)
class Place:
    """The host (`group` is `None`), or a memory cgroup with a limit; and the VMs in it."""

    group: GroupMemory | None
    vms: tuple[Tenant, ...]

    @property
    def name(self) -> str:
        """`host`, or the folder of the cgroup."""
        return HOST if self.group is None else str(self.group.folder)

    @property
    def needed_bytes(self) -> int:
        """New memory if all merged pages of its VMs are written."""
        return sum(vm.merged_pages for vm in self.vms) * PAGE_BYTES

    def forecast(self, room: PlaceRoom) -> Forecast:
        """The need of its VMs against this room."""
        return Forecast(self.needed_bytes, room.available + room.swap)

    def room(self) -> PlaceRoom:
        """What is there now. Raises OSError or ValueError if the group is gone."""
        if self.group is None:
            return PlaceRoom(*host_room_bytes())
        group = self.group
        return PlaceRoom(group.left_bytes(), group.swap_bytes(), group.limit_bytes())


def places_of(vms: Sequence[Tenant]) -> list[Place]:
    """The host first, then each cgroup with a limit above any of these VMs."""
    groups: dict[Path, GroupMemory] = {}
    inside: dict[Path, list[Tenant]] = {}
    for vm in vms:
        for group in limited_groups(vm.pid):
            groups.setdefault(group.folder, group)
            inside.setdefault(group.folder, []).append(vm)
    limited = [Place(groups[folder], tuple(inside[folder])) for folder in sorted(groups)]
    return [Place(None, tuple(vms)), *limited]


def memory_now(
    places: Sequence[Place],
    rates: BreakRates,
    controls: Controls,
    paused: Collection[int] = (),
) -> list[MemoryPlace]:
    """The forecast of every place, and whether it is short. `paused`: pids of paused VMs."""
    told = []
    for place, room in _rooms(places):
        forecast = place.forecast(room)
        level = Level(forecast, reserve_of(room, controls))
        breaks_per_s = rates.of(vm.pid for vm in place.vms)
        told.append(
            _told(place, forecast, room.swap).model_copy(
                update={
                    "breaks_per_s": breaks_per_s,
                    "lasts_s": forecast.lasts_s(breaks_per_s),
                    "reserve_bytes": level.reserve_bytes,
                    "short": level.is_short(),
                    "paused_vms": [vm.name for vm in place.vms if vm.pid in paused],
                }
            )
        )
    return told


def reserve_of(room: PlaceRoom, controls: Controls) -> int:
    """Bytes that must stay free in such a place."""
    return reserve_bytes(room.size, controls.reserve_bytes, controls.reserve_percent)


def memory_after(
    places: Sequence[Place], planned: Mapping[int, int], new_store_pages: int
) -> list[MemoryPlace]:
    """The forecast of every place after a merge; `planned` has its pages by pid of the VM."""
    told = []
    for place, room in _rooms(places):
        pages = sum(planned.get(vm.pid, 0) for vm in place.vms)
        new_pages = new_store_pages if place.group is None else 0
        forecast = place.forecast(room).merged_further(pages, new_pages)
        told.append(_told(place, forecast, min(room.swap, forecast.there_bytes)))
    return told


def _rooms(places: Sequence[Place]) -> Iterator[tuple[Place, PlaceRoom]]:
    """The places with what is there now; a group that is gone is left out."""
    for place in places:
        with suppress(OSError, ValueError):
            yield place, place.room()


def _told(place: Place, forecast: Forecast, swap_bytes: int) -> MemoryPlace:
    return MemoryPlace(
        place=place.name,
        vms=[vm.name for vm in place.vms],
        needed_bytes=forecast.needed_bytes,
        available_bytes=forecast.there_bytes - swap_bytes,
        swap_bytes=swap_bytes,
    )
