"""`vmdedup unmerge`: every page back to its own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.completion import vm_names
from vmdedup.cli.options import (
    AsJson,
    Domains,
    Libvirt,
    Mask,
    Qmp,
    RuntimeDir,
    ShowProgress,
    make_settings,
)
from vmdedup.cli.outcome import FAILURE, about, complain, finish, refusals, require_any
from vmdedup.cli.service import daemon_if_running

if TYPE_CHECKING:
    from vmdedup.client import Client
    from vmdedup.models import Unmerged
    from vmdedup.settings import Settings


def unmerge(
    vms: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VM",
            help="Names or pids; without: all VMs.",
            autocompletion=vm_names,
        ),
    ] = None,
    qmp: Qmp = None,
    libvirt: Libvirt = None,
    domains: Domains = None,
    mask: Mask = None,
    progress: ShowProgress = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Give the pages of VMs their own memory back, live.

    A running daemon does it, and leaves these VMs alone until `merge` names
    them or `set run=1`.
    """
    service = None if qmp or libvirt else daemon_if_running(runtime_dir)
    if service is not None:
        with service:
            result = _by_service(service, vms or None)
    else:
        settings = make_settings(
            domains=domains, mask=mask, runtime_dir=runtime_dir, libvirt=libvirt
        )
        result = _by_ourselves(settings, vms or None, qmp or [], progress)
    from vmdedup.report.text import show_unmerged

    code = finish(result, show_unmerged, as_json=as_json, served=bool(result.vms))
    stuck = [vm for vm in result.vms if vm.is_stuck]
    for vm in stuck:
        complain(about(vm.name, vm.pid, vm.reason))
    if stuck and service is not None:
        complain("the daemon tries again until it is done, or until `merge` or `set run=1`")
    return FAILURE if stuck else code


def _by_service(service: Client, vms: list[str] | None) -> Unmerged:
    from vmdedup.client import ServiceUnfinishedError

    try:
        return service.unmerge(vms)
    except ServiceUnfinishedError as error:
        if error.unmerged is None:
            raise
        return error.unmerged


def _by_ourselves(
    settings: Settings, vms: list[str] | None, qmp: list[str], progress: bool | None
) -> Unmerged:
    from vmdedup.deduplicator import Deduplicator
    from vmdedup.report.progress import progress_line

    with Deduplicator(settings) as dedup:
        found = dedup.attach(qmp, refuse=False)
        require_any(found)
        for line in refusals(found):
            complain(line)
        with progress_line(progress) as bar:
            return dedup.unmerge(vms, progress=bar.show_pass)
