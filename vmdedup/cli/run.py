"""`vmdedup run`: the daemon; with a stop condition one merge; or only a plan."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.options import (
    STOP,
    TUNING,
    AsJson,
    Config,
    ControlValues,
    Domains,
    Libvirt,
    Mask,
    Qmp,
    RuntimeDir,
    ShowProgress,
    StateDir,
    make_settings,
)
from vmdedup.cli.outcome import (
    DONE,
    FAILURE,
    about,
    complain,
    finish,
    refusals,
    require_any,
)
from vmdedup.cli.report import show_sharing
from vmdedup.errors import UsageError
from vmdedup.linux import capabilities

if TYPE_CHECKING:
    from vmdedup.deduplicator import Deduplicator
    from vmdedup.models import SharingReport
    from vmdedup.settings import Settings

_DEFAULT_TIMEOUT_S = 120.0
_UNWATCHED = (
    "nobody watches these VMs for new hazards (a device that is plugged in, a migration) from"
    " here on; the daemon would (`vmdedup run`). `vmdedup unmerge` undoes the merges"
)


def run(
    qmp: Qmp = None,
    libvirt: Libvirt = None,
    config: Config = None,
    controls: ControlValues = None,
    runtime_dir: RuntimeDir = None,
    state_dir: StateDir = None,
    once: Annotated[
        bool, typer.Option("--once", help="Do one pass, then report.", rich_help_panel=STOP)
    ] = False,
    passes: Annotated[
        int | None,
        typer.Option(
            "--passes", metavar="N", min=1, help="Do N passes, then report.", rich_help_panel=STOP
        ),
    ] = None,
    until_converged: Annotated[
        bool,
        typer.Option(
            "--until-converged",
            help="Do passes until they add next to nothing.",
            rich_help_panel=STOP,
        ),
    ] = False,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="S",
            min=0,
            help="Seconds after which the run ends in any case (default:"
            f" {_DEFAULT_TIMEOUT_S:g}; as a daemon, none).",
            show_default=False,
            rich_help_panel=STOP,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be merged; change nothing.", rich_help_panel=STOP
        ),
    ] = False,
    domains: Domains = None,
    mask: Mask = None,
    vma_budget: Annotated[
        int | None,
        typer.Option(
            "--vma-budget", metavar="N", help="Most VMAs a VM may have.", rich_help_panel=TUNING
        ),
    ] = None,
    zero_pages: Annotated[
        bool | None,
        typer.Option(
            "--zero-pages/--no-zero-pages",
            help="Merge zero pages.",
            show_default=False,
            rich_help_panel=TUNING,
        ),
    ] = None,
    gate_runs: Annotated[
        int | None,
        typer.Option(
            "--gate-runs", metavar="N", help="Most runs in one gate.", rich_help_panel=TUNING
        ),
    ] = None,
    gate_pages: Annotated[
        int | None,
        typer.Option(
            "--gate-pages", metavar="N", help="Most pages in one gate.", rich_help_panel=TUNING
        ),
    ] = None,
    progress: ShowProgress = None,
    as_json: AsJson = False,
) -> int:
    """Merge identical pages of running VMs: as a daemon, or once.

    Without --once, --passes or --until-converged it is the daemon: until SIGTERM
    or SIGINT it follows VMs as they come and go, and the other verbs steer it.
    Merged pages stay merged when it ends.
    """
    if sum([once, passes is not None, until_converged]) > 1:
        raise UsageError("give one of --once, --passes and --until-converged, not several")

    for line in _lacking():
        complain(line)

    def settings() -> Settings:
        return make_settings(
            config=config,
            domains=domains,
            mask=mask,
            controls=[*(controls or ()), *_as_controls(vma_budget, zero_pages)],
            runtime_dir=runtime_dir,
            state_dir=state_dir,
            qmp=qmp,
            libvirt=libvirt,
            gate_runs=gate_runs,
            gate_pages=gate_pages,
        )

    if dry_run:
        return _plan(settings(), as_json=as_json)
    if not once and passes is None and not until_converged:
        return _serve(settings, timeout_s, as_json=as_json)
    return _merge(
        settings(),
        passes=1 if once else passes,
        until_converged=until_converged,
        timeout_s=_DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
        progress=progress,
        as_json=as_json,
    )


def _as_controls(vma_budget: int | None, zero_pages: bool | None) -> list[str]:
    """The two options that are controls, as `--controls` has them."""
    words = [] if vma_budget is None else [f"vma_budget={vma_budget}"]
    return words if zero_pages is None else [*words, f"use_zero_pages={int(zero_pages)}"]


def _lacking() -> list[str]:
    """Abilities that root lacks here: a container or a unit may have removed capabilities."""
    if os.geteuid() != 0:
        return []
    from vmdedup.linux import realtime

    lines = [
        f"works without {each.label}, which it needs to {capabilities.PURPOSE[each]}"
        for each in capabilities.lacking()
    ]
    if not realtime.is_allowed():
        lines.append(
            "real-time scheduling is denied (RestrictRealtime= of a unit, or its cgroup): guests"
            " wait longer in gates on a busy host"
        )
    return lines


def _serve(settings: Callable[[], Settings], timeout_s: float | None, *, as_json: bool) -> int:
    """Run the daemon until a signal (or the time) ends it; then show its last report."""
    from vmdedup.daemon.daemon import Daemon

    service = Daemon(settings(), settings)
    with _ending_after(service.end, timeout_s):
        sharing = service.run()
    show_sharing(sharing, as_json=as_json)
    # A daemon ends when its starter ends it: that is success.
    return DONE


def _plan(settings: Settings, *, as_json: bool) -> int:
    from vmdedup.deduplicator import Deduplicator

    with Deduplicator(settings) as dedup:
        found = dedup.attach(settings.qmp, merging=False)
        require_any(found)
        plan = dedup.plan()
    from vmdedup.report.text import show_plan

    served = any(vm.mergeable for vm in found.vms)
    return finish(plan, show_plan, as_json=as_json, served=served, complaints=refusals(found))


def _merge(
    settings: Settings,
    *,
    passes: int | None,
    until_converged: bool,
    timeout_s: float,
    progress: bool | None,
    as_json: bool,
) -> int:
    from vmdedup.deduplicator import Deduplicator

    stop = threading.Event()
    with _stopping_signals(stop) as received, Deduplicator(settings) as dedup:
        found = dedup.attach(settings.qmp)
        require_any(found)
        for line in [*refusals(found), *dedup.warnings()]:
            complain(line)
        report = _run(
            dedup,
            stop,
            passes=passes,
            until_converged=until_converged,
            timeout_s=timeout_s,
            progress=progress,
        )
    from vmdedup.report.table import show_report

    served = any(vm.is_served for vm in report.vms)
    failed = [about(vm.name, vm.pid, vm.reason) for vm in report.vms if not vm.is_served]
    known = set(refusals(found))
    lost = [line for line in failed if line not in known]
    code = finish(report, show_report, as_json=as_json, served=served, complaints=lost)
    if received:
        complain("interrupted before it was done; merged pages stay merged")
    if any(vm.merged_pages or vm.zero_pages for vm in report.vms):
        complain(_UNWATCHED)
    return FAILURE if received else code


def _run(
    dedup: Deduplicator,
    stop: threading.Event,
    *,
    passes: int | None,
    until_converged: bool,
    timeout_s: float,
    progress: bool | None,
) -> SharingReport:
    from vmdedup.report.progress import progress_line

    with progress_line(progress) as line:
        return dedup.run(
            passes=passes,
            until_converged=until_converged,
            timeout_s=timeout_s,
            stop=stop,
            progress=line.show_pass,
        )


@contextmanager
def _stopping_signals(stop: threading.Event) -> Iterator[list[int]]:
    """SIGINT and SIGTERM set `stop`; a second SIGINT interrupts at once. Yields those received."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ending_after(end: Callable[[], None], timeout_s: float | None) -> Iterator[None]:
    """Call `end` after so many seconds if the block is still at work."""
    if timeout_s is None:
        yield
        return
    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
