"""`vmdedup report`: what is shared now, read back from the kernel."""

from __future__ import annotations

from vmdedup.cli.options import AsJson, Domains, Qmp, make_settings
from vmdedup.cli.outcome import about, finish, require_any


def report(qmp: Qmp = None, domains: Domains = None, as_json: AsJson = False) -> int:
    """Show what is shared now; needs no other vmdedup to run or to have run before."""
    from vmdedup.deduplicator import Deduplicator

    with Deduplicator(make_settings(domains=domains)) as dedup:
        require_any(dedup.attach(qmp or (), merging=False))
        sharing = dedup.report()
    from vmdedup.report.table import show_report

    served = any(vm.status in ("merged", "scanning") for vm in sharing.vms)
    lost = [
        about(vm.name, vm.pid, vm.reason) for vm in sharing.vms if vm.status in ("refused", "gone")
    ]
    return finish(sharing, show_report, as_json=as_json, served=served, complaints=lost)
