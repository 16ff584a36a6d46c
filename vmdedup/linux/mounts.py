"""The mounts that another process sees.

Owns the parsing of /proc/PID/mountinfo, and resolving a path of that process below its own
root. Reads only; a process that has ended sees nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_MOST_LINKS = 40


@dataclass(frozen=True)
class Mount:
    """One row of mountinfo."""

    device: str
    """`major:minor`."""
    point: str
    filesystem: str
    """Type of the filesystem, with a subtype as in `fuse.sshfs`."""


def mounts(pid: int) -> list[Mount]:
    """All mounts that process `pid` sees, in the order of mounting."""
    try:
        with open(f"/proc/{pid}/mountinfo", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        left, _, right = line.partition(b" - ")
        fields = left.split()
        if len(fields) >= 5 and right:
            point = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), fields[4])
            kind = right.split()[0].decode(errors="replace")
            found.append(Mount(fields[2].decode(errors="replace"), os.fsdecode(point), kind))
    return found


def filesystem_at(seen: Sequence[Mount], path: str) -> str:
    """Type of the filesystem under `path`: that of the longest mount point; `unknown` if none."""
    best, kind = "", "unknown"
    for mount in seen:
        prefix = mount.point.rstrip("/") + "/"
        if (path + "/").startswith(prefix) and len(prefix) >= len(best):
            best, kind = prefix, mount.filesystem
    return kind


def mounted_below(seen: Sequence[Mount], path: str) -> list[Mount]:
    """The mounts on folders inside `path`."""
    prefix = path.rstrip("/") + "/"
    return [mount for mount in seen if mount.point.startswith(prefix) and mount.point != prefix]


def resolved(pid: int, path: str) -> str:
    """An absolute `path` without links, as process `pid` resolves it."""
    root = f"/proc/{pid}/root"
    done, left, links = "", path.split("/"), 0
    while left:
        name = left.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            done = done.rpartition("/")[0]
            continue
        try:
            link = os.readlink(f"{root}{done}/{name}")
        except OSError:
            done = f"{done}/{name}"
            continue
        links += 1
        if links > _MOST_LINKS:
            return path
        done = "" if link.startswith("/") else done
        left = link.split("/") + left
    return done or "/"
