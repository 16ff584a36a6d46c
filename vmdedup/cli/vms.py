"""`vmdedup vms`: the VMs there are, mergeable or not, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmdedup.cli.options import AsJson, Domains, Libvirt, Mask, Qmp, RuntimeDir, make_settings
from vmdedup.cli.outcome import finish, refusals, require_any
from vmdedup.cli.service import daemon_if_running

if TYPE_CHECKING:
    from pathlib import Path

    from vmdedup.models import VmList


def vms(
    qmp: Qmp = None,
    libvirt: Libvirt = None,
    domains: Domains = None,
    mask: Mask = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """List the VMs, their memory backends, and why any cannot merge."""
    found = _found(qmp, libvirt, domains, mask, runtime_dir)
    require_any(found)
    from vmdedup.report.text import show_vms

    reached = any(vm.qemu_version is not None for vm in found.vms)
    return finish(found, show_vms, as_json=as_json, served=reached, complaints=refusals(found))


def _found(
    qmp: list[str] | None,
    libvirt: str | None,
    domains: list[str] | None,
    mask: list[str] | None,
    runtime_dir: Path | None,
) -> VmList:
    service = None if qmp or libvirt else daemon_if_running(runtime_dir)
    if service is not None:
        with service:
            return service.vms()
    from vmdedup.deduplicator import Deduplicator

    settings = make_settings(domains=domains, mask=mask, runtime_dir=runtime_dir, libvirt=libvirt)
    with Deduplicator(settings) as dedup:
        return dedup.attach(qmp or (), merging=False)
