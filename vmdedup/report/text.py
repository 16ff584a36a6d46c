"""Everything but the sharing report as text: listings, counts, plan, funnel, checks.

Owns the layout of `vms`, `analyze`, `run --dry-run`, `explain`, `unmerge`, `verify`
and `doctor`.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from vmdedup.models import (
    BackendListing,
    ContentAnalysis,
    Diagnosis,
    Funnel,
    MergePlan,
    Unmerged,
    Verification,
    VmList,
    VmListing,
)
from vmdedup.report.console import make_console, make_table, print_notes, print_table
from vmdedup.report.parts import FUNNEL_NOTES
from vmdedup.report.table import print_matrix, print_memory
from vmdedup.report.words import count, number_of, page_size, share, size

_MATRIX_VMS = 10
_BAR_COLUMNS = 20


def show_vms(found: VmList, console: Console | None = None) -> None:
    """One row for each backend, the VM's own facts in its first."""
    console = console or make_console()
    table = make_table(
        ["VM", "mergeable", "backend", "kind", "share", "size", "pid", "QEMU", "monitor", "domain"],
        texts=5,
    )
    for vm in found.vms:
        pid = "-" if vm.pid is None else str(vm.pid)
        facts = [pid, vm.qemu_version or "-", vm.monitor or "-", vm.trust_domain or "-"]
        for number, backend in enumerate(vm.backends or [None]):
            fits = vm.mergeable and (backend is None or backend.mergeable)
            table.add_row(
                Text(vm.name if number == 0 else ""),
                Text("yes", style="green") if fits else Text("no", style="red"),
                *_backend_cells(backend),
                *(facts if number == 0 else []),
            )
    print_table(console, table)
    print_notes(console, [note for vm in found.vms for note in _listing_notes(vm)])


def _backend_cells(backend: BackendListing | None) -> list[Text]:
    if backend is None:
        return [Text("-")] * 4
    known = backend.size_bytes > 0
    shared = "on" if backend.share else "off"
    cells = [backend.kind or "-", shared if known else "-", size(backend.size_bytes)]
    return [Text(backend.id), *(Text(cell if known else "-") for cell in cells)]


def _listing_notes(vm: VmListing) -> list[tuple[str, str]]:
    texts = [vm.reason] if vm.reason else []
    # The VM's own reason often already contains the backend's or the finding's.
    for backend in vm.backends:
        if backend.reason and not any(backend.reason in text for text in texts):
            texts.append(f"{backend.id}: {backend.reason}")
    for finding in vm.findings:
        if not any(finding.reason in text for text in texts):
            texts.append(f"{finding.reason} ({finding.verdict})")
    if vm.left_to_unmerge_pages:
        left = f"{number_of(vm.left_to_unmerge_pages, 'page')} still to be unmerged"
        texts.append(f"{left}, of domain {vm.leaves_domain}" if vm.leaves_domain else left)
    return [(vm.name, text) for text in texts]


def show_analysis(counts: ContentAnalysis, console: Console | None = None) -> None:
    """The counts of each VM or image, and their sum."""
    console = console or make_console()
    saved = counts.duplicate_pages + counts.zero_pages
    console.print(
        Text.assemble(
            (f"{page_size(saved)} of {page_size(counts.total_pages)}", "bold"),
            f" are zero or a copy of another page ({share(saved, counts.total_pages)})",
        )
    )
    several = len(counts.vms) > 1
    console.print()
    columns = ["VM or image", "pages", "zero", "non-zero", "distinct", "duplicate"]
    rows = [(each.name, each) for each in counts.vms]
    footer = [
        "all",
        count(counts.total_pages),
        count(counts.zero_pages),
        count(counts.nonzero_pages),
        count(counts.distinct_pages),
        count(counts.duplicate_pages),
    ]
    table = make_table(columns, footer=footer if several else ())
    for name, each in rows:
        table.add_row(
            Text(name),
            count(each.total_pages),
            count(each.zero_pages),
            count(each.nonzero_pages),
            count(each.distinct_pages),
            count(each.duplicate_pages),
        )
    print_table(console, table)
    if 1 < len(counts.vms) <= _MATRIX_VMS:
        console.print()
        console.print("distinct contents that both hold (diagonal: duplicates within)")
        print_matrix(console, [each.name for each in counts.vms], counts.matrix)


def show_plan(plan: MergePlan, console: Console | None = None) -> None:
    """The merges that a run would carry out, by VM and by domain."""
    console = console or make_console()
    console.print(
        Text.assemble((f"{size(plan.saved_bytes)} would be saved", "bold"), "; nothing was changed")
    )
    print_memory(console, plan.memory)
    console.print()
    vms = make_table(
        ["VM", "domain", "merge", "zero", "waiting", "VMAs now", "VMAs then", "VMA budget"], texts=2
    )
    for vm in plan.vms:
        vms.add_row(
            Text(vm.name),
            Text(vm.trust_domain),
            count(vm.mergeable_pages),
            count(vm.zero_pages),
            count(vm.deferred_pages),
            count(vm.vmas_now),
            count(vm.vmas_after),
            count(vm.vma_budget),
        )
    print_table(console, vms)
    console.print()
    domains = make_table(["domain", "VMs", "new store pages", "pages saved", "saved"])
    for domain in plan.domains:
        domains.add_row(
            Text(domain.trust_domain),
            count(len(domain.vms)),
            count(domain.new_store_pages),
            count(domain.saved_pages),
            page_size(domain.saved_pages),
        )
    print_table(console, domains)
    print_notes(console, [(vm.name, vm.reason or "refused") for vm in plan.refused])


def show_funnel(funnel: Funnel, console: Console | None = None) -> None:
    """Each part of the RAM with its share, from absent to saved."""
    console = console or make_console()
    parts = funnel.model_dump()
    ram = funnel.ram_pages
    console.print(Text.assemble((funnel.name, "bold"), f": {page_size(ram)} of RAM"))
    console.print()
    table = make_table(["what", "pages", "size", "share", "", ""])
    for column in table.columns[-2:]:
        column.justify = "left"
    for name, note in FUNNEL_NOTES.items():
        pages = parts[f"{name.replace(' ', '_')}_pages"]
        bar = "#" * round(_BAR_COLUMNS * pages / ram) if ram else ""
        saved = name in ("merged", "zero")
        table.add_row(
            Text(name, style="green" if saved else ""),
            count(pages),
            page_size(pages),
            share(pages, ram),
            bar,
            note,
        )
    print_table(console, table)


def show_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """A line for each check, the remedy below it, and the verdict."""
    console = console or make_console()
    table = make_table(["", "", "what", "found"], texts=4)
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.no_wrap, column.overflow = False, "fold"
    area = ""
    for check in diagnosis.checks:
        if check.area != area and area:
            table.add_section()
        marks = {
            "fine": ("fine", "green"),
            "note": ("note", "yellow"),
            "problem": ("no", "bold red"),
        }
        mark, style = marks[check.verdict]
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="" if check.verdict == "fine" else style)
        head = Text(check.area if check.area != area else "", style="bold")
        table.add_row(head, Text(mark, style=style), Text(check.name), found)
        area = check.area
    print_table(console, table)
    console.print()
    if diagnosis.can_merge:
        console.print(Text("merging can work here", "bold green"))
    else:
        lacking = [check.name for check in diagnosis.checks if check.verdict == "problem"]
        console.print(Text(f"merging cannot work here: {', '.join(lacking)}", "bold red"))


def show_unmerged(result: Unmerged, console: Console | None = None) -> None:
    """The pages that each VM got back."""
    console = console or make_console()
    table = make_table(["VM", "pid", "restored", "size", "still merged"])
    for vm in result.vms:
        table.add_row(
            Text(vm.name),
            str(vm.pid),
            count(vm.restored_pages),
            page_size(vm.restored_pages),
            count(vm.remaining_pages),
        )
    print_table(console, table)
    gone = "nothing is merged any more: the stores are removed"
    console.print(gone if result.store_removed else "stores that are still in use were kept")


def show_verification(checked: Verification, console: Console | None = None) -> None:
    """The verdict, what was checked in each VM, and any leftovers."""
    console = console or make_console()
    pages = sum(vm.checked_pages for vm in checked.vms)
    wrong = sum(vm.wrong_pages for vm in checked.vms)
    if checked.ok:
        console.print(Text(f"ok: {number_of(pages, 'merged page')} as published", "bold green"))
    else:
        console.print(Text(f"not ok: {number_of(wrong, 'wrong page')}", "bold red"))
    table = make_table(["VM", "pid", "checked", "wrong", "not checkable", "swapped out"])
    for vm in checked.vms:
        table.add_row(
            Text(vm.name),
            str(vm.pid),
            count(vm.checked_pages),
            count(vm.wrong_pages),
            count(vm.unchecked_pages),
            count(vm.swapped_pages),
        )
    print_table(console, table)
    if any(vm.swapped_pages for vm in checked.vms):
        console.print("swapped pages were not read; --read-swapped swaps them in")
    print_notes(console, [(vm.name, left) for vm in checked.vms for left in vm.leftovers])
    for gone in checked.gone:
        console.print(Text(gone))
