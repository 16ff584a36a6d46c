"""The messages between engine and API server, and the API's own shapes.

Owns the commands (also the bodies of HTTP requests), their results, the snapshot and
the frames that carry them. Promises that every message is checked by type and by size
on arrival. Refuses unknown fields. Imports nothing heavier than pydantic: both
processes pay for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    TypeAdapter,
)

from vmdedup.models import SCHEMA_VERSION, Model, SharingReport, Unmerged, VmList
from vmdedup.units import DEFAULT_RATE, require_rate

SOCKET_NAME = "vmdedup.sock"
"""The API's socket in the runtime directory."""

MAX_REQUESTS = 64
"""Most commands under way at one time; one more is answered `busy`."""

MAX_KNOWN = 50
"""Most known files in one request."""

MAX_EVENTS = 1000
"""Most events kept for `events`."""

JSON_INT_MAX = (1 << 53) - 1
"""Largest integer that every JSON reader and OpenAPI's `maximum` have exactly (RFC 8259, 6)."""


def _numeric(value: object) -> object:
    """Refuse `true` and "1", which pydantic would take for 1 and the schema does not allow."""
    if isinstance(value, bool | str):
        raise ValueError("should be a number")
    return value


_Numeric = BeforeValidator(_numeric)

VmName = Annotated[
    str, Field(min_length=1, max_length=256, description="the VM's name, or its pid in digits")
]
BackendId = Annotated[
    str, Field(min_length=1, max_length=256, description="the memory backend's id in QEMU")
]
Bytes = Annotated[int, Field(ge=0, le=JSON_INT_MAX), _Numeric]
ControlName = Annotated[str, Field(min_length=1, max_length=100)]
ControlNumber = Annotated[int, Field(ge=-JSON_INT_MAX, le=JSON_INT_MAX), _Numeric]
ControlWord = Annotated[str, Field(max_length=100)]
ControlValue = Annotated[
    Annotated[ControlNumber, Tag("number")] | Annotated[ControlWord, Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "number"),
]
SomeVms = Annotated[list[VmName], Field(min_length=1, max_length=256)]

ErrorKind = Literal[
    "usage", "not-found", "conflict", "busy", "unfinished", "gone", "failed", "forbidden"
]
"""usage: makes no sense; not-found: no such VM or backend; conflict: refused in the
present state; busy: not now, nothing was changed, try again; unfinished: begun, and the
rest is tried again by itself; gone: the engine ended meanwhile; failed: tried in vain;
forbidden: not at this listener."""


# Commands: requests to the engine.


class SetControls(Model):
    """Change controls: all of them or none. Names and meanings are KSM's."""

    values: dict[ControlName, ControlValue] = Field(min_length=1, max_length=100)


class Register(Model):
    """Make a range of a memory backend mergeable; without offset and length all of it."""

    vm: VmName
    backend: BackendId
    offset_bytes: Bytes = 0
    length_bytes: Bytes | None = Field(
        default=None, description="length of the range; null: to the backend's end"
    )


class Unregister(Model):
    """Unmerge a range of a memory backend and leave it alone from now on."""

    vm: VmName
    backend: BackendId
    offset_bytes: Bytes = 0
    length_bytes: Bytes | None = Field(
        default=None, description="length of the range; null: to the backend's end"
    )


class Attach(Model):
    """Attach to the VM behind a QMP socket, or to a domain of the libvirt that is followed."""

    qmp: str = Field(
        min_length=1,
        max_length=4096,
        description="path of the QMP socket, or the domain's name or UUID",
    )


class Detach(Model):
    """Detach from a VM; its merged pages stay merged."""

    vm: VmName


class UnmergeVms(Model):
    """Give pages their own memory back."""

    vms: SomeVms | None = Field(default=None, description="names or pids of VMs; null: all VMs")


class MergeNow(Model):
    """Merge until the VMs have converged or the time is over."""

    vms: SomeVms | None = Field(default=None, description="names or pids of VMs; null: all VMs")
    timeout_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False), _Numeric] = 120.0


class FreshReport(Model):
    """Read the sharing from the kernel's page tables again."""


class ReadSketch(Model):
    """Sample the contents of a VM."""

    vm: VmName
    rate: Annotated[int, AfterValidator(require_rate)] = DEFAULT_RATE


HostPath = Annotated[
    str,
    Field(
        max_length=4096, pattern=r"^/[^\x00]*$", description="absolute path on the daemon's host"
    ),
]


class ReadContentSources(Model):
    """Say from which known files the contents of memory come. Reads all memory of the VMs once."""

    known: list[HostPath] = Field(
        min_length=1,
        max_length=MAX_KNOWN,
        description="kernels, initrds, disk images, ISO files, folders; the first that has a"
        " content wins",
    )


class CompareWithKsm(Model):
    """Say what KSM would save on the same VMs. Reads all memory of the VMs once."""


Command = (
    SetControls
    | Register
    | Unregister
    | Attach
    | Detach
    | UnmergeVms
    | MergeNow
    | FreshReport
    | ReadSketch
    | ReadContentSources
    | CompareWithKsm
)

_COMMANDS: dict[str, type[Command]] = {
    "set-controls": SetControls,
    "register": Register,
    "unregister": Unregister,
    "attach": Attach,
    "detach": Detach,
    "unmerge": UnmergeVms,
    "merge-now": MergeNow,
    "report": FreshReport,
    "sketch": ReadSketch,
    "content-sources": ReadContentSources,
    "compare-with-ksm": CompareWithKsm,
}
_OPERATION = {kind: name for name, kind in _COMMANDS.items()}


# Results: SetControls gives ControlValues, (Un)Register a Registration, Attach a VmListing,
# Detach a Detached, UnmergeVms an Unmerged, MergeNow and FreshReport a SharingReport,
# ReadSketch a VmSketch, ReadContentSources a ContentSources, CompareWithKsm a SharingReport.


class ControlValues(Model):
    """Every control with its value."""

    schema_version: int = SCHEMA_VERSION
    values: dict[ControlName, ControlValue]


class ByteRange(Model):
    """A range of a memory backend."""

    offset_bytes: Bytes
    length_bytes: Bytes
    reason: str | None = Field(default=None, description="why it is not merged; null if it is")


class Registration(Model):
    """The ranges of a memory backend that are registered now."""

    schema_version: int = SCHEMA_VERSION
    vm: str
    backend: str
    complete: bool = Field(
        description="false if the range had holes and only the rest was registered"
    )
    registered: tuple[ByteRange, ...]
    skipped: tuple[ByteRange, ...] = ()
    unmerged_pages: int = 0
    reason: str | None = Field(default=None, description="why nothing of it will be merged")


class Detached(Model):
    """A VM that the engine has detached from."""

    schema_version: int = SCHEMA_VERSION
    vm: str
    pid: int | None
    merged_pages: int = Field(description="pages that stay merged")


class Refusal(Model):
    """The engine's reason for not carrying out a request, in one line."""

    kind: ErrorKind
    message: str
    unmerged: Unmerged | None = Field(
        default=None, description="if `unfinished`: the pages unmerged, and those left"
    )


# State: the engine sends it without being asked.


class Event(Model):
    """Something that happened. `seq` grows, also over restarts of the engine."""

    seq: int = Field(ge=0, le=JSON_INT_MAX)
    unix_s: float
    kind: str
    vm: str | None = None
    message: str


class EventList(Model):
    """Events in order of `seq`; ask with `since=next_since` for those that follow."""

    schema_version: int = SCHEMA_VERSION
    events: list[Event]
    next_since: int


class Histogram(Model):
    """How often a duration fell between two bounds, since the engine's start."""

    upper_bounds_s: tuple[float, ...] = (
        0.0005,
        0.001,
        0.0025,
        0.005,
        0.01,
        0.025,
        0.05,
        0.1,
        0.25,
        0.5,
        1.0,
        5.0,
    )
    counts: tuple[int, ...] = (0,) * 13
    """One a bound, and one for what is longer than all of them."""
    sum_s: float = 0.0

    def plus(self, durations_ms: Iterable[float]) -> Histogram:
        """The histogram with further durations."""
        counts = list(self.counts)
        sum_s = self.sum_s
        for duration_ms in durations_ms:
            duration_s = duration_ms / 1000
            counts[bisect_left(self.upper_bounds_s, duration_s)] += 1
            sum_s += duration_s
        return Histogram(upper_bounds_s=self.upper_bounds_s, counts=tuple(counts), sum_s=sum_s)


class LibvirtHealth(Model):
    """The connection to libvirt."""

    uri: str
    connected: bool
    since_unix_s: float = Field(description="time at which it was made or lost")
    reason: str | None = Field(
        default=None, description="why there is no connection; merges are kept"
    )


class EngineHealth(Model):
    """The engine as it saw itself when it pushed."""

    engine_pid: int
    guardian_pid: int | None = None
    started_unix_s: float
    cpu_s: float = Field(default=0.0, description="CPU time of the engine since its start")
    passes: int
    last_pass_unix_s: float | None = Field(default=None, description="end of the last pass")
    last_pass_ms: float | None = None
    libvirt: LibvirtHealth | None = Field(
        default=None, description="connection to libvirt; null without one"
    )


class HistoryHealth(Model):
    """How the history is kept."""

    directory: str | None = Field(description="place on disk; null if the settings keep none there")
    problem: str | None = Field(
        default=None, description="why samples are only in memory; they are written later"
    )
    unsaved_samples: int = 0
    moved_aside: str | None = Field(
        default=None,
        description="damaged file that was moved aside since the start, and its new name",
    )


class Health(Model):
    """The server, the engine behind it, and the age of its snapshot."""

    schema_version: int = SCHEMA_VERSION
    version: str
    server_pid: int
    snapshot_age_ms: float
    engine: EngineHealth
    history: HistoryHealth | None = Field(
        default=None, description="state of the history; null if none is kept"
    )


class Snapshot(Model):
    """The state from which the server answers reads.

    `events` needs only those since the last push: the server keeps MAX_EVENTS,
    and none is lost when a snapshot is superseded before it was sent.
    """

    unix_s: float
    report: SharingReport
    vms: VmList
    controls: ControlValues
    health: EngineHealth
    events: tuple[Event, ...] = ()
    gates: Histogram | None = None
    drains: Histogram | None = None


# Frames: JSON, each after its length.


class RequestFrame(Model):
    """Server to engine: do this, unless it is already later than that."""

    id: int
    operation: str
    begin_before_monotonic_s: float
    """CLOCK_MONOTONIC, which both processes share. Later than this the server has told
    its client that nothing was begun, so the engine must not begin."""
    body: JsonValue


class SnapshotFrame(Model):
    """Engine to server: the state now."""

    kind: Literal["snapshot"] = "snapshot"
    snapshot: Snapshot


class TakenFrame(Model):
    """Engine to server: the request is being worked on."""

    kind: Literal["taken"] = "taken"
    id: int


class ReplyFrame(Model):
    """Engine to server: the request is done (`result`) or not (`refusal`)."""

    kind: Literal["reply"] = "reply"
    id: int
    result: JsonValue = None
    refusal: Refusal | None = None


EngineFrame = SnapshotFrame | TakenFrame | ReplyFrame
ENGINE_FRAME: TypeAdapter[EngineFrame] = TypeAdapter(
    Annotated[EngineFrame, Field(discriminator="kind")]
)


@dataclass(frozen=True)
class Request:
    """A command that the engine has taken and must answer once, by `id`."""

    id: int
    command: Command


def frame_of(request_id: int, command: Command, begin_before_monotonic_s: float) -> RequestFrame:
    """The frame that carries `command` to the engine."""
    return RequestFrame(
        id=request_id,
        operation=_OPERATION[type(command)],
        begin_before_monotonic_s=begin_before_monotonic_s,
        body=command.model_dump(mode="json"),
    )


def command_of(frame: RequestFrame) -> Command:
    """The command in a frame. Raises ValueError (such as ValidationError) if there is none."""
    kind = _COMMANDS.get(frame.operation)
    if kind is None:
        raise ValueError(f"no operation {frame.operation!r}")
    return kind.model_validate(frame.body)
