"""`vmdedup explain`: where a VM's RAM went, and where the contents of all VMs come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmdedup.cli.completion import vm_names
from vmdedup.cli.options import (
    AsJson,
    Domains,
    Mask,
    Qmp,
    RuntimeDir,
    known_files,
    make_settings,
)
from vmdedup.cli.outcome import FAILURE, complain, finish, refusals, require_any
from vmdedup.cli.service import daemon_if_running
from vmdedup.errors import UsageError


def explain(
    vm: Annotated[
        str | None,
        typer.Argument(
            metavar="VM",
            help="The VM's name or its pid; not with --contents, which is about all VMs.",
            autocompletion=vm_names,
            show_default=False,
        ),
    ] = None,
    contents: Annotated[
        bool,
        typer.Option("--contents", help="Say from which known files the contents of memory come."),
    ] = False,
    known: Annotated[
        list[Path] | None,
        typer.Option(
            "--known",
            metavar="FILE",
            help="Kernel, initrd, disk image (raw, qcow2), ISO file or folder; repeatable, the"
            " first that has a content wins.",
            show_default=False,
        ),
    ] = None,
    qmp: Qmp = None,
    domains: Domains = None,
    mask: Mask = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Split a VM's RAM into parts, from all pages to the saved ones.

    With --contents: say where the memory of all VMs comes from. Asks the daemon if one runs.
    """
    from vmdedup.report.sources import show_sources
    from vmdedup.report.text import show_funnel

    if contents and vm is not None:
        raise UsageError("--contents is about all VMs: leave VM out, or name some with --qmp")
    if contents != bool(known):
        raise UsageError("--contents and --known FILE belong together")
    if not contents and vm is None:
        raise UsageError("explain: name a VM, or ask for --contents")
    files = known_files(known)
    service = daemon_if_running(runtime_dir) if contents and not qmp else None
    if service is not None:
        with service:
            return finish(
                service.content_sources(files), show_sources, as_json=as_json, served=True
            )
    from vmdedup.deduplicator import Deduplicator

    settings = make_settings(domains=domains, mask=mask, runtime_dir=runtime_dir)
    with Deduplicator(settings) as dedup:
        found = dedup.attach(qmp or (), merging=False)
        require_any(found)
        if all(each.qemu_version is None for each in found.vms):
            for line in refusals(found):
                complain(line)
            return FAILURE
        if vm is not None:
            return finish(dedup.explain(vm), show_funnel, as_json=as_json, served=True)
        sources = dedup.content_sources(files)
    return finish(sources, show_sources, as_json=as_json, served=True)
