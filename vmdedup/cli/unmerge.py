"""`vmdedup unmerge`: every page back to its own memory."""

from __future__ import annotations

from vmdedup.cli.options import AsJson, Domains, Mask, Qmp, ShowProgress, make_settings
from vmdedup.cli.outcome import FAILURE, about, complain, finish, refusals, require_any


def unmerge(
    qmp: Qmp = None,
    domains: Domains = None,
    mask: Mask = None,
    progress: ShowProgress = None,
    as_json: AsJson = False,
) -> int:
    """Give the pages of VMs their own memory back, live."""
    from vmdedup.deduplicator import Deduplicator
    from vmdedup.report.progress import progress_line

    with Deduplicator(make_settings(domains=domains, mask=mask)) as dedup:
        found = dedup.attach(qmp or (), refuse=False)
        require_any(found)
        for line in refusals(found):
            complain(line)
        with progress_line(progress) as bar:
            result = dedup.unmerge(progress=bar.show_pass)
    from vmdedup.report.text import show_unmerged

    code = finish(result, show_unmerged, as_json=as_json, served=bool(result.vms))
    stuck = [vm for vm in result.vms if vm.remaining_pages or vm.reason]
    for vm in stuck:
        complain(about(vm.name, vm.pid, f"{vm.remaining_pages} pages stay merged: {vm.reason}"))
    return FAILURE if stuck else code
