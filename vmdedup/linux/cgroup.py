"""Cgroup limits of a process: on its memory, and freezing.

Owns the reading of the memory limits above a process and of its frozen state. It reads the
unified hierarchy and those of the older version, wherever they are mounted. Memory that
the kernel can take back at once, its cache of files, does not count as used. Memory that it
could swap out, as far as the groups allow, is reported apart.
Promises nothing: others of the group use memory too.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vmdedup.linux.proc_file import read_record

_UNLIMITED = 1 << 60
"""Smallest number that means no limit, bytes: the older hierarchy says 2**63 less a page."""


@dataclass(frozen=True)
class _Files:
    """A hierarchy's names for its limits, its usage, and its file cache in memory.stat."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


_UNIFIED = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_OLDER = _Files(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)

_MEMORY = {"": _UNIFIED, "memory": _OLDER}
_FREEZERS = {
    "": ("cgroup.events", {"frozen 1"}),
    "freezer": ("freezer.state", {"FROZEN", "FREEZING"}),
}
"""The file that shows if a group, or one above it, is frozen, and the lines that say so; by
hierarchy."""
_KNOWN_S = 60
"""Time for which the mounts are not read again, seconds."""


@dataclass(frozen=True)
class _Mount:
    """The mount point of a hierarchy, and the part mounted there (no slash at its end)."""

    point: Path
    root: str

    def folder(self, group: str) -> Path:
        """The folder of a group; it may be missing: a container has mounted only its own part."""
        is_below = f"{group}/".startswith(f"{self.root}/")
        return self.point / (group[len(self.root) :] if is_below else group).lstrip("/")


@dataclass(frozen=True)
class Headroom:
    """The tightest limit above a process: bytes left below it, and the group that has it.

    `swap_bytes`: memory that its groups and the host would let it swap out to stay below.
    """

    left_bytes: int
    swap_bytes: int
    group: str


def headroom(pid: int) -> Headroom | None:
    """Memory a process may still take before a cgroup above it is full; `None` without a limit.

    `None` also when the process ended: the caller's next step finds that out.
    """
    groups = []
    for folder, top, files in _groups(pid):
        above = [each for each in folder.parents if each.is_relative_to(top)]
        groups += [(each, files) for each in [folder, *above]]
    limited: list[tuple[int, str]] = []
    for folder, files in groups:
        with suppress(OSError, ValueError):  # no memory controller, or it is gone
            left_bytes = _left_bytes(folder, files)
            if left_bytes is not None:
                limited.append((left_bytes, str(folder)))
    if not limited:
        return None
    swap_bytes = _swap_free_bytes()
    for folder, files in groups:
        with suppress(OSError, ValueError):
            swap_bytes = min(swap_bytes, _swap_left_bytes(folder, files))
    left_bytes, group = min(limited)
    return Headroom(left_bytes, swap_bytes, group)


def frozen_group(pid: int) -> str | None:
    """The cgroup that keeps a process from running, `None` if none does or it has ended."""
    for hierarchy, name in _hierarchies(pid):
        if hierarchy not in _FREEZERS or name == "/":
            continue  # a root cannot be frozen
        file, frozen = _FREEZERS[hierarchy]
        mounted = _mounted(hierarchy)
        with suppress(OSError):  # not mounted for us, or gone
            if mounted is not None and not frozen.isdisjoint(
                read_record(mounted.folder(name) / file).splitlines()
            ):
                return name
    return None


def _groups(pid: int) -> list[tuple[Path, Path, _Files]]:
    """The process's memory groups: the folder, its hierarchy's root, the names of files."""
    found = []
    for hierarchy, name in _hierarchies(pid):
        files = _MEMORY.get(hierarchy)
        mounted = None if files is None else _mounted(hierarchy)
        if files is not None and mounted is not None:
            folder = mounted.folder(name)
            found.append((folder if folder.is_dir() else mounted.point, mounted.point, files))
    return found


def _hierarchies(pid: int) -> list[tuple[str, str]]:
    """Each hierarchy with the process's group in it.

    "" is the unified hierarchy; the others are controllers of the older kind.
    """
    try:
        lines = read_record(f"/proc/{pid}/cgroup", errors="surrogateescape").splitlines()
    except OSError:
        return []
    fields = [line.split(":", 2) for line in lines]
    return [
        (controller, name)
        for number, controllers, name in fields
        for controller in ([""] if number == "0" else controllers.split(","))
    ]


def _mounted(hierarchy: str) -> _Mount | None:
    return _mounts(int(time.monotonic() / _KNOWN_S)).get(hierarchy)


@lru_cache(maxsize=1)
def _mounts(_when: int) -> dict[str, _Mount]:
    """The mounts of all hierarchies, by name."""
    found: dict[str, _Mount] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        fields = before.split()
        mounted = _Mount(Path(_unescaped(fields[4])), _unescaped(fields[3]).rstrip("/"))
        names = options.split()[-1].split(",") if kind == "cgroup" else [""]
        for name in names if kind in ("cgroup", "cgroup2") else ():
            if name not in found or len(mounted.root) < len(found[name].root):
                found[name] = mounted
    return found


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _left_bytes(folder: Path, files: _Files) -> int | None:
    limit = min(_number(folder / name) for name in files.limits)
    if limit >= _UNLIMITED:
        return None
    return max(0, limit - _number(folder / files.usage) + _cache(folder, files))


def _swap_left_bytes(folder: Path, files: _Files) -> int:
    """Bytes that a group lets its processes swap out (mm/vmscan.c: get_scan_count)."""
    try:
        if files is _UNIFIED:
            left = _number(folder / "memory.swap.max") - _number(folder / "memory.swap.current")
        elif _number(folder / "memory.swappiness") == 0:
            left = 0
        else:
            both = _number(folder / "memory.memsw.limit_in_bytes")
            left = both - _number(folder / "memory.memsw.usage_in_bytes")
    except FileNotFoundError:
        return _UNLIMITED  # a root, or a kernel that does not account for swap
    return max(0, left)


def _number(path: Path) -> int:
    text = read_record(path).strip()
    return _UNLIMITED if text == "max" else int(text)


def _cache(folder: Path, files: _Files) -> int:
    fields = dict(line.split() for line in read_record(folder / "memory.stat").splitlines())
    return sum(int(fields.get(name, 0)) for name in files.cache)


def _swap_free_bytes() -> int:
    found = re.search(r"SwapFree: +(\d+)", read_record("/proc/meminfo"))
    return int(found[1]) * 1024 if found else 0
