"""The sharing report as a table: one row a VM, then who shares with whom.

Owns the layout of `vmdedup run` and `vmdedup report`. Fits 100 columns up to
large VMs; reasons and hints stand below the table, where they have room.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from vmdedup.models import Durations, Matrix, SharingReport, VmReport
from vmdedup.report.console import make_console, make_table, print_notes
from vmdedup.report.words import count, milliseconds, number_of, share, size

_MATRIX_VMS = 10
_STATUS_STYLE = {"merged": "green", "scanning": "yellow", "refused": "red", "gone": "red"}


def show_report(report: SharingReport, console: Console | None = None) -> None:
    """Print the report."""
    console = console or make_console()
    console.print(_headline(report))
    for line in _facts(report):
        console.print(line)
    console.print()
    _print_vms(console, report.vms)
    notes = _notes(report.vms)
    if notes:
        console.print()
        print_notes(console, notes)
    if any(pages for row in report.matrix.pages for pages in row):
        console.print()
        _print_matrix(console, report.matrix)


def _headline(report: SharingReport) -> Text:
    host = report.host
    present = sum(vm.present_bytes for vm in report.vms)
    line = Text.assemble(
        (f"{size(host.saved_bytes)} saved", "bold green" if host.saved_bytes > 0 else "bold"),
        f" of {size(present)} held by {number_of(len(report.vms), 'VM')}",
        f" ({share(host.saved_bytes, present)})",
    )
    if report.converged is not None:
        line.append("; converged" if report.converged else "; not converged yet")
    return line


def _facts(report: SharingReport) -> list[str]:
    host = report.host
    lines = [
        f"pages_shared {count(host.pages_shared)}, pages_sharing {count(host.pages_sharing)},"
        f" zero_pages {count(host.zero_pages)}, cow_broken_pages {count(host.cow_broken_pages)}"
    ]
    if host.full_scans is not None:
        lines.append(
            f"pages_unshared {count(host.pages_unshared)},"
            f" pages_volatile {count(host.pages_volatile)},"
            f" full_scans {count(host.full_scans)}, pages_scanned {count(host.pages_scanned)}"
        )
    if host.overhead_bytes is not None and host.profit_bytes is not None:
        lines.append(f"overhead {size(host.overhead_bytes)}, profit {size(host.profit_bytes)}")
    for name, what in (("gates", host.gate_ms), ("drains", host.drain_ms)):
        if what.count:
            lines.append(f"{name} {_distribution(what)}")
    if host.stopped_ms is not None:
        paused = host.stopped_ms > 0
        lines.append(
            f"VMs were paused for {milliseconds(host.stopped_ms)}" if paused else "no VM was paused"
        )
    return lines


def _distribution(what: Durations) -> str:
    marks = (("p50", what.p50), ("p95", what.p95), ("p99", what.p99), ("max", what.max))
    return f"{what.count:,}: " + ", ".join(f"{name} {milliseconds(ms)}" for name, ms in marks)


def _print_vms(console: Console, vms: list[VmReport]) -> None:
    domains = len({vm.trust_domain for vm in vms if vm.trust_domain}) > 1
    headers = ["VM", *(["domain"] if domains else []), "status", "RAM", "held", "merged", "zero"]
    headers += ["broken", "waiting", "VMAs", "saved"]
    footer = [
        "all" if len(vms) > 1 else "",
        *([""] if domains else []),
        "",
        size(sum(vm.ram_bytes for vm in vms)),
        size(sum(vm.present_bytes for vm in vms)),
        count(sum(vm.merged_pages for vm in vms)),
        count(sum(vm.zero_pages for vm in vms)),
        count(sum(vm.cow_broken_pages for vm in vms)),
        _waiting(vms),
        count(sum(vm.vmas for vm in vms)),
        size(sum(vm.saved_bytes for vm in vms)),
    ]
    table = make_table(headers, texts=3 if domains else 2, footer=footer if len(vms) > 1 else ())
    for vm in vms:
        table.add_row(
            Text(vm.name),
            *([Text(vm.trust_domain or "-")] if domains else []),
            Text(vm.status, style=_STATUS_STYLE[vm.status]),
            size(vm.ram_bytes),
            size(vm.present_bytes),
            count(vm.merged_pages),
            count(vm.zero_pages),
            count(vm.cow_broken_pages),
            count(vm.deferred_pages),
            count(vm.vmas),
            size(vm.saved_bytes),
        )
    console.print(table)


def _waiting(vms: list[VmReport]) -> str:
    known = [vm.deferred_pages for vm in vms if vm.deferred_pages is not None]
    return count(sum(known)) if known else "-"


def _notes(vms: list[VmReport]) -> list[tuple[str, str]]:
    notes = []
    for vm in vms:
        for text in (vm.reason, vm.hint):
            if text:
                notes.append((vm.name, text))
    return notes


def _print_matrix(console: Console, matrix: Matrix) -> None:
    if len(matrix.vms) > _MATRIX_VMS:
        console.print(f"(who shares with whom among {len(matrix.vms)} VMs: see --json)")
        return
    console.print("distinct contents that both VMs map (diagonal: that the VM maps itself)")
    print_matrix(console, matrix.vms, matrix.pages)


def print_matrix(console: Console, names: list[str], pages: list[list[int]]) -> None:
    """A small square table; its columns are numbered as its rows."""
    numbers = [str(number + 1) for number in range(len(names))]
    table = make_table(["", *numbers])
    for number, name, row in zip(numbers, names, pages, strict=True):
        table.add_row(Text(f"{number} {name}"), *map(count, row))
    console.print(table)
