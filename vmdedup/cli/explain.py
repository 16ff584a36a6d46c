"""`vmdedup explain VM`: the funnel from all of a VM's RAM to what is saved."""

from __future__ import annotations

from typing import Annotated

import typer

from vmdedup.cli.completion import vm_names
from vmdedup.cli.options import AsJson, Domains, Mask, Qmp, make_settings
from vmdedup.cli.outcome import FAILURE, complain, finish, refusals, require_any


def explain(
    vm: Annotated[
        str, typer.Argument(metavar="VM", help="The VM's name or its pid.", autocompletion=vm_names)
    ],
    qmp: Qmp = None,
    domains: Domains = None,
    mask: Mask = None,
    as_json: AsJson = False,
) -> int:
    """Split a VM's RAM into parts, from all pages to the saved ones."""
    from vmdedup.deduplicator import Deduplicator

    with Deduplicator(make_settings(domains=domains, mask=mask)) as dedup:
        found = dedup.attach(qmp or (), merging=False)
        require_any(found)
        if all(each.qemu_version is None for each in found.vms):
            for line in refusals(found):
                complain(line)
            return FAILURE
        funnel = dedup.explain(vm)
    from vmdedup.report.text import show_funnel

    return finish(funnel, show_funnel, as_json=as_json, served=True)
