"""What reports look like: nothing cut off, nothing taken for markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vmdedup.engine.progress import PassProgress
from vmdedup.models import (
    BackendListing,
    ContentAnalysis,
    Durations,
    Funnel,
    HostReport,
    Matrix,
    SharingReport,
    Unmerged,
    UnmergedVm,
    VmContents,
    VmList,
    VmListing,
    VmReport,
    VmStatus,
)
from vmdedup.report import words
from vmdedup.report.progress import ProgressLine
from vmdedup.report.table import show_report
from vmdedup.report.text import show_analysis, show_funnel, show_unmerged, show_vms

pytestmark = pytest.mark.unit

GIB = 1 << 30


def console() -> Console:
    return Console(file=io.StringIO(), width=100, markup=False, emoji=False, highlight=False)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def vm_report(name: str, status: VmStatus, reason: str | None, domain: str = "uid:0") -> VmReport:
    return VmReport(
        name=name,
        pid=4711,
        status=status,
        reason=reason,
        trust_domain=domain,
        ram_bytes=64 * GIB,
        present_bytes=63 * GIB + (1 << 29),
        merged_pages=12_345_678,
        zero_pages=1_234_567,
        cow_broken_pages=234_567,
        deferred_pages=345_678,
        vmas=65_530,
        saved_bytes=45 * GIB + 12345,
        gates=12,
        stops=0,
    )


def sharing(vms: list[VmReport]) -> SharingReport:
    gates = Durations(count=141, p50=2.16, p95=3.32, p99=3.81, max=3.95)
    return SharingReport(
        converged=False,
        host=HostReport(
            pages_shared=12_345_678,
            pages_sharing=44_691_123,
            pages_unshared=None,
            pages_volatile=None,
            zero_pages=16_843_001,
            cow_broken_pages=1_234_567,
            full_scans=3,
            pages_scanned=200_774_000,
            saved_bytes=90 * GIB,
            overhead_bytes=67 << 20,
            profit_bytes=89 * GIB,
            stopped_ms=0.0,
            gate_ms=gates,
            drain_ms=Durations(),
        ),
        vms=vms,
        matrix=Matrix(vms=[vm.name for vm in vms], pages=[[7_654_321] * len(vms)] * len(vms)),
    )


def test_report_of_large_vms_fits_and_is_whole() -> None:
    out = console()
    reason = "345,678 mergeable pages wait for VMAs; vm.max_map_count=1000000 would admit them"
    vms = [
        vm_report("a-very-long-name-of-a-vm-that-has-to-wrap", "merged", reason),
        vm_report("[red]not markup[/red]", "gone", "the VM's process ended"),
    ]
    show_report(sharing(vms), out)
    shown = text(out)
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown.split("[red]not markup[/red]")[0].split("VMAs")[0]
    assert shown.count("12,345,678") >= 3
    assert "24,691,356" in shown  # merged pages of both
    assert "90.0 GiB saved" in shown
    assert "not converged" in shown
    assert "[red]not markup[/red]" in shown
    assert "vm.max_map_count=1000000" in " ".join(shown.split())
    assert "7,654,321" in shown


@pytest.mark.parametrize("columns", [20, 40, 60, 80])
def test_a_narrow_terminal_loses_no_vm(columns: int) -> None:
    out = Console(file=io.StringIO(), width=columns, markup=False, emoji=False, highlight=False)
    vms = [vm_report("web-1", "merged", None), vm_report("web-22", "scanning", None, "other")]
    show_report(sharing(vms), out)
    rows = [line for line in text(out).splitlines() if line.startswith("web-")]
    assert [row.split()[0] for row in rows[:2]] == ["web-1", "web-22"]
    assert all("45.0 GiB" in row for row in rows[:2])
    if columns >= 40:
        assert max(map(len, rows[:2])) <= columns


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_narrow_terminal_loses_nothing_of_other_tables(columns: int) -> None:
    out = Console(file=io.StringIO(), width=columns, markup=False, emoji=False, highlight=False)
    show_unmerged(
        Unmerged(
            vms=[
                UnmergedVm(
                    name="web-1", pid=4_194_303, restored_pages=16_777_216, remaining_pages=0
                )
            ],
            store_removed=True,
        ),
        out,
    )
    assert "web-1" in text(out)
    assert "16,777,216" in text(out)
    assert "4194303" in text(out)
    assert "…" not in text(out)


def test_domains_are_shown_when_there_are_several() -> None:
    one, two = console(), console()
    show_report(sharing([vm_report("a", "merged", None), vm_report("b", "merged", None)]), one)
    show_report(sharing([vm_report("a", "merged", None), vm_report("b", "merged", None, "x")]), two)
    assert "domain" not in text(one)
    assert "domain" in text(two)


def test_listing_says_why_not() -> None:
    out = console()
    kept = BackendListing(
        id="ram1", kind="", size_bytes=0, share=False, mergeable=False, reason="merge=off"
    )
    ram = BackendListing(id="ram0", kind="memfd", size_bytes=GIB, share=True, mergeable=True)
    found = VmList(
        vms=[
            VmListing(
                name="web",
                pid=1,
                qmp="/q",
                qemu_version="7.2.22",
                trust_domain="uid:0",
                mergeable=True,
                reason=None,
                backends=[ram, kept],
            ),
            VmListing(
                name="/run/x.sock",
                pid=None,
                qmp=None,
                qemu_version=None,
                trust_domain=None,
                mergeable=False,
                reason="no socket there",
            ),
        ]
    )
    show_vms(found, out)
    shown = text(out)
    assert "ram1: merge=off" in shown
    assert "no socket there" in shown
    assert "1.0 GiB" in shown


def test_funnel_shows_every_part() -> None:
    out = console()
    parts = {name: 1000 + number for number, name in enumerate(Funnel.model_fields) if number > 2}
    funnel = Funnel(name="web", ram_pages=sum(parts.values()), **parts)
    show_funnel(funnel, out)
    for pages in parts.values():
        assert f" {pages:,} " in text(out)


def test_analysis_of_an_empty_image() -> None:
    out = console()
    zeroes = {
        "total_pages": 0,
        "zero_pages": 0,
        "nonzero_pages": 0,
        "distinct_pages": 0,
        "duplicate_pages": 0,
    }
    one = VmContents(name="empty", **zeroes)
    show_analysis(ContentAnalysis(vms=[one], matrix=[[0]], **zeroes), out)
    assert "empty" in text(out)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (-3 << 29, "-1.5 GiB"),
        (5000 << 40, "5,000.0 TiB"),
    ],
)
def test_sizes(amount: int, expected: str) -> None:
    assert words.size(amount) == expected


def test_progress_without_a_terminal_is_a_line_a_stage() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream, enabled=True, terminal=False)
    for done in range(100):
        line.show_pass(PassProgress(0, "scan", "web", done, 100, 0))
    line.show_pass(PassProgress(0, "merge", "web", 50, 100, 1234))
    line.close()
    assert stream.getvalue().splitlines() == [
        "[........................]   0%  pass 1: scanning web",
        "[############............]  50%  pass 1: merging web  1,234 pages merged",
    ]


def test_progress_on_a_terminal_leaves_an_empty_line() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream, enabled=True, terminal=True)
    line.update("reading", 1, 2)
    line.update("reading", 2, 2)
    line.close()
    shown = stream.getvalue()
    assert "\n" not in shown
    assert "100%" in shown
    assert shown.endswith("\r\x1b[K")


def test_progress_that_nobody_wants_is_silent() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream, enabled=False, terminal=True)
    line.update("reading", 1, 2)
    line.close()
    assert stream.getvalue() == ""
