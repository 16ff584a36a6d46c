"""The benchmark's figures, ratios and tables, and the core's growth on a small size."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.benchmark import guests, results
from tests.benchmark.errors import BenchError
from tests.benchmark.gauge import Sample, moment
from tests.benchmark.plot import plot, require_plot
from tests.benchmark.results import (
    BenchResult,
    Course,
    Host,
    Reached,
    Steady,
    median,
    ratios,
    spread,
)
from tests.benchmark.simulate import run_size
from tests.benchmark.table import show_bench
from vmdedup.report.console import make_console

pytestmark = pytest.mark.unit


def steady(pass_s: float) -> Steady:
    return Steady(
        window_s=10.0,
        passes=100,
        cpu_s=100 * pass_s,
        cpu_per_pass_s=pass_s,
        cpu_per_pass_and_gib_s=2 * pass_s,
        cpu_share=10 * pass_s,
        cpu_share_per_gib=20 * pass_s,
    )


def course(
    contender: str,
    *,
    run: int = 0,
    wall_s: float | None = 1.0,
    cpu_s: float = 1.0,
    pass_s: float | None = None,
) -> Course:
    reached = None if wall_s is None else Reached(wall_s=wall_s, cpu_s=cpu_s)
    return Course(
        contender=contender,
        backend="ram",
        run=run,
        held_pages=1000,
        bound_pages=600,
        saved_pages=597,
        saved_pss_bytes=597 * 4096,
        saved_vs_bound=0.995,
        to_50=reached,
        to_90=reached,
        to_99=reached,
        settled=Reached(wall_s=9.0, cpu_s=9.0),
        unmerge_s=2.0,
        unmerge_cpu_s=1.0,
        remained_pages=0,
        steady=None if pass_s is None else steady(pass_s),
        slowdown=None,
        steady_at_defaults=None,
        slowdown_at_defaults=None,
        gate_ms=None,
        drain_ms=None,
        stops=None,
        overhead_bytes={"rmap_items": 64_000},
        complaints=[],
        timeline=[(0.0, 0.0, 0), (1.0, 1.0, 597)],
    )


def result(courses: list[Course]) -> BenchResult:
    return BenchResult(
        host=Host(kernel="6.18", processors=2, memory_bytes=1 << 30, qemu="7.2"),
        workloads=["idle"],
        vm_mib=384,
        runs=1,
        ratios=ratios(courses),
        courses=courses,
        budget=[],
    )


def test_a_ratio_is_ours_to_theirs_and_of_the_medians() -> None:
    courses = [course(results.KSM_FULL, run=run, wall_s=wall) for run, wall in enumerate((1, 4, 9))]
    courses += [
        course(results.OURS_RAM, run=run, wall_s=wall) for run, wall in enumerate((3, 1, 2))
    ]
    assert spread(courses, results.KSM_FULL, "to_99.wall_s") == [1, 4, 9]
    assert median(courses, results.OURS_RAM, "to_99.wall_s") == 2
    assert ratios(courses).wall_to_99 == 0.5
    assert ratios(courses).saved_vs_bound_ram == 0.995


def test_a_pass_is_compared_with_one_of_ksm_at_full_speed_with_smart_scan_and_without() -> None:
    courses = [
        course(results.KSM_FULL, pass_s=0.04),
        course(results.KSM_NOT_SMART, pass_s=0.2),
        course(results.OURS_RAM, pass_s=0.004),
    ]
    found = ratios(courses)
    assert found.steady_cpu_per_pass == 0.1
    assert found.steady_cpu_per_pass_no_smart_scan == 0.02


def test_what_was_not_measured_has_no_ratio() -> None:
    never = [course(results.KSM_FULL, wall_s=None), course(results.OURS_RAM)]
    found = ratios(never)
    assert found.wall_to_99 is None
    assert found.cpu_to_99 is None
    assert found.steady_cpu_per_pass is None
    assert found.saved_vs_bound_shared is None
    assert ratios([]).unmerge is None


def test_a_share_is_reached_at_the_first_sample_that_has_it() -> None:
    samples = [Sample(0.0, 0.0, -5), Sample(1.0, 0.5, 50), Sample(2.0, 0.6, 50)]
    assert moment(samples, 50) == samples[1]
    assert moment(samples, 51) is None


def test_the_table_names_every_contender_and_says_where_nothing_was_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_bench(
        result([course(results.KSM_FULL, wall_s=None), course(results.OURS_RAM)]), make_console()
    )
    shown = capsys.readouterr().out
    assert "KSM full" in shown
    assert "to 99%, s" in shown
    line = next(line for line in shown.splitlines() if "to 99%, s" in line)
    assert line.split()[-2:] == ["-", "1.00"]
    assert "saved_vs_bound_ram" in shown


def test_a_picture_is_drawn_or_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="must end in"):
        require_plot(tmp_path / "saved.jpg")
    with pytest.raises(BenchError, match="no such directory"):
        require_plot(tmp_path / "nowhere" / "saved.svg")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    require_plot(tmp_path / "saved.svg")
    plot(result([course(results.KSM_FULL), course(results.OURS_RAM)]), tmp_path / "saved.svg")
    drawn = (tmp_path / "saved.svg").read_text()
    assert "<svg" in drawn


def test_missing_guests_and_unknown_workloads_are_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(guest: str) -> None:
        raise subprocess.CalledProcessError(1, ["images/build.sh", guest])

    monkeypatch.setattr(guests, "image", fails)
    with pytest.raises(BenchError, match=r"images/build.sh debian"):
        guests.require_images(["nginx"], print)
    with pytest.raises(BenchError, match=r"no workload 'doom'"):
        guests.require_images(["doom"], print)


def test_the_simulated_fleet_merges_what_its_mix_says() -> None:
    size = run_size(1 << 16)
    assert size.columns_bytes_per_page <= 24
    assert 0.6 < size.merged_pages / size.pages < 0.95
    assert 0 < size.new_store_pages < size.merged_pages
    assert size.steady[0].changed_pages == 0
    assert size.steady[-1].changed_pages == pytest.approx(0.02 * size.pages, rel=0.5)
