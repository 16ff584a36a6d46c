"""Words for the shell to complete: VMs, sockets, backends, controls.

Owns the look-ups while somebody waits for the Tab key: the daemon is asked in plain HTTP,
for at most `_ASK_LIMIT_S` (its client takes longer to load than the daemon to answer).
Without a daemon, the command lines of running QEMUs are read. Promises words and
never a message: a user who may not ask gets none, and the shell offers files.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from vmdedup.attach.cmdline import qmp_monitors, vm_name
from vmdedup.report.files import FORMATS

_ASK_LIMIT_S = 1.0
SOCKET_NAME = "vmdedup.sock"
"""Copy of the name in `ipc.protocol`, which takes longer to load than an answer to come."""

Words = list[tuple[str, str]]
"""Words to complete, each with the text that zsh and fish show beside it."""


def vm_names(context: typer.Context, incomplete: str) -> Words:
    """Names of the daemon's VMs; without any, of the running QEMUs."""
    if _is_elsewhere(context):
        return []
    served = _ask(context, "/v1/vms").get("vms", ())
    found = [(vm["name"], f"pid {vm['pid']}") for vm in served] or [
        (name, f"pid {pid}") for pid, words in _qemus() if (name := vm_name(words))
    ]
    return _beginning(found, incomplete)


def sockets(incomplete: str) -> Words:
    """QMP sockets on the command lines of the running QEMUs."""
    found = [
        (monitor.path, vm_name(words) or f"pid {pid}")
        for pid, words in _qemus()
        for monitor in qmp_monitors(words)
        if monitor.path
    ]
    return _beginning(found, incomplete)


def backends(context: typer.Context, incomplete: str) -> Words:
    """The daemon's memory backends of the VM that was named before."""
    vms = _ask(context, "/v1/vms").get("vms", ())
    named = [vm for vm in vms if context.params.get("vm") in (vm["name"], str(vm["pid"]))]
    found = [(each["id"], each["kind"]) for vm in named for each in vm["backends"]]
    return _beginning(found, incomplete)


def control_names(context: typer.Context, incomplete: str) -> Words:
    """The daemon's controls, with their values beside them."""
    values = _ask(context, "/v1/controls").get("values", {})
    return _beginning([(name, str(value)) for name, value in values.items()], incomplete)


def control_values(context: typer.Context, incomplete: str) -> Words:
    """The daemon's controls as NAME=VALUE, to be changed."""
    values = _ask(context, "/v1/controls").get("values", {})
    return _beginning([(f"{name}={value}", "") for name, value in values.items()], incomplete)


def formats(incomplete: str) -> Words:
    """Formats that a report can be written in."""
    return _beginning([(form, "") for form in FORMATS], incomplete)


def _beginning(words: Words, incomplete: str) -> Words:
    return [(word, what) for word, what in words if word.startswith(incomplete)]


def _ask(context: typer.Context, request: str) -> dict[str, Any]:
    """The daemon's answer; empty if there is no daemon here, or none for this user."""
    if _is_elsewhere(context):
        return {}
    # Every verb imports this module for its options, and few lines are completed.
    from http.client import HTTPConnection, HTTPException

    given = context.params.get("runtime_dir") or os.environ.get("VMDEDUP_RUNTIME_DIR")
    path = Path(given or "/run/vmdedup") / SOCKET_NAME
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(_ASK_LIMIT_S)
        try:
            link.connect(str(path))
            connection = HTTPConnection("vmdedup")
            connection.sock = link
            connection.request("GET", request)
            answer = json.load(connection.getresponse())
        except (OSError, HTTPException, ValueError):
            return {}
    return answer if isinstance(answer, dict) else {}


def _is_elsewhere(context: typer.Context) -> bool:
    """Whether the daemon of another host is meant: asking it takes longer than Tab may."""
    return bool(context.find_root().params.get("host") or os.environ.get("VMDEDUP_HOST"))


def _qemus() -> Iterator[tuple[int, list[str]]]:
    """Pid and command line of each process whose program is named like QEMU."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            raw = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        words = [os.fsdecode(word) for word in raw.rstrip(b"\0").split(b"\0")]
        if os.path.basename(words[0]).startswith(("qemu", "kvm")):
            yield int(entry.name), words
