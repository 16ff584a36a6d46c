"""A systemd scope of its own for a process: actions on our unit do not affect it.

Owns one request to systemd, over its bus (`busctl`, a part of systemd). If systemd does
not run, or refuses, nothing changes and nothing is raised: `is_apart` tells.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress

from vmdedup.linux.proc_file import read_record

_RUNS = "/run/systemd/system"
"""Directory that exists while systemd is the service manager (sd_booted(3))."""
_TIMEOUT_S = 5.0


def move_to_own(pid: int, name: str) -> None:
    """Have systemd put the process into the transient scope `name`, out of our service's cgroup."""
    if not (os.path.isdir(_RUNS) and _group_of(os.getpid()).endswith(".service")):
        return
    manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
    call = ["busctl", "--quiet", "call", *manager, "org.freedesktop.systemd1.Manager"]
    call += ["StartTransientUnit", "ssa(sv)a(sa(sv))", f"{name}.scope", "fail", "2"]
    call += ["PIDs", "au", "1", str(pid), "CollectMode", "s", "inactive-or-failed", "0"]
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            call,
            check=False,
            timeout=_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def is_apart(pid: int, other: int) -> bool:
    """Whether two processes are in different cgroups of systemd's hierarchy. Raises OSError."""
    return _group_of(pid) != _group_of(other)


def _group_of(pid: int) -> str:
    """The path in systemd's own hierarchy: the unified one, or `name=systemd` beside it."""
    lines = read_record(f"/proc/{pid}/cgroup").splitlines()
    named = [line for line in lines if line.split(":", 2)[1] in ("", "name=systemd")]
    return named[0].split(":", 2)[2] if named else ""
