"""What `vmdedup fleet` prints, as typed documents."""

from __future__ import annotations

from pydantic import Field

from vmdedup.models import SCHEMA_VERSION, Model


class HostRow(Model):
    """One host of the list."""

    host: str
    url: str
    reason: str | None = Field(default=None, description="why it, or some of it, is not counted")
    vms: int = 0
    present_bytes: int = Field(default=0, description="memory that its VMs would hold unmerged")
    saved_bytes: int = 0


class FleetReport(Model):
    """What is saved on all hosts."""

    schema_version: int = SCHEMA_VERSION
    hosts: list[HostRow]
    vms: int
    present_bytes: int
    saved_bytes: int


class VmPlace(Model):
    """A VM, and the host that it runs on."""

    host: str
    vm: str


class Alike(Model):
    """Two VMs, and what both have."""

    one: VmPlace
    other: VmPlace
    shared_bytes: int = Field(description="estimate of what is saved more with both on one host")
    error_bytes: int = Field(description="its standard error")
    of_one: float = Field(description="part of the first VM's contents that the second has")
    of_other: float


class Kind(Model):
    """VMs that are alike."""

    trust_domain: str
    vms: list[VmPlace]


class FleetSimilarity(Model):
    """Which VMs are alike, on whatever hosts."""

    schema_version: int = SCHEMA_VERSION
    rate: int = Field(description="contents for each one that was compared")
    hosts: list[HostRow]
    kinds: list[Kind] = Field(description="largest first; VMs like no other are left out")
    pairs: list[Alike] = Field(description="most shared first, only the first some")


class Move(Model):
    """One VM that should run elsewhere."""

    vm: str
    source: str
    target: str
    moved_bytes: int = Field(description="memory that a migration would carry over")


class GroupedVm(Model):
    """A VM of a group."""

    vm: str
    qmp: str | None = Field(default=None, description="its monitor's socket, on its host")


class Group(Model):
    """VMs that are alike, and that the plan has on one host."""

    host: str
    vms: list[GroupedVm]


class FleetPlan(Model):
    """Where VMs should run. Nothing was moved."""

    schema_version: int = SCHEMA_VERSION
    rate: int
    hosts: list[HostRow]
    moves: list[Move]
    groups: list[Group]
    moved_bytes: int
    saved_bytes: int = Field(description="estimate of what the moves together save more")
    error_bytes: int = Field(description="its standard error")
    most_bytes: int = Field(description="no placement at all saves more than this, by estimate")
    random_bytes: int = Field(description="what random placement would save more; may be negative")
    by_name_bytes: int = Field(description="what filling hosts in order of names would save more")


class PlaceForOne(Model):
    """A host for one more VM."""

    host: str
    shared_bytes: int = Field(description="estimate of what the new VM shares there")
    error_bytes: int
    has_room: bool


class FleetCandidates(Model):
    """Hosts for one more VM like one that there is, the best first."""

    schema_version: int = SCHEMA_VERSION
    like: VmPlace
    rate: int
    hosts: list[HostRow]
    candidates: list[PlaceForOne]
