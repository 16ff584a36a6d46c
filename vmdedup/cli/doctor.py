"""`vmdedup doctor`: whether merging can work here, and the remedy if it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmdedup.cli.options import (
    AsJson,
    Config,
    Domains,
    Libvirt,
    Mask,
    Qmp,
    RuntimeDir,
    make_settings,
)
from vmdedup.cli.outcome import BELOW, DONE, FAILURE, finish
from vmdedup.cli.service import daemon_if_running

if TYPE_CHECKING:
    from vmdedup.models import MemoryPlace, VmList
    from vmdedup.settings import Settings


def doctor(
    qmp: Qmp = None,
    libvirt: Libvirt = None,
    domains: Domains = None,
    config: Config = None,
    mask: Mask = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Check whether merging can work here; say what to do if not.

    Looks at the kernel, privileges, limits, KSM, QEMU and each VM, and whether memory suffices
    if guests write all that is merged. Exit code 1 if nothing can merge, 3 if memory is short.
    """
    from vmdedup.doctor import diagnose

    settings = make_settings(
        config=config, domains=domains, mask=mask, runtime_dir=runtime_dir, libvirt=libvirt
    )
    found, memory, daemon_pid = _look(settings, qmp, libvirt)
    diagnosis = diagnose(settings, found, daemon_pid=daemon_pid, memory=memory)
    from vmdedup.report.text import show_diagnosis

    finish(diagnosis, show_diagnosis, as_json=as_json, served=True)
    if not diagnosis.can_merge:
        return FAILURE
    return BELOW if any(place.short for place in memory) else DONE


def _look(
    settings: Settings, qmp: list[str] | None, libvirt: str | None
) -> tuple[VmList, list[MemoryPlace], int | None]:
    """The VMs, the memory that they may need, and the pid of a running daemon.

    The daemon holds their monitors and is asked first.
    """
    service = None if qmp or libvirt else daemon_if_running(settings.runtime_dir)
    if service is not None:
        with service:
            memory = service.report(fresh=True).memory
            return service.vms(), memory, service.health().engine.engine_pid
    from vmdedup.deduplicator import Deduplicator

    with Deduplicator(settings) as dedup:
        found = dedup.attach(qmp or (), merging=False)
        return found, dedup.report().memory, None
