"""`vmdedup report`: what is shared now, read back from the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.options import AsJson, Domains, Qmp, RuntimeDir, make_settings
from vmdedup.cli.outcome import BELOW, DONE, about, complain, finish, require_any
from vmdedup.cli.service import daemon_if_running
from vmdedup.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from vmdedup.models import SharingReport


def report(
    qmp: Qmp = None,
    domains: Domains = None,
    fail_under: Annotated[
        str | None,
        typer.Option(
            "--fail-under",
            metavar="N%",
            help="Exit with 3 when less than N% of the memory held before merging is saved.",
            show_default=False,
        ),
    ] = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Show what is shared now: by the daemon, else without any vmdedup running."""
    least_percent = None if fail_under is None else _percentage(fail_under)
    sharing = _sharing(qmp, domains, runtime_dir)
    code = show_sharing(sharing, as_json=as_json)
    if code == DONE and least_percent is not None:
        return _judge(sharing, least_percent)
    return code


def _sharing(
    qmp: list[str] | None, domains: list[str] | None, runtime_dir: Path | None
) -> SharingReport:
    service = None if qmp else daemon_if_running(runtime_dir)
    if service is not None:
        with service:
            return service.report(fresh=True)
    from vmdedup.deduplicator import Deduplicator

    with Deduplicator(make_settings(domains=domains, runtime_dir=runtime_dir)) as dedup:
        require_any(dedup.attach(qmp or (), merging=False))
        return dedup.report()


def show_sharing(sharing: SharingReport, *, as_json: bool) -> int:
    """Print a sharing report, by whomever it was made; returns the exit code."""
    served = any(vm.status in ("merged", "scanning") for vm in sharing.vms)
    lost = [
        about(vm.name, vm.pid, vm.reason) for vm in sharing.vms if vm.status in ("refused", "gone")
    ]
    if not sharing.vms:
        complain("no VM is attached")

    def show(document: SharingReport) -> None:
        from vmdedup.report.table import show_report

        show_report(document)

    return finish(sharing, show, as_json=as_json, served=served, complaints=lost)


def _percentage(text: str) -> float:
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise UsageError(f"--fail-under {text}: write a percentage, for instance 30%")
    return percent


def _judge(sharing: SharingReport, least_percent: float) -> int:
    """DONE, or BELOW when less is saved than `least_percent` of what the VMs would hold."""
    present_bytes = sum(vm.present_bytes for vm in sharing.vms)
    saved_bytes = sharing.host.saved_bytes
    if saved_bytes * 100 >= least_percent * present_bytes:
        return DONE
    percent = 100 * saved_bytes / present_bytes
    complain(
        f"{percent:.1f}% saved ({saved_bytes} of {present_bytes} bytes), below {least_percent:g}%"
    )
    return BELOW
