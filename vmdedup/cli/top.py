"""`vmdedup top`: the daemon's VMs, live in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vmdedup.cli.options import RuntimeDir
from vmdedup.cli.outcome import DONE
from vmdedup.cli.service import daemon, place
from vmdedup.errors import UsageError, VmdedupError


def top(
    interval_s: Annotated[
        float,
        typer.Option("--interval", "-i", metavar="S", help="Seconds between two updates."),
    ] = 2.0,
    sort: Annotated[
        str,
        typer.Option(
            "--sort", metavar="ORDER", help="Order: saved, name, breaks, held, waiting or vmas."
        ),
    ] = "saved",
    runtime_dir: RuntimeDir = None,
) -> int:
    """Watch the daemon's VMs live in the terminal.

    Shows saved memory, writes to merged pages, scan rate, CPU, gates. ? has the keys.
    """
    from vmdedup.top.sample import LiveSource
    from vmdedup.top.view import ORDERS

    if sort not in ORDERS:
        raise UsageError(f"--sort {sort}: choose one of {', '.join(ORDERS)}")
    if not 0.5 <= interval_s <= 60:
        raise UsageError(f"--interval {interval_s:g}: write 0.5 to 60 seconds")
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise UsageError("top needs a terminal; for scripts: vmdedup report --format json")
    try:
        from vmdedup.top.app import TopApp
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("textual"):
            raise
        raise VmdedupError("top needs textual: pip install 'vmdedup[top]'") from error
    with daemon(runtime_dir) as service:
        service.health()
    TopApp(LiveSource(place(runtime_dir)), interval_s=interval_s, order=sort).run()
    return DONE
