"""`vmdedup attach` and `detach`: have the daemon attach to a VM, or detach from it."""

from __future__ import annotations

from typing import Annotated

import typer

from vmdedup.cli.completion import sockets, vm_names
from vmdedup.cli.options import AsJson, RuntimeDir
from vmdedup.cli.outcome import DONE, FAILURE, about, complain
from vmdedup.cli.service import daemon


def attach(
    qmp: Annotated[
        str,
        typer.Argument(
            metavar="QMP",
            help="The VM's QMP socket, or a domain's name.",
            autocompletion=sockets,
        ),
    ],
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Have the daemon attach to a VM, by QMP socket or domain name."""
    with daemon(runtime_dir) as service:
        row = service.attach(qmp)
    if as_json:
        print(row.model_dump_json(indent=2))
    elif row.mergeable:
        print(f"{row.name} (pid {row.pid}): attached")
    if not row.mergeable:
        complain(about(row.name, row.pid, row.reason))
    return DONE if row.mergeable else FAILURE


def detach(
    vm: Annotated[
        str,
        typer.Argument(metavar="VM", help="The VM's name or its pid.", autocompletion=vm_names),
    ],
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Have the daemon detach from a VM; its merged pages stay merged."""
    with daemon(runtime_dir) as service:
        done = service.detach(vm)
    if as_json:
        print(done.model_dump_json(indent=2))
    else:
        print(f"{done.vm} (pid {done.pid}): detached; {done.merged_pages} pages stay merged")
    return DONE
