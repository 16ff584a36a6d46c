"""The figures as tables for a terminal: medians, with the range where there are several runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.benchmark.budget import BudgetPoint, VmaCosts
from tests.benchmark.results import BenchResult, Course, median, spread
from tests.benchmark.simulate import CHANGING, Growth
from vmdedup.report.console import make_table
from vmdedup.units import MIB, PAGE_BYTES

_TARGETS = {
    "saved_vs_bound_ram": "at least 0.995",
    "saved_vs_bound_shared": "at least 0.995",
    "cpu_to_99": "at most 0.5",
    "wall_to_99": "at most 0.5",
    "steady_cpu_per_pass": "at most 0.1",
    "steady_cpu_per_pass_no_smart_scan": "at most 0.025",
    "defaults_wall_to_99": "at most 0.05",
    "unmerge": "at most 1",
    "overhead": "at most 1 on 8 GiB",
}

Row = tuple[str, str, float, str]
"""What a row is called, the figure's path, a factor, and how it is written."""

_MERGING: tuple[Row, ...] = (
    ("saved, of the bound", "saved_vs_bound", 1, ".2%"),
    ("saved by PSS, MiB", "saved_pss_bytes", 1 / MIB, ".1f"),
    ("to 50%, s", "to_50.wall_s", 1, ".2f"),
    ("to 90%, s", "to_90.wall_s", 1, ".2f"),
    ("to 99%, s", "to_99.wall_s", 1, ".2f"),
    ("to 50%, CPU s", "to_50.cpu_s", 1, ".2f"),
    ("to 90%, CPU s", "to_90.cpu_s", 1, ".2f"),
    ("to 99%, CPU s", "to_99.cpu_s", 1, ".2f"),
    ("until settled, CPU s", "settled.cpu_s", 1, ".2f"),
    ("unmerge, s", "unmerge_s", 1, ".2f"),
    ("unmerge, CPU s", "unmerge_cpu_s", 1, ".2f"),
    ("overhead, MiB", "overhead_sum_bytes", 1 / MIB, ".1f"),
)
_RUNNING: tuple[Row, ...] = (
    ("passes", "steady.passes", 1, ".0f"),
    ("a pass, CPU ms", "steady.cpu_per_pass_s", 1000, ".1f"),
    ("a pass and GiB, CPU ms", "steady.cpu_per_pass_and_gib_s", 1000, ".1f"),
    ("of one processor", "steady.cpu_share", 1, ".2%"),
    ("guests slower", "slowdown.slowdown", 1, ".2%"),
    ("noise of that", "slowdown.noise", 1, ".2%"),
    ("defaults: passes", "steady_at_defaults.passes", 1, ".0f"),
    ("defaults: of one processor", "steady_at_defaults.cpu_share", 1, ".2%"),
    ("defaults: that for a GiB", "steady_at_defaults.cpu_share_per_gib", 1, ".2%"),
    ("defaults: guests slower", "slowdown_at_defaults.slowdown", 1, ".2%"),
    ("gates p50, ms", "gate_ms.p50", 1, ".2f"),
    ("gates p99, ms", "gate_ms.p99", 1, ".2f"),
    ("gates max, ms", "gate_ms.max", 1, ".2f"),
    ("drains p50, ms", "drain_ms.p50", 1, ".2f"),
    ("drains p99, ms", "drain_ms.p99", 1, ".2f"),
    ("drains max, ms", "drain_ms.max", 1, ".2f"),
    ("stops", "stops", 1, ".0f"),
)


def show_bench(result: BenchResult, console: Console) -> None:
    """Print everything but the timelines."""
    courses = result.courses
    names = list(dict.fromkeys(course.contender for course in courses))
    host = result.host
    fleet = f"{len(result.workloads)} guests of {result.vm_mib} MiB: {', '.join(result.workloads)}"
    console.print(f"{fleet}; kernel {host.kernel}, QEMU {host.qemu}, {host.processors} processors")
    for backend in dict.fromkeys(course.backend for course in courses):
        here = [course for course in courses if course.backend == backend]
        held, bound = (sorted(each) for each in _bounds(here))
        console.print(
            f"{backend}: {_range(held)} pages held, at most {_range(bound)} can be saved",
        )
    console.print(_table("frozen guests", names, courses, _MERGING))
    steady = [name for name in names if median(courses, name, "steady.cpu_s") is not None]
    if steady:
        console.print(_table("running guests, full speed", steady, courses, _RUNNING))
    for course in courses:
        for complaint in course.complaints:
            console.print(f"note: {course.contender}, run {course.run + 1}: {complaint}")
    if result.budget:
        show_budget(result.budget, console)
    table = make_table(("ours to KSM's, or to the bound", "measured", "target"))
    for name, value in result.ratios.model_dump().items():
        table.add_row(name, "-" if value is None else f"{value:.4g}", _TARGETS.get(name, ""))
    console.print(table)


def show_budget(points: Sequence[BudgetPoint], console: Console) -> None:
    """What a plan saves under each VMA budget."""
    most = max((point.saved_bytes for point in points), default=0)
    table = make_table(("VMAs a VM may have", "taken, all VMs", "saved MiB", "of all", "waiting"))
    for point in points:
        share = point.saved_bytes / most if most else 0.0
        saved = f"{point.saved_bytes / MIB:,.1f}"
        row = (f"{point.vmas:,}", saved, f"{share:.1%}", f"{point.deferred_pages:,}")
        table.add_row(f"{point.vma_budget:,}", *row)
    console.print(table)


def show_growth(growth: Growth, console: Console) -> None:
    """The core alone, by size."""
    shares = ", ".join(f"{share:.1%}" for share in CHANGING)
    table = make_table(
        ("pages", "GiB", "first, ns/page", "columns, B/page", "peak, B/page", "VMAs", "steady, ms")
    )
    for size in growth.sizes:
        table.add_row(
            f"{size.pages:,}",
            f"{size.pages * PAGE_BYTES / 2**30:.0f}",
            f"{size.first_pass_ns_per_page:.0f}",
            f"{size.columns_bytes_per_page:.0f}",
            f"{size.peak_bytes_per_page:.1f}",
            f"{size.vmas:,}",
            " / ".join(f"{each.ms:.0f}" for each in size.steady),
        )
    console.print(table)
    console.print(f"steady: a pass after {shares} of the pages were written")
    console.print(
        f"time per page, largest to smallest: {growth.time_ratio:.2f} (target: at most 2)"
    )
    host = growth.tebibyte
    console.print(
        f"1 TiB by extrapolation: first pass {host.first_pass_s:.0f} s, a steady pass with 2%"
        f" written {host.steady_pass_s:.1f} s, peak {host.peak_bytes / 2**30:.1f} GiB (without"
        " reading: one core digests about 5 GiB/s);"
        f" {host.vmas_per_vm_of_16_gib:,} VMAs for a VM of 16 GiB, so vm.max_map_count is met first"
    )


def show_costs(costs: VmaCosts, console: Console) -> None:
    """What mappings cost."""
    table = make_table(("VMAs", "kernel B/VMA", "page tables KiB", "fault ns", "COW fault ns"))
    for cost in costs.costs:
        slab = "-" if cost.kernel_bytes_per_vma is None else f"{cost.kernel_bytes_per_vma:.0f}"
        tables = f"{cost.page_table_bytes / 1024:,.0f}"
        faults = (f"{cost.fault_ns:.0f}", f"{cost.cow_fault_ns:.0f}")
        table.add_row(f"{cost.vmas:,}", slab, tables, *faults)
    console.print(table)
    console.print(f"vm.max_map_count is {costs.default_max_map_count:,} here, as it was before")


def _bounds(courses: Sequence[Course]) -> tuple[list[int], list[int]]:
    return [c.held_pages for c in courses], [c.bound_pages for c in courses]


def _range(values: Sequence[int]) -> str:
    if values[0] == values[-1]:
        return f"{values[0]:,}"
    return f"{values[0]:,} to {values[-1]:,}"


def _table(
    title: str, names: Sequence[str], courses: Sequence[Course], rows: Sequence[Row]
) -> Table:
    """One row a figure, one column a contender."""
    table = make_table((title, *names))
    for column in table.columns[1:]:
        column.no_wrap = False
    for label, path, factor, form in rows:
        cells = [_cell(courses, name, path, factor, form) for name in names]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    return table


def _cell(courses: Sequence[Course], name: str, path: str, factor: float, form: str) -> str:
    values = [factor * value for value in spread(courses, name, path)]
    middle = median(courses, name, path)
    if middle is None:
        return "-"
    if len(values) == 1:
        return format(values[0], form)
    return f"{middle * factor:{form}} ({values[0]:{form}} to {values[-1]:{form}})"
