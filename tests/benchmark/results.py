"""The figures of a benchmark and the ratios that follow from them.

Owns the JSON document. Promises that every ratio is of figures from this run: ours
divided by KSM's at full speed unless its name says otherwise, or by the exact bound;
null where one of the two was not measured or never came so far. With several runs
a ratio is of the medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from pydantic import Field

from tests.benchmark.budget import BudgetPoint
from vmdedup.models import Durations, Model

BENCH_SCHEMA_VERSION = 2

KSM_DEFAULTS = "KSM defaults"
KSM_FULL = "KSM full speed"
KSM_FULL_ZERO = "KSM full speed, use_zero_pages"
KSM_NOT_SMART = "KSM full speed, no smart_scan"
KSM_ADVISOR = "KSM advisor"
KSM_SHARED = "KSM on share=on"
OURS_RAM = "vmdedup"
OURS_RAM_DEFAULTS = "vmdedup defaults"
OURS_SHARED = "vmdedup on share=on"


class Reached(Model):
    """When a share of the bound was saved."""

    wall_s: float
    cpu_s: float


class Steady(Model):
    """What a contender takes while the guests run on and all is merged."""

    window_s: float
    passes: int
    cpu_s: float
    cpu_per_pass_s: float | None
    cpu_per_pass_and_gib_s: float | None = Field(description="per GiB that the guests hold")
    cpu_share: float = Field(description="of one processor")
    cpu_share_per_gib: float


class Slowdown(Model):
    """The guests' probes: operations per second, mean over the guests."""

    off_ops_per_s: float = Field(description="nothing merged and nothing scanned")
    on_ops_per_s: float = Field(description="all merged, scanned on")
    slowdown: float = Field(description="1 - on / off, mean over the guests")
    noise: float = Field(description="between the two times without, before and after")


class Course(Model):
    """What one contender did in one run."""

    contender: str
    backend: str
    run: int
    held_pages: int = Field(description="frames the frozen guests held before")
    bound_pages: int = Field(description="most that can be saved, exactly")
    saved_pages: int = Field(description="by distinct page frames, settled, guests frozen")
    saved_pss_bytes: int
    saved_vs_bound: float
    to_50: Reached | None
    to_90: Reached | None
    to_99: Reached | None
    settled: Reached = Field(description="when it had nothing left to do, or its time was over")
    unmerge_s: float
    unmerge_cpu_s: float
    remained_pages: int = Field(description="still saved after the unmerge, in frames")
    steady: Steady | None = Field(description="at full speed")
    slowdown: Slowdown | None = Field(description="at full speed")
    steady_at_defaults: Steady | None = Field(
        description="of vmdedup: at the pace it has by itself"
    )
    slowdown_at_defaults: Slowdown | None
    gate_ms: Durations | None
    drain_ms: Durations | None
    stops: int | None
    overhead_bytes: dict[str, int]
    complaints: list[str] = Field(description="what makes these figures worth less")
    timeline: list[tuple[float, float, int]] = Field(description="wall s, CPU s, saved pages")

    @property
    def overhead_sum_bytes(self) -> int:
        """All memory that merging costs."""
        return sum(self.overhead_bytes.values())


class Ratios(Model):
    """The figures to compare by; lower is better, but for the first two."""

    saved_vs_bound_ram: float | None
    saved_vs_bound_shared: float | None
    cpu_to_99: float | None
    wall_to_99: float | None
    cpu_to_99_shared: float | None = Field(description="ours on share=on to KSM on private RAM")
    wall_to_99_shared: float | None
    steady_cpu_per_pass: float | None = Field(description="both at full speed")
    steady_cpu_per_pass_no_smart_scan: float | None
    defaults_wall_to_99: float | None
    unmerge: float | None
    overhead: float | None


class Host(Model):
    """Where it was measured."""

    kernel: str
    processors: int
    memory_bytes: int
    qemu: str


class BenchResult(Model):
    """All figures of a benchmark of KSM and vmdedup."""

    schema_version: int = BENCH_SCHEMA_VERSION
    host: Host
    workloads: list[str]
    vm_mib: int
    runs: int
    ratios: Ratios
    courses: list[Course]
    budget: list[BudgetPoint] = Field(description="what a plan saves by VMAs; private RAM")


def figure(course: Course, path: str) -> float | None:
    """A number of a course by its path (`to_99.wall_s`); None where it was not measured."""
    value: object = course
    for name in path.split("."):
        if value is None:
            return None
        value = getattr(value, name)
    return float(value) if isinstance(value, (int, float)) else None


def spread(courses: Iterable[Course], contender: str, path: str) -> list[float]:
    """A figure over all runs of a contender, ascending; runs without it left out."""
    found = [figure(course, path) for course in courses if course.contender == contender]
    return sorted(value for value in found if value is not None)


def median(courses: Iterable[Course], contender: str, path: str) -> float | None:
    """Its median; None when no run has it."""
    values = spread(courses, contender, path)
    return statistics.median(values) if values else None


def ratios(courses: Sequence[Course]) -> Ratios:
    """The ratios of these courses."""

    def of(ours: str, theirs: str, path: str) -> float | None:
        mine, its = median(courses, ours, path), median(courses, theirs, path)
        return None if mine is None or not its else round(mine / its, 4)

    def saved(contender: str) -> float | None:
        return median(courses, contender, "saved_vs_bound")

    return Ratios(
        saved_vs_bound_ram=saved(OURS_RAM),
        saved_vs_bound_shared=saved(OURS_SHARED),
        cpu_to_99=of(OURS_RAM, KSM_FULL, "to_99.cpu_s"),
        wall_to_99=of(OURS_RAM, KSM_FULL, "to_99.wall_s"),
        cpu_to_99_shared=of(OURS_SHARED, KSM_FULL, "to_99.cpu_s"),
        wall_to_99_shared=of(OURS_SHARED, KSM_FULL, "to_99.wall_s"),
        steady_cpu_per_pass=of(OURS_RAM, KSM_FULL, "steady.cpu_per_pass_s"),
        steady_cpu_per_pass_no_smart_scan=of(OURS_RAM, KSM_NOT_SMART, "steady.cpu_per_pass_s"),
        defaults_wall_to_99=of(OURS_RAM_DEFAULTS, KSM_DEFAULTS, "to_99.wall_s"),
        unmerge=of(OURS_RAM, KSM_FULL, "unmerge_s"),
        overhead=of(OURS_RAM, KSM_FULL, "overhead_sum_bytes"),
    )
