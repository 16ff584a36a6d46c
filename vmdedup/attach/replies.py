"""QEMU's answers, as bounded types.

Owns the shape of every QMP reply that this project reads (QEMU's qapi/*.json; members
that are not needed are ignored, members that came later are optional). Promises that
every accepted value is bounded in length and range: a monitor is somebody else's
process and may send anything. Refuses by pydantic's ValidationError, which
`Monitor.query` turns into a MonitorError.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

MAX_TEXT = 4096
"""Longest name, path or type taken from a reply."""
MAX_ITEMS = 65536
"""Longest list taken from a reply."""
MAX_HMP_TEXT = 4 << 20
"""Longest answer of a human monitor command; `info mtree` has some 20 KiB."""

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Count = Annotated[int, Field(ge=0, lt=1 << 64)]
Identifier = Annotated[int, Field(ge=-1, lt=1 << 31)]


class Reply(BaseModel):
    """Base: frozen, by QMP's own names, unknown members ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class VersionTriple(Reply):
    """`VersionTriple`: 7.2.22 and the like."""

    major: Identifier
    minor: Identifier
    micro: Identifier = 0

    def as_tuple(self) -> tuple[int, int, int]:
        """(major, minor, micro)."""
        return (self.major, self.minor, self.micro)


class Version(Reply):
    """`VersionInfo`."""

    qemu: VersionTriple


class GreetingBody(Reply):
    """The value of the greeting's `QMP` member."""

    version: Version


class Greeting(Reply):
    """The first thing a QMP server says."""

    body: GreetingBody = Field(alias="QMP")


class ErrorBody(Reply):
    """The value of a reply's `error` member."""

    error_class: Text = Field(default="", alias="class")
    description: str = Field(default="", alias="desc")


class Memdev(Reply):
    """`Memdev` of query-memdev; `id` is absent for objects without a name."""

    id: Text | None = None
    size: Count
    merge: bool
    dump: bool
    prealloc: bool
    share: bool = False
    host_nodes: Annotated[list[Count], Field(alias="host-nodes", max_length=1024)] = []
    policy: Text = "default"


class QomProperty(Reply):
    """`ObjectPropertyInfo` of qom-list."""

    name: Text
    type: Text

    @property
    def child_type(self) -> str | None:
        """T of `child<T>`; `None` when the property is not a child."""
        if self.type.startswith("child<") and self.type.endswith(">"):
            return self.type[len("child<") : -1]
        return None


class CpuFast(Reply):
    """`CpuInfoFast`."""

    thread_id: Identifier = Field(alias="thread-id")


class IoThread(Reply):
    """`IOThreadInfo`."""

    id: Text
    thread_id: Identifier = Field(alias="thread-id")


class Status(Reply):
    """`StatusInfo`."""

    status: Text
    running: bool


class Name(Reply):
    """`NameInfo`."""

    name: Text | None = None


class AddedFd(Reply):
    """`AddfdInfo`: the set and the descriptor's number inside QEMU."""

    fdset_id: Count = Field(alias="fdset-id")
    fd: Identifier


class FdSetEntry(Reply):
    """`FdsetFdInfo`."""

    opaque: Text | None = None


class FdSet(Reply):
    """`FdsetInfo` of query-fdsets."""

    fdset_id: Count = Field(alias="fdset-id")
    fds: Annotated[list[FdSetEntry], Field(max_length=MAX_ITEMS)]


class CharDevice(Reply):
    """`ChardevInfo`."""

    label: Text
    filename: Text


class BlockNode(Reply):
    """`BlockDeviceInfo` of query-named-block-nodes; `drv` is the driver."""

    node_name: Text = Field(default="", alias="node-name")
    driver: Text = Field(alias="drv")


class MigrationState(Reply):
    """`MigrationInfo`; without `status` no migration was ever started."""

    status: Text | None = None


class MigrationCapability(Reply):
    """`MigrationCapabilityStatus`."""

    capability: Text
    state: bool


class MigrationParameters(Reply):
    """The one member of `MigrationParameters` that matters (QEMU 8.2 and newer)."""

    mode: Text = "normal"


class Replay(Reply):
    """`ReplayInfo`."""

    mode: Text


class Sev(Reply):
    """`SevInfo`."""

    enabled: bool


class Dump(Reply):
    """`DumpQueryResult`."""

    status: Text


class Stat(Reply):
    """`Stats`: one named value; lists and histograms are read as `None`."""

    name: Text
    value: Count | bool | list[Count] | None = None


class StatsResult(Reply):
    """`StatsResult` of query-stats."""

    stats: Annotated[list[Stat], Field(max_length=MAX_ITEMS)] = []


class BlockCounts(Reply):
    """`BlockDeviceStats`; each figure counts requests that have ended, not those begun."""

    rd_operations: Count = 0
    wr_operations: Count = 0
    flush_operations: Count = 0
    unmap_operations: Count = 0
    rd_total_time_ns: Count = 0
    wr_total_time_ns: Count = 0
    flush_total_time_ns: Count = 0
    unmap_total_time_ns: Count = 0
    failed_rd_operations: Count = 0
    failed_wr_operations: Count = 0
    failed_flush_operations: Count = 0
    failed_unmap_operations: Count = 0
    idle_time_ns: Count | None = None

    @property
    def ended(self) -> int:
        """Requests that have ended, successfully or not."""
        done = self.rd_operations + self.wr_operations
        done += self.flush_operations + self.unmap_operations
        failed = self.failed_rd_operations + self.failed_wr_operations
        return done + failed + self.failed_flush_operations + self.failed_unmap_operations

    @property
    def spent_s(self) -> float:
        """Sum of the times that ended requests took, seconds."""
        spent_ns = self.rd_total_time_ns + self.wr_total_time_ns
        return (spent_ns + self.flush_total_time_ns + self.unmap_total_time_ns) / 1e9


class BlockStats(Reply):
    """`BlockStats` of query-blockstats."""

    device: Text = ""
    qdev: Text | None = None
    node_name: Text | None = Field(default=None, alias="node-name")
    """`None` while the drive has no medium."""
    stats: BlockCounts = BlockCounts()


class VirtioDevice(Reply):
    """`VirtioInfo` of x-query-virtio."""

    path: Text
    name: Text


class QueueStatus(Reply):
    """`VirtQueueStatus`."""

    inuse: Count = 0
    """Requests that the device has taken and not yet returned."""
    used_idx: Count = Field(default=0, alias="used-idx")


class PciClass(Reply):
    """`PciDeviceClass`."""

    code: Count = Field(alias="class")


class PciRegion(Reply):
    """`PciMemoryRegion`; `address` is -1 while the guest has not mapped it."""

    bar: Identifier
    address: Annotated[int, Field(ge=-1, lt=1 << 64)]


class PciDevice(Reply):
    """`PciDeviceInfo`."""

    class_info: PciClass
    regions: Annotated[list[PciRegion], Field(max_length=64)] = []


class PciBus(Reply):
    """`PciInfo`."""

    devices: Annotated[list[PciDevice], Field(max_length=MAX_ITEMS)] = []


class BalloonSize(Reply):
    """`BalloonInfo`."""

    actual: Count


class MemorySize(Reply):
    """`MemoryInfo`."""

    base_memory: Count = Field(alias="base-memory")


class MemoryDeviceData(Reply):
    """A memory device's own data; the last two of virtio-mem only."""

    size: Count = 0
    max_size: Annotated[Count, Field(alias="max-size")] = 0
    memdev: Text = ""


class MemoryDevice(Reply):
    """`MemoryDeviceInfo`."""

    type: Text
    data: MemoryDeviceData


Memdevs = TypeAdapter(Annotated[list[Memdev], Field(max_length=MAX_ITEMS)])
QomProperties = TypeAdapter(Annotated[list[QomProperty], Field(max_length=MAX_ITEMS)])
CpusFast = TypeAdapter(Annotated[list[CpuFast], Field(max_length=MAX_ITEMS)])
BalloonReply = TypeAdapter(BalloonSize)
MemorySizeReply = TypeAdapter(MemorySize)
MemoryDevices = TypeAdapter(Annotated[list[MemoryDevice], Field(max_length=MAX_ITEMS)])
IoThreads = TypeAdapter(Annotated[list[IoThread], Field(max_length=MAX_ITEMS)])
FdSets = TypeAdapter(Annotated[list[FdSet], Field(max_length=MAX_ITEMS)])
CharDevices = TypeAdapter(Annotated[list[CharDevice], Field(max_length=MAX_ITEMS)])
BlockNodes = TypeAdapter(Annotated[list[BlockNode], Field(max_length=MAX_ITEMS)])
BlockStatsList = TypeAdapter(Annotated[list[BlockStats], Field(max_length=MAX_ITEMS)])
VirtioDevices = TypeAdapter(Annotated[list[VirtioDevice], Field(max_length=MAX_ITEMS)])
QueueStatusReply = TypeAdapter(QueueStatus)
PciBuses = TypeAdapter(Annotated[list[PciBus], Field(max_length=256)])
Capabilities = TypeAdapter(Annotated[list[MigrationCapability], Field(max_length=MAX_ITEMS)])
Stats = TypeAdapter(Annotated[list[StatsResult], Field(max_length=MAX_ITEMS)])
StatusReply = TypeAdapter(Status)
NameReply = TypeAdapter(Name)
AddedFdReply = TypeAdapter(AddedFd)
VersionReply = TypeAdapter(Version)
MigrationReply = TypeAdapter(MigrationState)
MigrationParametersReply = TypeAdapter(MigrationParameters)
ReplayReply = TypeAdapter(Replay)
SevReply = TypeAdapter(Sev)
DumpReply = TypeAdapter(Dump)
GreetingReply = TypeAdapter(Greeting)
ErrorReply = TypeAdapter(ErrorBody)
HmpReply = TypeAdapter(Annotated[str, Field(max_length=MAX_HMP_TEXT)])
TextReply = TypeAdapter(Text)
FlagReply = TypeAdapter(bool)
