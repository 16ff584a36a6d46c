"""The sharing report as a table: one row for each VM, then which VMs share with which.

Owns the layout of `vmdedup run` and `vmdedup report`. Fits 100 columns up to
large VMs, and narrower terminals with fewer columns; reasons and hints stand below
the table, where they have room.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from vmdedup.models import Durations, KsmComparison, Matrix, MemoryPlace, SharingReport, VmReport
from vmdedup.report import memory
from vmdedup.report.baseline import Comparison
from vmdedup.report.console import (
    SHORTEST_NAME,
    STATUS_STYLE,
    make_console,
    make_table,
    print_notes,
    print_table,
)
from vmdedup.report.sources import show_sources
from vmdedup.report.words import cold_words, count, milliseconds, number_of, share, size

_MATRIX_VMS = 10
_FIRST_TO_GO = ("VMAs", "RAM", "waiting", "zero", "broken", "merged", "domain", "held")


def show_report(
    report: SharingReport, console: Console | None = None, comparison: Comparison | None = None
) -> None:
    """Print the report, and its comparison with a baseline."""
    console = console or make_console()
    console.print(_headline(report))
    for line in _facts(report):
        console.print(line)
    print_memory(console, report.memory)
    console.print()
    _print_vms(console, report.vms)
    notes = _notes(report.vms)
    if notes:
        console.print()
        print_notes(console, notes)
    if comparison is not None:
        console.print()
        _print_comparison(console, comparison)
    if report.ksm is not None:
        console.print()
        _print_ksm(console, report.ksm)
    if report.sources is not None:
        console.print()
        show_sources(report.sources, console)
    if any(pages for row in report.matrix.pages for pages in row):
        console.print()
        _print_matrix(console, report.matrix)


def _print_ksm(console: Console, ksm: KsmComparison) -> None:
    """What KSM would save, beside what vmdedup would save by the same contents."""
    ours = size(ksm.vmdedup_saved_bytes)
    console.print(
        Text.assemble(
            (f"KSM would save {size(ksm.saved_bytes)}", "bold"),
            f" (general_profit {size(ksm.general_profit)}), vmdedup {ours}",
        )
    )
    console.print(
        f"pages_shared {count(ksm.pages_shared)}, pages_sharing {count(ksm.pages_sharing)},"
        f" ksm_zero_pages {count(ksm.zero_pages)} (max_page_sharing {ksm.max_page_sharing},"
        f" use_zero_pages {int(ksm.use_zero_pages)})"
    )
    table = make_table(["VM", "private pages", "merging", "zero", "KSM saves", "vmdedup saves"])
    for vm in ksm.vms:
        table.add_row(
            Text(vm.name),
            count(vm.scanned_pages),
            count(vm.merging_pages),
            count(vm.zero_pages),
            size(vm.saved_bytes),
            size(vm.vmdedup_saved_bytes),
        )
    print_table(console, table)
    for note in ksm.notes:
        console.print(note)


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
    if host.store_swapped_pages:
        lines.append(f"store_swapped_pages {count(host.store_swapped_pages)}")
    if host.huge_pages_split or host.pages_kept_in_huge:
        lines.append(
            f"huge_pages {count(host.huge_pages)}, huge_pages_split {count(host.huge_pages_split)},"
            f" pages_kept_in_huge {count(host.pages_kept_in_huge)}"
        )
    lines += filter(None, [cold_words(host)])
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


def print_memory(console: Console, places: Sequence[MemoryPlace]) -> None:
    """A line for the host, and one for each cgroup in which memory would not suffice."""
    for place in memory.shown(places):
        style = "bold red" if place.is_lacking else ""
        console.print(Text(memory.line(place), style))


def _distribution(what: Durations) -> str:
    marks = (("p50", what.p50), ("p95", what.p95), ("p99", what.p99), ("max", what.max))
    return f"{what.count:,}: " + ", ".join(f"{name} {milliseconds(ms)}" for name, ms in marks)


def _print_vms(console: Console, vms: list[VmReport]) -> None:
    rows = [_cells(vm) for vm in vms]
    total = _total(vms) if len(vms) > 1 else {}
    columns = list(_total(vms))
    if len({vm.trust_domain for vm in vms if vm.trust_domain}) < 2:
        columns.remove("domain")
    _drop_until_it_fits(columns, [*rows, total], console.width)
    texts = 3 if "domain" in columns else 2
    footer = [total[name] for name in columns] if total else []
    table = make_table(columns, texts=texts, footer=footer)
    for vm, row in zip(vms, rows, strict=True):
        cells = [Text(row[name]) for name in columns]
        cells[columns.index("status")].stylize(STATUS_STYLE[vm.status])
        table.add_row(*cells)
    print_table(console, table)


def _drop_until_it_fits(columns: list[str], rows: list[dict[str, str]], width: int) -> None:
    """Leave out columns on a narrow terminal: no number is ever cut off."""
    for name in [name for name in _FIRST_TO_GO if name in columns]:
        needed = sum(max(len(it), *(len(row.get(it, "")) for row in rows)) for it in columns[1:])
        if needed + 2 * (len(columns) - 1) + SHORTEST_NAME <= width:
            return
        columns.remove(name)


def _cells(vm: VmReport) -> dict[str, str]:
    return {
        "VM": vm.name,
        "domain": vm.trust_domain or "-",
        "status": vm.status,
        "RAM": size(vm.ram_bytes),
        "held": size(vm.present_bytes),
        "merged": count(vm.merged_pages),
        "zero": count(vm.zero_pages),
        "broken": count(vm.cow_broken_pages),
        "waiting": count(vm.deferred_pages),
        "VMAs": count(vm.vmas),
        "saved": size(vm.saved_bytes),
    }


def _total(vms: list[VmReport]) -> dict[str, str]:
    return {
        "VM": "all",
        "domain": "",
        "status": "",
        "RAM": size(sum(vm.ram_bytes for vm in vms)),
        "held": size(sum(vm.present_bytes for vm in vms)),
        "merged": count(sum(vm.merged_pages for vm in vms)),
        "zero": count(sum(vm.zero_pages for vm in vms)),
        "broken": count(sum(vm.cow_broken_pages for vm in vms)),
        "waiting": _waiting(vms),
        "VMAs": count(sum(vm.vmas for vm in vms)),
        "saved": size(sum(vm.saved_bytes for vm in vms)),
    }


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


def _print_comparison(console: Console, comparison: Comparison) -> None:
    table = make_table(["against the baseline", "", "before", "now", "points", "saved"], texts=2)
    for each in (*comparison.vms, comparison.host):
        table.add_row(
            Text(each.name),
            Text("shares less" if each.shares_less else "", style="red"),
            f"{each.before.percent:.1f}%",
            f"{each.now.percent:.1f}%",
            f"{each.points:+.1f}",
            size(each.now.saved_bytes - each.before.saved_bytes),
        )
    print_table(console, table)
    missing = [(name, "not there any more") for name in comparison.missing]
    print_notes(console, [*missing, *((name, "new") for name in comparison.new)])


def _print_matrix(console: Console, matrix: Matrix) -> None:
    if len(matrix.vms) > _MATRIX_VMS:
        console.print(f"(the sharing between {len(matrix.vms)} VMs: see --json)")
        return
    console.print("distinct contents that both VMs map (diagonal: that the VM maps itself)")
    print_matrix(console, matrix.vms, matrix.pages)


def print_matrix(console: Console, names: list[str], pages: list[list[int]]) -> None:
    """A small square table; its columns are numbered like its rows."""
    numbers = [str(number + 1) for number in range(len(names))]
    table = make_table(["", *numbers])
    for number, name, row in zip(numbers, names, pages, strict=True):
        table.add_row(Text(f"{number} {name}"), *map(count, row))
    print_table(console, table)
