"""Savings against huge pages kept: what each `huge_page_density` would choose on running guests.

    python -m tests.benchmark.density [--touched] [--plot FILE] [--json FILE]
    python -m tests.benchmark.density --merge N        and merge the running guests at density N

Boots guests with transparent huge pages, freezes them, reads all their memory and page
tables, and plans a merge with the product's own planner for each density. Nothing is merged
without `--merge`.
Every VM may have as many mappings as it wants, so that only huge pages limit the saving.
With `--touched` the guests get all memory that they have not touched yet, as zeroes: so stand
VMs with preallocated memory, or whose guests zero what they free.
Needs root, as the page tables do.

A huge page that holds data is one that could not be saved whole: splitting the others costs
the guest nothing, as all of it becomes one mapping of zeroes or is shared.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from tests.benchmark.errors import BenchError
from tests.benchmark.gauge import Gauge, Population
from tests.benchmark.guests import (
    WORKLOADS,
    Guests,
    huge_pages_by_advice,
    own_store_dir,
    require_images,
    sweep,
)
from tests.benchmark.live_merge import attached_of
from tests.benchmark.plot import require_plot
from tests.harness.serial import GuestError
from vmdedup.controls import Controls
from vmdedup.core.digest import zero_digest
from vmdedup.core.huge_pages import BLOCK_PAGES, HugePages
from vmdedup.core.nominate import Nomination, VmView, nominate
from vmdedup.core.rmap import FIRST_SLOT, ZERO, PageColumns
from vmdedup.core.scan import observe
from vmdedup.core.stable_tree import StableTree
from vmdedup.deduplicator import Deduplicator
from vmdedup.errors import VmdedupError
from vmdedup.models import Model
from vmdedup.report.console import make_console, make_table
from vmdedup.settings import Settings
from vmdedup.units import MIB, PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

DENSITIES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 480, 504, 512)

_SEED = 1
_NO_BUDGET = 1 << 31
_MERGE_S = 60.0
"""Long enough for dirty tracking to meet most of what such guests write now and then."""


class Point(Model):
    """The plan at one density, over all guests."""

    density: int
    saved_pages: int
    zero_pages: int
    """Pages of those that would go onto the zero page."""
    huge_pages_kept: int
    data_huge_pages_kept: int
    """Huge pages kept that could not be saved whole."""


class Merged(Model):
    """The same guests after they ran on and were merged, by the kernel's word."""

    density: int
    seconds: float
    saved_pages: int
    data_huge_pages_kept: int
    pages_kept_in_huge: int | None


class DensityCurve(Model):
    """All densities on the same frozen guests."""

    workloads: list[str]
    vm_mib: int
    present_pages: int
    huge_pages: int
    data_huge_pages: int
    points: list[Point]
    merged: Merged | None = None


def measure(
    workloads: Sequence[str],
    mib: int,
    settle_s: float,
    tell: Callable[[str], None],
    *,
    touched: bool = False,
    merge: int | None = None,
) -> DensityCurve:
    """Boot the guests, and plan for each density. Raises BenchError, GuestError."""
    sweep()
    require_images(workloads, tell)
    with ExitStack() as exits:
        exits.enter_context(huge_pages_by_advice())
        guests = Guests(workloads, "ram", mib, tell, huge_pages=True)
        exits.enter_context(guests)
        tell(f"guests settle for {settle_s:.0f} s")
        time.sleep(settle_s)
        with guests.frozen(), ExitStack() as attached:
            if touched:
                every_page = np.ones(mib * MIB // PAGE_BYTES, dtype=np.bool_)
                gauge = Gauge(guests.each, own_store_dir())
                gauge.populate(Population([every_page] * len(guests.each)))
            tell("reading all memory")
            views, present = _views(attached, guests)
            curve = _curve(views, list(workloads), mib, present)
        if merge is None:
            return curve
        tell(f"merging running guests for {_MERGE_S:.0f} s")
        merged = _merged(guests, merge, _holds_data(views))
        return curve.model_copy(update={"merged": merged})


def _merged(guests: Guests, density: int, holds_data: npt.NDArray[np.bool_]) -> Merged:
    """Merge the running guests; `holds_data`: which blocks were huge pages with data before."""
    settings = Settings(
        runtime_dir=guests.directory / "engine",
        store_dir=own_store_dir(),
        controls=Controls(huge_page_density=density),
    )
    stop = threading.Event()
    timer = threading.Timer(_MERGE_S, stop.set)
    try:
        with Deduplicator(settings) as dedup:
            dedup.attach([str(vm.qmp_path) for vm in guests.each])
            timer.start()
            dedup.run(stop=stop)
            host = dedup.report().host
        with ExitStack() as attached:
            huge = [_huge_blocks(vm) for vm in attached_of(attached, guests.each, settings)]
    finally:
        timer.cancel()
        shutil.rmtree(own_store_dir(), ignore_errors=True)
    return Merged(
        density=density,
        seconds=_MERGE_S,
        saved_pages=host.saved_bytes // PAGE_BYTES,
        data_huge_pages_kept=int(np.count_nonzero(np.concatenate(huge) & holds_data)),
        pages_kept_in_huge=host.pages_kept_in_huge,
    )


def _huge_blocks(vm: AttachedVm) -> npt.NDArray[np.bool_]:
    """Which blocks are huge pages now. Raises BenchError if this kernel does not tell."""
    vm.scan.refresh()
    is_huge = vm.scan.huge_blocks()
    if is_huge is None:
        raise BenchError("this kernel does not tell which pages are huge (Linux 6.7 does)")
    return is_huge


def _views(exits: ExitStack, guests: Guests) -> tuple[list[VmView], int]:
    """What a planner sees of the frozen guests, and the pages that are present."""
    views, present = [], 0
    for vm in attached_of(exits, guests.each, Settings()):
        is_huge = _huge_blocks(vm)
        state = vm.scan.known_state()
        page = np.flatnonzero(vm.scan.readable(state, np.arange(vm.space.pages)))
        columns = PageColumns(vm.space.pages)
        observe(columns, page, vm.scan.digests(page, _SEED), compared_next=True)
        huge = HugePages(vm.scan.blocks, is_huge, 0)
        views.append(VmView(columns, vm.space.first_page, _NO_BUDGET, huge=huge))
        present += len(page)
    return views, present


def _curve(views: Sequence[VmView], workloads: list[str], mib: int, present: int) -> DensityCurve:
    holds_data = _holds_data(views)
    huge = np.concatenate([_huge(view).is_huge for view in views])
    points = []
    for density in DENSITIES:
        nomination = _plan(views, density)
        slots = np.concatenate([vm.taken.page_slots()[1] for vm in nomination.vms])
        kept = huge & ~_split(views, nomination)
        points.append(
            Point(
                density=density,
                saved_pages=len(slots) - len(nomination.new),
                zero_pages=int(np.count_nonzero(slots == ZERO)),
                huge_pages_kept=int(np.count_nonzero(kept)),
                data_huge_pages_kept=int(np.count_nonzero(kept & holds_data)),
            )
        )
    return DensityCurve(
        workloads=workloads,
        vm_mib=mib,
        present_pages=present,
        huge_pages=int(np.count_nonzero(huge)),
        data_huge_pages=int(np.count_nonzero(holds_data)),
        points=points,
    )


def _holds_data(views: Sequence[VmView]) -> npt.NDArray[np.bool_]:
    """Which blocks of all VMs are huge pages that cannot be saved whole."""
    whole = _split(views, _plan(views, BLOCK_PAGES))
    return np.concatenate([_huge(view).is_huge for view in views]) & ~whole


def _huge(view: VmView) -> HugePages:
    assert view.huge is not None
    return view.huge


def _plan(views: Sequence[VmView], density: int) -> Nomination:
    """The plan that splits huge pages from this density on."""
    return nominate(
        [replace(view, huge=replace(_huge(view), density=density)) for view in views],
        StableTree(),
        zero_digest=zero_digest(_SEED),
        use_zero_pages=True,
        share=True,
        next_slot=FIRST_SLOT,
    )


def _split(views: Sequence[VmView], nomination: Nomination) -> npt.NDArray[np.bool_]:
    """Which blocks of all VMs the plan takes pages of."""
    parts = []
    for view, planned in zip(views, nomination.vms, strict=True):
        blocks = _huge(view).blocks
        parts.append(np.bincount(blocks.of(planned.taken.page()), minlength=len(blocks)) > 0)
    return np.concatenate(parts)


def show(curve: DensityCurve, console: Console) -> None:
    """Print the curve as a table."""
    most = curve.points[0]
    guests = f"{len(curve.workloads)} guests of {curve.vm_mib} MiB: {', '.join(curve.workloads)}"
    console.print(
        f"{guests}; {curve.present_pages:,} pages present, {most.saved_pages:,} can be saved;"
        f" {curve.huge_pages} huge pages, {curve.data_huge_pages} of them hold data"
    )
    columns = ("density", "saved MiB", "of all", "zero pages", "other pages", "kept", "of data")
    table = make_table(columns)
    for point in curve.points:
        others, most_others = (each.saved_pages - each.zero_pages for each in (point, most))
        table.add_row(
            str(point.density),
            f"{point.saved_pages * PAGE_BYTES / MIB:,.1f}",
            _share(point.saved_pages, most.saved_pages),
            _share(point.zero_pages, most.zero_pages),
            _share(others, most_others),
            f"{point.huge_pages_kept}",
            _share(point.data_huge_pages_kept, curve.data_huge_pages),
        )
    console.print(table)
    if (merged := curve.merged) is not None:
        console.print(
            f"merged for {merged.seconds:.0f} s while they ran, density {merged.density}:"
            f" {merged.saved_pages:,} pages saved"
            f" ({_share(merged.saved_pages, most.saved_pages)} of what could be before),"
            f" {_share(merged.data_huge_pages_kept, curve.data_huge_pages)} of the huge pages"
            f" with data kept, {merged.pages_kept_in_huge} pages kept in huge pages"
        )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def plot(curve: DensityCurve, path: Path) -> None:
    """Draw savings against huge pages kept, both as shares."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    most = curve.points[0]
    kept = [100 * point.data_huge_pages_kept / curve.data_huge_pages for point in curve.points]
    for label, pages in (
        ("all pages", [point.saved_pages for point in curve.points]),
        ("zero pages", [point.zero_pages for point in curve.points]),
        ("other pages", [point.saved_pages - point.zero_pages for point in curve.points]),
    ):
        axes.plot(kept, [100 * each / max(1, pages[0]) for each in pages], marker="o", label=label)
    for point, across in zip(curve.points, kept, strict=True):
        height = 100 * point.saved_pages / most.saved_pages
        axes.annotate(
            str(point.density), (across, height), xytext=(4, 5), textcoords="offset points"
        )
    axes.set_xlabel("huge pages kept, of those that hold data, %")
    axes.set_ylabel("saved, of all that can be, %")
    axes.set_title(f"huge_page_density on {len(curve.workloads)} guests of {curve.vm_mib} MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark.density",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mem", type=int, default=384, metavar="MIB", help="of each guest (384)")
    parser.add_argument(
        "--settle", type=float, default=20.0, metavar="S", help="seconds that they settle (20)"
    )
    parser.add_argument("--touched", action="store_true", help="have all memory present")
    parser.add_argument(
        "--merge", type=int, metavar="N", help="then merge the running guests at this density"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve: .svg or .png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    try:
        if given.plot is not None:
            require_plot(given.plot)
        curve = measure(
            WORKLOADS,
            given.mem,
            given.settle,
            lambda what: print(what, flush=True),
            touched=given.touched,
            merge=given.merge,
        )
    except (OSError, VmdedupError, GuestError) as error:
        sys.exit(f"density: failed: {error}")
    show(curve, make_console())
    if given.plot is not None:
        plot(curve, given.plot)
    if given.json is not None:
        given.json.write_text(curve.model_dump_json(indent=2) + "\n")


if __name__ == "__main__":
    main()
