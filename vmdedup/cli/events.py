"""`vmdedup events`: the daemon's numbered events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.options import AsJson, RuntimeDir
from vmdedup.cli.outcome import DONE
from vmdedup.cli.service import daemon

if TYPE_CHECKING:
    from vmdedup.ipc.protocol import Event

_WAIT_S = 30.0


def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until interrupted.")
    ] = False,
    since: Annotated[
        int, typer.Option("--since", metavar="N", min=0, help="Only events after number N.")
    ] = 0,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Print the daemon's events, the oldest first.

    --json is one document; with --follow it is one event a line.
    """
    with daemon(runtime_dir) as service:
        if as_json and not follow:
            print(service.events(since).model_dump_json(indent=2))
            return DONE
        wait_s = 0.0
        while True:
            found = service.events(since, wait_s=wait_s)
            for event in found.events:
                print(event.model_dump_json() if as_json else _line(event), flush=True)
            if not follow:
                return DONE
            since, wait_s = found.next_since, _WAIT_S


def _line(event: Event) -> str:
    from datetime import datetime

    when = datetime.fromtimestamp(event.unix_s).astimezone().isoformat(timespec="seconds")
    words = [str(event.seq), when, event.kind, event.vm or "-", event.message]
    return " ".join(word for word in words if word)
