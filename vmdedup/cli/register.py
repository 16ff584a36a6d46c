"""`vmdedup register` and `unregister`: choose the memory to merge, as with madvise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.completion import backends, vm_names
from vmdedup.cli.options import AsJson, RuntimeDir
from vmdedup.cli.outcome import DONE, complain
from vmdedup.cli.service import daemon

if TYPE_CHECKING:
    from vmdedup.ipc.protocol import Registration

_Vm = Annotated[
    str,
    typer.Argument(metavar="VM", help="The VM's name or its pid.", autocompletion=vm_names),
]
_Backend = Annotated[
    str,
    typer.Argument(
        metavar="BACKEND", help="The memory backend's id in QEMU.", autocompletion=backends
    ),
]
_Offset = Annotated[
    int, typer.Option("--offset", metavar="BYTES", help="Begin of the range in the backend.")
]
_Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        metavar="BYTES",
        help="Length of the range; without: up to the backend's end.",
        show_default=False,
    ),
]


def register(
    vm: _Vm,
    backend: _Backend,
    offset_bytes: _Offset = 0,
    length_bytes: _Length = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Make a range of a VM's memory backend mergeable.

    Works like madvise(MADV_MERGEABLE), for a backend that QEMU has with merge=off or
    prealloc=on.
    """
    with daemon(runtime_dir) as service:
        done = service.register(vm, backend, offset_bytes=offset_bytes, length_bytes=length_bytes)
    return _show(done, as_json=as_json)


def unregister(
    vm: _Vm,
    backend: _Backend,
    offset_bytes: _Offset = 0,
    length_bytes: _Length = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Unmerge a range of a memory backend and leave it alone.

    Works like madvise(MADV_UNMERGEABLE).
    """
    with daemon(runtime_dir) as service:
        done = service.unregister(vm, backend, offset_bytes=offset_bytes, length_bytes=length_bytes)
    return _show(done, as_json=as_json)


def _show(done: Registration, *, as_json: bool) -> int:
    if as_json:
        print(done.model_dump_json(indent=2))
    else:
        ranges = ", ".join(f"{it.offset_bytes:#x}+{it.length_bytes:#x}" for it in done.registered)
        print(f"{done.vm} {done.backend}: registered {ranges or 'nothing'}")
        if done.unmerged_pages:
            print(f"{done.unmerged_pages} pages unmerged")
    for hole in done.skipped:
        complain(
            f"{done.vm} {done.backend}: {hole.offset_bytes:#x}+{hole.length_bytes:#x} left out:"
            f" {hole.reason} (ENOMEM)"
        )
    if done.reason is not None:
        complain(f"{done.vm} {done.backend}: registered, but never merged: {done.reason}")
    return DONE
