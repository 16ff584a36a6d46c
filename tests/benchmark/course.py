"""What every contender goes through, and the benchmark that has all of them do it.

    off    guests run, nothing merged, probes heard
    race   guests frozen: the exact bound, then merging until settled, sampled
    undo   guests frozen: everything unmerged
    on     guests run, merged again, scanned on at full speed: processor time and probes;
           the same at the contender's own pace where it has one
    off    again, to know how far the machine itself has drifted

Owns that order. Promises that each contender begins on guests that are wholly
unmerged, with a bound of its own. The two last and the first need a contender that
is measured in the steady state.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.benchmark import ksm, results
from tests.benchmark.budget import BudgetPoint, curve
from tests.benchmark.contenders import Contender, Ksm, Vmdedup
from tests.benchmark.gauge import Gauge, Kernel, Recorder, Sample, moment
from tests.benchmark.guests import (
    BackendKind,
    Guests,
    Probed,
    own_store_dir,
    require_images,
    sweep,
)
from tests.benchmark.results import BenchResult, Course, Host, Reached, Slowdown, Steady, ratios
from vmdedup.accounting.analyze import QmpSource, analyze
from vmdedup.controls import Controls
from vmdedup.settings import Settings
from vmdedup.units import PAGE_BYTES

Tell = Callable[[str], None]

_POLL_S = 0.05
_AFTER_S = 0.2
"""Recorded beyond the moment at which a contender has settled."""
_TIMELINE_POINTS = 400
_SLOW_LIMIT_S = 600.0
_FAST_LIMIT_S = 120.0
_DEFAULT_SCAN_S = float(Controls().advisor_target_scan_time)
"""Time in which one scan at vmdedup's defaults comes."""
_NOTHING_LIMIT_S = 5.0
"""How long KSM is watched doing nothing on share=on."""


@dataclass(frozen=True)
class Options:
    """What to measure on."""

    workloads: tuple[str, ...]
    mib: int
    runs: int
    settle_s: float
    window_s: float
    contenders: tuple[str, ...]
    """Names in `results`."""


ALL = (
    results.KSM_DEFAULTS,
    results.KSM_FULL,
    results.KSM_FULL_ZERO,
    results.KSM_NOT_SMART,
    results.KSM_ADVISOR,
    results.OURS_RAM,
    results.OURS_RAM_DEFAULTS,
    results.KSM_SHARED,
    results.OURS_SHARED,
)


def bench(options: Options, tell: Tell) -> BenchResult:
    """Measure. Raises GuestError, BenchError, other VmdedupErrors; everything is undone then."""
    require_images(options.workloads, tell)
    sweep()
    courses: list[Course] = []
    budget: list[BudgetPoint] = []
    with ExitStack() as exits:
        kernel = exits.enter_context(ksm.KsmSettings())
        kernel.rest()
        for backend in ("ram", "memfd"):
            names = [name for name in options.contenders if _backend(name) == backend]
            if names:
                _bench_backend(options, backend, names, kernel, tell, courses, budget)
    return BenchResult(
        host=_host(),
        workloads=list(options.workloads),
        vm_mib=options.mib,
        runs=options.runs,
        ratios=ratios(courses),
        courses=courses,
        budget=budget,
    )


def _bench_backend(
    options: Options,
    backend: BackendKind,
    names: Sequence[str],
    kernel: ksm.KsmSettings,
    tell: Tell,
    courses: list[Course],
    budget: list[BudgetPoint],
) -> None:
    """All contenders of one backend; what they did goes into `courses` and `budget`."""
    store_dir = own_store_dir()
    with Guests(options.workloads, backend, options.mib, _prefixed(tell, backend)) as guests:
        gauge = Gauge(guests.each, store_dir)
        tell(f"{backend}: guests settle")
        time.sleep(options.settle_s)
        if results.OURS_RAM in names:  # before any merge: what one leaves behind counts too
            tell("what VMAs buy")
            budget += _curve(guests, store_dir)
        for run in range(options.runs):
            for name in names:
                what = name if options.runs == 1 else f"run {run + 1}: {name}"
                contender = _contender(name, guests, gauge, store_dir, kernel)
                walk = _Walk(contender, guests, gauge, options, _prefixed(tell, what))
                courses.append(walk.course(run))


def _curve(guests: Guests, store_dir: Path) -> list[BudgetPoint]:
    """Plans for the frozen guests, never merged yet, under growing VMA budgets."""
    settings = Settings(runtime_dir=guests.directory / "plans", store_dir=store_dir)
    with guests.frozen():
        return curve([str(guest.qmp_path) for guest in guests.each], settings)


def _prefixed(tell: Tell, prefix: str) -> Tell:
    return lambda what: tell(f"{prefix}: {what}")


def _backend(name: str) -> BackendKind:
    return "memfd" if name in (results.KSM_SHARED, results.OURS_SHARED) else "ram"


_KSM_COURSES: dict[str, tuple[dict[str, str] | None, float, bool]] = {
    results.KSM_DEFAULTS: (ksm.KERNEL_DEFAULTS, _SLOW_LIMIT_S, False),
    results.KSM_FULL: (ksm.FULL_SPEED, _FAST_LIMIT_S, True),
    results.KSM_FULL_ZERO: ({**ksm.FULL_SPEED, "use_zero_pages": "1"}, _FAST_LIMIT_S, False),
    results.KSM_NOT_SMART: ({**ksm.FULL_SPEED, "smart_scan": "0"}, _FAST_LIMIT_S, True),
    results.KSM_ADVISOR: (
        {**ksm.KERNEL_DEFAULTS, "advisor_mode": "scan-time"},
        _SLOW_LIMIT_S,
        False,
    ),
    results.KSM_SHARED: (ksm.FULL_SPEED, _NOTHING_LIMIT_S, False),
}
"""Settings, when to give up, and whether it is measured in the steady state too."""


def _contender(
    name: str, guests: Guests, gauge: Gauge, store_dir: Path, kernel: ksm.KsmSettings
) -> Contender:
    settings, limit_s, is_steady = _KSM_COURSES.get(
        name, (None, _FAST_LIMIT_S, name != results.OURS_RAM_DEFAULTS)
    )
    if settings is not None:
        return Ksm(
            name,
            settings,
            kernel,
            gauge,
            backend=_backend(name),
            limit_s=limit_s,
            is_steady=is_steady,
        )
    return Vmdedup(
        name,
        guests,
        gauge,
        store_dir,
        backend=_backend(name),
        limit_s=limit_s,
        is_steady=is_steady,
        at_defaults=name == results.OURS_RAM_DEFAULTS,
    )


_RanOn = tuple[Steady, Slowdown]
"""What a contender took while the guests ran, and what that cost them."""


class _Walk:
    """One contender's way through the course."""

    def __init__(
        self, contender: Contender, guests: Guests, gauge: Gauge, options: Options, tell: Tell
    ) -> None:
        self._contender = contender
        self._guests = guests
        self._gauge = gauge
        self._options = options
        self._tell = tell

    def course(self, run: int) -> Course:
        """Do it."""
        contender, gauge = self._contender, self._gauge
        steady, at_defaults, report = None, None, None
        self._tell("counting the exact bound")
        with self._guests.frozen():
            distinct_pages = self._distinct_pages()
            population = gauge.populated()
            with contender:
                held_pages, held_pss_bytes = gauge.held_pages(), gauge.pss_bytes()
                before = gauge.kernel()
                bound_pages = held_pages - distinct_pages
                samples = self._race(bound_pages)
                saved_pages = held_pages - gauge.held_pages()
                saved_pss_bytes = held_pss_bytes - gauge.pss_bytes()
                overhead = contender.overhead_bytes(before)
                complaints = contender.complaints()
                self._tell("unmerging")
                undone = contender.unmerge()
                gauge.populate(population)
                remained_pages = held_pages - gauge.held_pages()
                if contender.is_steady:
                    steady, at_defaults, overhead = self._run_on(held_pages, before)
                report = contender.report()
            gauge.populate(population)
        return Course(
            contender=contender.name,
            backend=contender.backend,
            run=run,
            held_pages=held_pages,
            bound_pages=bound_pages,
            saved_pages=saved_pages,
            saved_pss_bytes=saved_pss_bytes,
            saved_vs_bound=round(saved_pages / bound_pages, 5) if bound_pages else 0.0,
            to_50=_reached(samples, 0.50 * bound_pages),
            to_90=_reached(samples, 0.90 * bound_pages),
            to_99=_reached(samples, 0.99 * bound_pages),
            settled=Reached(wall_s=samples[-1].wall_s, cpu_s=samples[-1].cpu_s),
            unmerge_s=undone.wall_s,
            unmerge_cpu_s=undone.cpu_s,
            remained_pages=remained_pages,
            steady=steady and steady[0],
            slowdown=steady and steady[1],
            steady_at_defaults=at_defaults and at_defaults[0],
            slowdown_at_defaults=at_defaults and at_defaults[1],
            gate_ms=None if report is None else report.host.gate_ms,
            drain_ms=None if report is None else report.host.drain_ms,
            stops=None if report is None else sum(vm.stops or 0 for vm in report.vms),
            overhead_bytes=overhead,
            complaints=complaints,
            timeline=list(_thinned(samples)),
        )

    def _distinct_pages(self) -> int:
        counts = analyze([QmpSource(str(guest.qmp_path)) for guest in self._guests.each])
        return counts.distinct_pages

    def _race(self, bound_pages: int) -> list[Sample]:
        contender = self._contender

        def cpu_s() -> float:
            return contender.cpu_s(frozen=True)

        with Recorder(contender.saved_pages_soon, cpu_s) as recorder:
            contender.begin()
            while not contender.settled() and recorder.elapsed_s < contender.limit_s:
                percent = 100 * recorder.saved_pages // max(1, bound_pages)
                self._tell(f"merging, {percent}% of the bound")
                time.sleep(_POLL_S)
            time.sleep(_AFTER_S)
        return recorder.samples

    def _run_on(
        self, held_pages: int, before: Kernel
    ) -> tuple[_RanOn, _RanOn | None, dict[str, int]]:
        """The guests run; off, on, off. They are frozen again at the end.

        Returns what it was at full speed, at the contender's own pace, and the overhead.
        """
        contender, window_s = self._contender, self._options.window_s
        self._guests.cont()
        self._tell("guests run, nothing merged")
        first_off = self._probed(window_s)
        contender.begin()
        deadline = time.monotonic() + contender.limit_s
        while not contender.settled() and time.monotonic() < deadline:
            self._tell("merging the running guests")
            time.sleep(_POLL_S)
        contender.hurry()
        self._tell("guests run, merged, full speed")
        steady, on = self._watched(window_s, held_pages)
        overhead = contender.overhead_bytes(before)
        eased = None
        if contender.ease():
            self._tell("guests run, merged")
            eased = self._watched(max(window_s, _DEFAULT_SCAN_S), held_pages)
        contender.unmerge()
        self._tell("guests run, nothing merged")
        last_off = self._probed(window_s)
        self._guests.stop()
        fast = steady, _slowdown(first_off, on, last_off)
        slow = None if eased is None else (eased[0], _slowdown(first_off, eased[1], last_off))
        return fast, slow, overhead

    def _watched(self, window_s: float, held_pages: int) -> tuple[Steady, list[float]]:
        """What the contender takes in a window, and the probes meanwhile."""
        contender = self._contender
        time.sleep(2.0)
        passes, cpu_s, began = contender.passes(), contender.cpu_s(frozen=False), time.monotonic()
        on = self._probed(window_s)
        cpu_s = contender.cpu_s(frozen=False) - cpu_s
        passed_s = time.monotonic() - began
        passes = contender.passes() - passes
        per_pass = cpu_s / passes if passes else None
        gib = held_pages * PAGE_BYTES / 2**30
        steady = Steady(
            window_s=passed_s,
            passes=passes,
            cpu_s=cpu_s,
            cpu_per_pass_s=per_pass,
            cpu_per_pass_and_gib_s=None if per_pass is None else per_pass / gib,
            cpu_share=cpu_s / passed_s,
            cpu_share_per_gib=cpu_s / passed_s / gib,
        )
        return steady, on

    def _probed(self, window_s: float) -> list[float]:
        """Operations per second of each guest, over a window that begins a little later."""
        time.sleep(1.0)
        before = self._guests.probed()
        time.sleep(window_s)
        return [
            _rate(first, last) for first, last in zip(before, self._guests.probed(), strict=True)
        ]


def _rate(first: Probed | None, last: Probed | None) -> float:
    if first is None or last is None:
        return 0.0
    if first.busy_us is None or last.busy_us is None:
        return (last.ops - first.ops) / (last.at_s - first.at_s)
    return (last.ops - first.ops) / max(1, last.busy_us - first.busy_us) * 1e6


def _slowdown(first_off: list[float], on: list[float], last_off: list[float]) -> Slowdown:
    off = [(a + b) / 2 for a, b in zip(first_off, last_off, strict=True)]
    lost = [1 - now / before for now, before in zip(on, off, strict=True) if before]
    drift = [abs(a - b) / (a + b) * 2 for a, b in zip(first_off, last_off, strict=True) if a + b]
    return Slowdown(
        off_ops_per_s=sum(off) / max(1, len(off)),
        on_ops_per_s=sum(on) / max(1, len(on)),
        slowdown=sum(lost) / max(1, len(lost)),
        noise=sum(drift) / max(1, len(drift)),
    )


def _reached(samples: Sequence[Sample], pages: float) -> Reached | None:
    found = moment(samples, pages)
    return None if found is None else Reached(wall_s=found.wall_s, cpu_s=found.cpu_s)


def _thinned(samples: Sequence[Sample]) -> Iterator[tuple[float, float, int]]:
    """Samples enough to draw the curve: where it changes, at most so many."""
    step = max(1, samples[-1].saved_pages // _TIMELINE_POINTS)
    drawn = None
    for sample in (*samples[:-1],):
        if drawn is None or abs(sample.saved_pages - drawn) >= step:
            drawn = sample.saved_pages
            yield round(sample.wall_s, 4), round(sample.cpu_s, 4), drawn
    last = samples[-1]
    yield round(last.wall_s, 4), round(last.cpu_s, 4), last.saved_pages


def _host() -> Host:
    command = ["qemu-system-x86_64", "--version"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    version = re.search(r"version (\S+)", said.stdout)
    return Host(
        kernel=platform.release(),
        processors=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES,
        qemu=version[1] if version else "unknown",
    )
