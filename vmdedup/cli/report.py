"""`vmdedup report`: the memory shared now, read back from the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.options import (
    AsJson,
    Domains,
    Libvirt,
    Output,
    Qmp,
    ReportFormat,
    RuntimeDir,
    known_files,
    make_settings,
    report_format,
)
from vmdedup.cli.outcome import (
    BELOW,
    DONE,
    FAILURE,
    about,
    complain,
    finish,
    put,
    require_any,
)
from vmdedup.cli.service import daemon_if_running
from vmdedup.errors import UsageError
from vmdedup.report.files import as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmdedup.client import Client
    from vmdedup.deduplicator import Deduplicator
    from vmdedup.models import HistorySample, SharingReport
    from vmdedup.report.baseline import Comparison
    from vmdedup.report.files import Format

_TOLERANCE = "5"
_NOTED_S, _NOTED_POINTS = 86_400, 240
"""Seconds of history on the page, and most samples of it."""


def report(
    qmp: Qmp = None,
    libvirt: Libvirt = None,
    domains: Domains = None,
    form: ReportFormat = None,
    output: Output = None,
    fail_under: Annotated[
        str | None,
        typer.Option(
            "--fail-under",
            metavar="N%",
            help="Exit with 3 if less than N% of the memory held before merging is saved.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="FILE",
            help="An earlier report in JSON; exit with 3 if a VM shares less now.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        str,
        typer.Option(
            "--tolerance",
            metavar="N%",
            help="Percentage points below the baseline that count as no loss.",
        ),
    ] = _TOLERANCE,
    against: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="KSM",
            help="Say what the kernel's KSM would save on the same VMs; reads all their memory.",
            show_default=False,
        ),
    ] = None,
    known: Annotated[
        list[Path] | None,
        typer.Option(
            "--known",
            metavar="FILE",
            help="Say which contents come from this file or folder, as `explain --contents`.",
            show_default=False,
        ),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Show an earlier report in JSON; ask neither daemon nor kernel.",
            show_default=False,
        ),
    ] = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Show what each VM shares now, and how much memory that saves.

    Asks the daemon if one runs; otherwise reads from the kernel.
    """
    wanted = report_format(form, output, as_json)
    least_percent = None if fail_under is None else _percentage("--fail-under", fail_under)
    tolerance_percent = _percentage("--tolerance", tolerance)
    before = None if baseline is None else read_report("--baseline", baseline)
    if earlier is not None and qmp:
        raise UsageError("--from and --qmp exclude each other")
    if against is not None and against.upper() != "KSM":
        raise UsageError(f"--compare {against}: there is only KSM to compare with")
    if earlier is not None and (against is not None or known):
        raise UsageError("--from excludes --compare and --known, which look at the VMs")
    files = known_files(known)
    if earlier is None:
        sharing = sharing_now(
            qmp, libvirt, domains, runtime_dir, with_ksm=against is not None, known=files
        )
    else:
        sharing = read_report("--from", earlier)
    noted: list[HistorySample] = []
    if wanted == "html" and earlier is None and not qmp and not libvirt:
        noted = _noted(runtime_dir)
    comparison = None
    if before is not None:
        from vmdedup.report.baseline import compare

        comparison = compare(sharing, before, tolerance_percent)
    code = _deliver(sharing, wanted, output, comparison, noted)
    if code == DONE and least_percent is not None:
        code = _judge(sharing, least_percent)
    return code if code == FAILURE or comparison is None else max(code, _compared(comparison))


def sharing_now(
    qmp: list[str] | None,
    libvirt: str | None,
    domains: list[str] | None,
    runtime_dir: Path | None,
    *,
    with_ksm: bool = False,
    known: Sequence[str] = (),
) -> SharingReport:
    """The daemon's report of now if one runs and no VM is named, else the kernel's own.

    With what a look at all contents adds to it, if that is wanted.
    """
    service = None if qmp or libvirt else daemon_if_running(runtime_dir)
    if service is not None:
        with service:
            sharing = service.compare_with_ksm() if with_ksm else service.report(fresh=True)
            return _with_sources(sharing, service, known)
    from vmdedup.deduplicator import Deduplicator

    settings = make_settings(domains=domains, runtime_dir=runtime_dir, libvirt=libvirt)
    with Deduplicator(settings) as dedup:
        require_any(dedup.attach(qmp or (), merging=False))
        sharing = dedup.compare_with_ksm() if with_ksm else dedup.report()
        return _with_sources(sharing, dedup, known)


def _with_sources(
    sharing: SharingReport, looker: Client | Deduplicator, known: Sequence[str]
) -> SharingReport:
    if not known:
        return sharing
    return sharing.model_copy(update={"sources": looker.content_sources(known)})


def _noted(runtime_dir: Path | None) -> list[HistorySample]:
    """Samples of the last day from a running daemon; an older one has none."""
    service = daemon_if_running(runtime_dir)
    if service is None:
        return []
    from vmdedup.client import ServiceUsageError

    with service:
        try:
            return service.history(_NOTED_S, max_points=_NOTED_POINTS).samples
        except ServiceUsageError:
            return []


def _deliver(
    sharing: SharingReport,
    form: Format,
    output: Path | None,
    comparison: Comparison | None,
    noted: Sequence[HistorySample],
) -> int:
    """Write the report to the requested place; returns the exit code."""
    if output is None and form in ("table", "json"):
        return show_sharing(sharing, as_json=form == "json", comparison=comparison)
    text = as_text(sharing, form, comparison=comparison, history=noted)
    put(text, output)
    if form == "html":
        from vmdedup.report.html import plotly_script

        if plotly_script() is None:
            complain("the page has tables only; for charts: pip install 'vmdedup[html]'")
    for line in unserved_lines(sharing):
        complain(line)
    return DONE if is_served(sharing) else FAILURE


def show_sharing(
    sharing: SharingReport, *, as_json: bool, comparison: Comparison | None = None
) -> int:
    """Print a sharing report from any source; returns the exit code."""
    if not sharing.vms:
        complain("no VM is attached")

    def show(document: SharingReport) -> None:
        from vmdedup.report.table import show_report

        show_report(document, comparison=comparison)

    return finish(
        sharing,
        show,
        as_json=as_json,
        served=is_served(sharing),
        complaints=unserved_lines(sharing),
    )


def is_served(sharing: SharingReport) -> bool:
    """Whether any VM is."""
    return any(vm.is_served for vm in sharing.vms)


def unserved_lines(sharing: SharingReport) -> list[str]:
    """A line for each VM that is not served."""
    return [about(vm.name, vm.pid, vm.reason) for vm in sharing.vms if not vm.is_served]


def _percentage(option: str, text: str) -> float:
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise UsageError(f"{option} {text}: write a percentage, for instance 30%")
    return percent


def read_report(option: str, path: Path) -> SharingReport:
    """Read an earlier report. Raises UsageError."""
    from pydantic import ValidationError

    from vmdedup.models import SharingReport

    try:
        return SharingReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise UsageError(
            f"{option} {path}: not a report of this vmdedup; write one with"
            " `vmdedup report --format json -o FILE`"
        ) from error


def _judge(sharing: SharingReport, least_percent: float) -> int:
    """DONE, or BELOW if less is saved than `least_percent` of what the VMs would hold."""
    present_bytes = sum(vm.present_bytes for vm in sharing.vms)
    saved_bytes = sharing.host.saved_bytes
    if saved_bytes * 100 >= least_percent * present_bytes:
        return DONE
    percent = 100 * saved_bytes / present_bytes
    complain(
        f"{percent:.1f}% saved ({saved_bytes} of {present_bytes} bytes), below {least_percent:g}%"
    )
    return BELOW


def _compared(comparison: Comparison) -> int:
    """DONE, or BELOW with a line for each VM that shares less than in the baseline."""
    for each in comparison.worse:
        complain(
            f"{each.name}: {each.now.percent:.1f}% saved, was {each.before.percent:.1f}%: more"
            f" than {each.tolerance_percent:g} points less than in the baseline"
        )
    return BELOW if comparison.worse else DONE
