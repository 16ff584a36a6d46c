"""`vmdedup merge`: have the daemon merge now, and wait for the report."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from vmdedup.cli.completion import vm_names
from vmdedup.cli.options import AsJson, RuntimeDir
from vmdedup.cli.outcome import complain
from vmdedup.cli.report import show_sharing
from vmdedup.cli.service import daemon


def merge(
    vms: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VM",
            help="Names or pids; without: all VMs.",
            autocompletion=vm_names,
        ),
    ] = None,
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", metavar="S", min=0.001, max=3600, help="Longest wait, seconds."),
    ] = 120.0,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Have the daemon merge now, and wait until VMs have converged.

    Prints the report then, or when the time is over.
    """
    began = time.monotonic()
    with daemon(runtime_dir) as service:
        sharing = service.merge(vms or None, timeout_s=timeout_s)
    if not sharing.converged:
        waited_s = time.monotonic() - began
        complain(f"not converged after {waited_s:.1f} s; the daemon goes on")
    return show_sharing(sharing, as_json=as_json)
