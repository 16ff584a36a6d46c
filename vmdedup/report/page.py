"""The text of pages beside the charts: facts, counters and notes, put into words.

Pure. Shared by the report's file and by the dashboard, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from vmdedup.models import HostReport, SharingReport, VmReport, VmStatus
from vmdedup.report import memory
from vmdedup.report.words import count, milliseconds, size

NoteKind = Literal["failed", "refused", "gone", "waiting", "hint"]
_KIND: dict[VmStatus, NoteKind] = {
    "merged": "waiting",
    "scanning": "waiting",
    "failed": "failed",
    "refused": "refused",
    "gone": "gone",
}


class Note(NamedTuple):
    """Something to know about one VM: why it is not merged, or what would improve it."""

    vm: VmReport
    kind: NoteKind
    text: str


def facts(report: SharingReport) -> list[tuple[str, str]]:
    """The few figures below the headline."""
    host = report.host
    shown = [
        ("pages saved by sharing", count(host.pages_sharing)),
        ("pages saved as zero", count(host.zero_pages)),
        ("store pages", count(host.pages_shared)),
        ("broken by writes", count(host.cow_broken_pages)),
    ]
    if host.huge_pages or host.huge_pages_split or host.pages_kept_in_huge:
        shown.append(("huge pages", count(host.huge_pages)))
        shown.append(("huge pages split", count(host.huge_pages_split)))
        shown.append(("pages kept in huge pages", count(host.pages_kept_in_huge)))
    if host.cold_pages or host.cold_refaults_per_s:
        shown.append(("given back by cold pages", size(host.cold_bytes_saved)))
        shown.append(("cold pages that come back soon", f"{host.cold_refaults_per_s:.1f}/s"))
    if host.overhead_bytes is not None:
        shown.append(("overhead", size(host.overhead_bytes)))
    if host.gate_ms.count:
        shown.append((f"p99 of {host.gate_ms.count:,} gates", milliseconds(host.gate_ms.p99)))
    if host.stopped_ms is not None:
        shown.append(("VMs paused for", milliseconds(host.stopped_ms)))
    for place in memory.shown(report.memory):
        figures = f"{size(place.needed_bytes)}, {size(place.there_bytes)} are there"
        shown.append((f"needed of {memory.title(place)} if all is written", figures))
    return shown


def counters(host: HostReport) -> list[tuple[str, str, str]]:
    """Every counter: its name, its value and what it means."""
    rows = []
    for name, field in HostReport.model_fields.items():
        value = getattr(host, name)
        if name.endswith(("_bytes", "_bytes_saved")):
            shown = "-" if value is None else size(value)
        elif value is None or isinstance(value, int):
            shown = count(value)
        elif name.endswith("_per_s"):
            shown = f"{value:.1f}/s"
        elif isinstance(value, float):
            shown = milliseconds(value)
        else:
            marks = f"p50 {milliseconds(value.p50)}, p99 {milliseconds(value.p99)}"
            shown = f"{value.count:,}: {marks}" if value.count else "-"
        rows.append((name, shown, field.description or ""))
    return rows


def notes(vms: Sequence[VmReport]) -> list[Note]:
    """Refusals, pages that wait, and hints, in the order of the VMs."""
    found = []
    for vm in vms:
        if vm.reason:
            found.append(Note(vm, _KIND[vm.status], vm.reason))
        if vm.hint:
            found.append(Note(vm, "hint", vm.hint))
    return found
