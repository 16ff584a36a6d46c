"""`vmdedup vms`: the VMs there are, mergeable or not, and why."""

from __future__ import annotations

from vmdedup.cli.options import AsJson, Domains, Mask, Qmp, make_settings
from vmdedup.cli.outcome import finish, refusals, require_any


def vms(
    qmp: Qmp = None, domains: Domains = None, mask: Mask = None, as_json: AsJson = False
) -> int:
    """List the VMs found, their memory backends, and what can be merged, or why not."""
    from vmdedup.deduplicator import Deduplicator

    with Deduplicator(make_settings(domains=domains, mask=mask)) as dedup:
        found = dedup.attach(qmp or (), merging=False)
    require_any(found)
    from vmdedup.report.text import show_vms

    reached = any(vm.qemu_version is not None for vm in found.vms)
    return finish(found, show_vms, as_json=as_json, served=reached, complaints=refusals(found))
