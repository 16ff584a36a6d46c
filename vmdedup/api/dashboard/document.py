"""The dashboard's documents, made from the engine's last snapshot.

Pure. Owns the shape of `state.json` and `vm.json`. Promises that their size grows
with the number of VMs, not with its square: the matrix covers only the VMs that
share most, and each VM lists only its best partners. Words come from `vmdedup.report`,
so that the page and the report's file say the same.
"""

from __future__ import annotations

from vmdedup.history.series import vm_keys
from vmdedup.ipc.protocol import ControlName, ControlValue, EngineHealth, Histogram, Snapshot
from vmdedup.models import (
    BackendListing,
    FindingListing,
    Matrix,
    Model,
    RepeatedContent,
    SharingReport,
    VmListing,
    VmReport,
)
from vmdedup.report import memory
from vmdedup.report.page import NoteKind, counters, facts, notes
from vmdedup.report.parts import FUNNEL_NOTES, PARTS, funnel_parts, parts_in_use, ram_parts

MATRIX_VMS = 40
"""Most VMs in the heat map: more cannot be told apart."""

_PARTNERS = 10
_FUNNEL_NOTES = FUNNEL_NOTES | {
    "unique": "no other page of its trust domain has its content",
    "pending": "has an equal, merged in the next pass; or was not looked at twice yet",
}
"""Notes that combine parts which a snapshot cannot tell apart."""


class Charts(Model):
    """Plotly's JavaScript, as it is served."""

    script: str
    """Address of the script."""
    sheet_ids: list[str]
    """Ids of elements that keep the script from adding style sheets of its own."""


class NamedPart(Model):
    """A part that RAM is in, and what it means."""

    name: str
    means: str


class NamedValue(Model):
    """A figure, in words."""

    name: str
    value: str
    means: str = ""


class VmRow(Model):
    """One VM in the table and in the bars."""

    key: str
    """The VM's name, with its pid if another VM has that name too; no two are the same."""
    name: str
    pid: int | None
    status: str
    trust_domain: str | None
    ram_bytes: int
    present_bytes: int
    saved_bytes: int
    merged_pages: int
    zero_pages: int
    cow_broken_pages: int
    cow_breaks: int | None
    deferred_pages: int | None
    huge_pages: int | None
    pages_kept_in_huge: int | None
    cold_pages: int
    vmas: int
    parts_bytes: list[int]
    """Bytes of each of the state's `parts`, in their order."""


class VmNote(Model):
    """Why a VM is not merged, or what would do it good."""

    key: str
    name: str
    status: str
    kind: NoteKind
    text: str


class State(Model):
    """Everything but the detail of one VM."""

    version: str
    unix_s: float
    charts: Charts | None
    """Null if Plotly is not installed."""
    engine: EngineHealth
    controls: dict[ControlName, ControlValue]
    saved_bytes: int
    present_bytes: int
    cow_breaks: int | None
    facts: list[NamedValue]
    counters: list[NamedValue]
    notes: list[VmNote]
    parts: list[NamedPart]
    vms: list[VmRow]
    matrix: Matrix
    matrix_of_vms: int
    """Number of VMs that the matrix was chosen from."""
    lacking: list[str]
    """A line for each place whose memory would not suffice if all were written."""
    contents: list[RepeatedContent]
    gates: Histogram | None
    drains: Histogram | None


class FunnelPart(Model):
    """One step of the funnel."""

    name: str
    pages: int
    means: str


class Partner(Model):
    """A VM that maps some of the same contents."""

    key: str
    name: str
    pages: int


class VmDetail(Model):
    """One VM, in full."""

    key: str
    report: VmReport
    funnel: list[FunnelPart]
    partners: list[Partner]
    qemu_version: str | None
    qmp: str | None
    backends: list[BackendListing]
    findings: list[FindingListing]


def state_of(snapshot: Snapshot, version: str, charts: Charts | None) -> State:
    """The page's state."""
    report = snapshot.report
    keys = vm_keys(report.vms)
    in_use = parts_in_use(report.vms)
    return State(
        version=version,
        unix_s=snapshot.unix_s,
        charts=charts,
        engine=snapshot.health,
        controls=snapshot.controls.values,
        saved_bytes=report.host.saved_bytes,
        present_bytes=sum(vm.present_bytes for vm in report.vms),
        cow_breaks=report.host.cow_breaks,
        facts=[NamedValue(name=name, value=value) for name, value in facts(report)],
        counters=[
            NamedValue(name=name, value=value, means=means)
            for name, value, means in counters(report.host)
        ],
        notes=_notes(report.vms, keys),
        parts=[NamedPart(name=name, means=PARTS[name]) for name in in_use],
        vms=[_row(vm, key, in_use) for vm, key in zip(report.vms, keys, strict=True)],
        matrix=_most_shared(report.matrix),
        matrix_of_vms=len(report.matrix.vms),
        lacking=[memory.line(place) for place in report.memory if place.is_lacking],
        contents=report.contents,
        gates=snapshot.gates,
        drains=snapshot.drains,
    )


def detail_of(snapshot: Snapshot, wanted: str) -> VmDetail | None:
    """One VM by its name or pid, in full; `None` if there is none of that name."""
    report = snapshot.report
    keys = vm_keys(report.vms)
    number = _find(report.vms, keys, wanted)
    if number is None:
        return None
    vm = report.vms[number]
    listed = _listing(snapshot.vms.vms, vm)
    return VmDetail(
        key=keys[number],
        report=vm,
        funnel=[
            FunnelPart(name=name, pages=pages, means=_FUNNEL_NOTES[name])
            for name, pages in funnel_parts(vm).items()
        ],
        partners=_partners(report, number, keys),
        qemu_version=None if listed is None else listed.qemu_version,
        qmp=None if listed is None else listed.qmp,
        backends=[] if listed is None else listed.backends,
        findings=[] if listed is None else listed.findings,
    )


def _find(vms: list[VmReport], keys: list[str], wanted: str) -> int | None:
    for names in (keys, [vm.name for vm in vms], [str(vm.pid) for vm in vms]):
        if wanted in names:
            return names.index(wanted)
    return None


def _row(vm: VmReport, key: str, in_use: list[str]) -> VmRow:
    parts = ram_parts(vm)
    return VmRow(
        key=key,
        name=vm.name,
        pid=vm.pid,
        status=vm.status,
        trust_domain=vm.trust_domain,
        ram_bytes=vm.ram_bytes,
        present_bytes=vm.present_bytes,
        saved_bytes=vm.saved_bytes,
        merged_pages=vm.merged_pages,
        zero_pages=vm.zero_pages,
        cow_broken_pages=vm.cow_broken_pages,
        cow_breaks=vm.cow_breaks,
        deferred_pages=vm.deferred_pages,
        huge_pages=vm.huge_pages,
        pages_kept_in_huge=vm.pages_kept_in_huge,
        cold_pages=vm.cold_pages,
        vmas=vm.vmas,
        parts_bytes=[parts[name] for name in in_use],
    )


def _notes(vms: list[VmReport], keys: list[str]) -> list[VmNote]:
    key_of = {id(vm): key for vm, key in zip(vms, keys, strict=True)}
    return [
        VmNote(key=key_of[id(vm)], name=vm.name, status=vm.status, kind=kind, text=text)
        for vm, kind, text in notes(vms)
    ]


def _most_shared(matrix: Matrix) -> Matrix:
    """The matrix of the VMs that map most contents, in their former order."""
    numbers = range(len(matrix.vms))
    chosen = sorted(sorted(numbers, key=lambda i: -matrix.pages[i][i])[:MATRIX_VMS])
    return Matrix(
        vms=[matrix.vms[i] for i in chosen],
        pages=[[matrix.pages[i][j] for j in chosen] for i in chosen],
    )


def _partners(report: SharingReport, number: int, keys: list[str]) -> list[Partner]:
    """The VMs that share most with a VM; the matrix has the attached VMs, which come first."""
    matrix = report.matrix
    if number >= len(matrix.vms):
        return []
    shared = [
        (pages, other)
        for other, pages in enumerate(matrix.pages[number])
        if pages and other != number
    ]
    return [
        Partner(key=keys[other], name=matrix.vms[other], pages=pages)
        for pages, other in sorted(shared, key=lambda each: -each[0])[:_PARTNERS]
    ]


def _listing(listed: list[VmListing], vm: VmReport) -> VmListing | None:
    """The listing of a reported VM: that of its process, otherwise that of its name."""
    of_process = [each for each in listed if each.pid is not None and each.pid == vm.pid]
    return next(iter(of_process or [each for each in listed if each.name == vm.name]), None)
