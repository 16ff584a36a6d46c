"""A report against an earlier one: which VMs share less than they did.

Pure. VMs are matched by name; several of one name count together. Compares the share
saved of what a VM would hold, in percentage points: a VM that holds more or less than
last time does not share less for that reason. Promises to name the VMs that cannot be
compared. Refuses to judge a VM that is not there any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from vmdedup.models import SharingReport, VmReport


@dataclass(frozen=True)
class Saved:
    """Bytes saved, and bytes that would be held without vmdedup."""

    saved_bytes: int
    present_bytes: int

    @classmethod
    def of(cls, vms: list[VmReport]) -> Self:
        """The sum over some VMs."""
        return cls(sum(vm.saved_bytes for vm in vms), sum(vm.present_bytes for vm in vms))

    @property
    def percent(self) -> float:
        """The share saved, in percent; `0` if nothing is held."""
        return 100 * self.saved_bytes / self.present_bytes if self.present_bytes else 0.0


@dataclass(frozen=True)
class Difference:
    """One VM (or all of them together) then and now."""

    name: str
    before: Saved
    now: Saved
    tolerance_percent: float

    @property
    def points(self) -> float:
        """Percentage points gained; negative if less is shared."""
        return self.now.percent - self.before.percent

    @property
    def shares_less(self) -> bool:
        """Whether it lost more than the tolerance."""
        return self.points < -self.tolerance_percent


@dataclass(frozen=True)
class Comparison:
    """A report against its baseline."""

    host: Difference
    vms: tuple[Difference, ...]
    missing: tuple[str, ...]
    """VMs of the baseline that are not there now."""
    new: tuple[str, ...]

    @property
    def worse(self) -> list[Difference]:
        """All that share less than they may: VMs, then the host."""
        everything = (*self.vms, self.host)
        return [difference for difference in everything if difference.shares_less]


def compare(now: SharingReport, before: SharingReport, tolerance_percent: float) -> Comparison:
    """`now` against `before`; up to `tolerance_percent` points less are no loss."""
    ours, theirs = _by_name(now), _by_name(before)
    both = [name for name in theirs if name in ours]
    return Comparison(
        host=Difference(
            "all VMs", Saved.of(before.vms), Saved.of(now.vms), tolerance_percent=tolerance_percent
        ),
        vms=tuple(
            Difference(name, theirs[name], ours[name], tolerance_percent=tolerance_percent)
            for name in both
        ),
        missing=tuple(name for name in theirs if name not in ours),
        new=tuple(name for name in ours if name not in theirs),
    )


def _by_name(report: SharingReport) -> dict[str, Saved]:
    groups: dict[str, list[VmReport]] = {}
    for vm in report.vms:
        groups.setdefault(vm.name, []).append(vm)
    return {name: Saved.of(vms) for name, vms in groups.items()}
