"""Cgroup limits of a process: on its memory, and freezing.

Owns the reading of the memory limits above a process and of its frozen state. It reads the
unified hierarchy and those of the older version, wherever they are mounted, with all groups
above. Memory that the kernel can take back at once, its cache of files, does not count as
used. Memory that it could swap out, as far as the groups allow, is reported apart.
Promises nothing: others of the group use memory too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vmdedup.linux.meminfo import swap_free_bytes
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


@dataclass(frozen=True)
class GroupMemory:
    """A memory cgroup with a limit. It is the same for all processes that are in it."""

    folder: Path
    _files: _Files
    _with_above: tuple[Path, ...]
    """The folder itself, and those above it: each may forbid swapping."""

    def limit_bytes(self) -> int:
        """Its limit. Raises OSError or ValueError if the group is gone."""
        return _limit_bytes(self.folder, self._files)

    def left_bytes(self) -> int:
        """Bytes left below the limit. Raises as `limit_bytes`."""
        return _left_bytes(self.folder, self._files, self.limit_bytes())

    def swap_bytes(self) -> int:
        """Bytes that this group, those above and the host would let it swap out.

        Raises as `limit_bytes`.
        """
        return _swap_bytes(self._with_above, self._files)


def limited_groups(pid: int) -> list[GroupMemory]:
    """The memory cgroups above a process that have a limit; none if it has ended."""
    found = []
    for chain, files in _chains(pid):
        for depth, folder in enumerate(chain):
            with suppress(OSError, ValueError):  # no memory controller, or it is gone
                if _limit_bytes(folder, files) < _UNLIMITED:
                    found.append(GroupMemory(folder, files, chain[depth:]))
    return found


def headroom(pid: int) -> Headroom | None:
    """Memory a process may still take before a cgroup above it is full; `None` without a limit.

    `None` also when the process ended: the caller's next step finds that out.
    """
    limited = []
    for group in limited_groups(pid):
        with suppress(OSError, ValueError):  # it is gone
            limited.append((group.left_bytes(), str(group.folder)))
    if not limited:
        return None
    left_bytes, name = min(limited)
    return Headroom(left_bytes, swap_left_bytes(pid), name)


def swap_left_bytes(pid: int) -> int:
    """Memory that the groups of a process, and the host, would let it swap out, bytes."""
    return min((_swap_bytes(*each) for each in _chains(pid)), default=swap_free_bytes())


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


def _chains(pid: int) -> list[tuple[tuple[Path, ...], _Files]]:
    """For each hierarchy: the process's memory group and all above it, the nearest first."""
    return [
        ((folder, *(each for each in folder.parents if each.is_relative_to(top))), files)
        for folder, top, files in _groups(pid)
    ]


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


def _limit_bytes(folder: Path, files: _Files) -> int:
    return min(_number(folder / name) for name in files.limits)


def _left_bytes(folder: Path, files: _Files, limit_bytes: int) -> int:
    return max(0, limit_bytes - _number(folder / files.usage) + _cache(folder, files))


def _swap_bytes(folders: Sequence[Path], files: _Files) -> int:
    left_bytes = swap_free_bytes()
    for folder in folders:
        with suppress(OSError, ValueError):
            left_bytes = min(left_bytes, _swap_left_bytes(folder, files))
    return left_bytes


def _swap_left_bytes(folder: Path, files: _Files) -> int:
    """Bytes that a group lets its processes swap out (mm/vmscan.c: get_scan_count)."""
    try:
        if files is _UNIFIED:
            left = _number(folder / "memory.swap.max") - _number(folder / "memory.swap.current")
        elif _number(folder / "memory.swappiness") == 0:
            left = 0
        else:
            left = _number(folder / "memory.memsw.limit_in_bytes")
            if left < _UNLIMITED:  # memory and swap together: the rest is for swap
                left -= _number(folder / "memory.memsw.usage_in_bytes")
                limit_bytes = _limit_bytes(folder, files)
                left -= limit_bytes - _number(folder / files.usage)
    except FileNotFoundError:
        return _UNLIMITED  # a root, or a kernel that does not account for swap
    return max(0, left)


def _number(path: Path) -> int:
    text = read_record(path).strip()
    return _UNLIMITED if text == "max" else int(text)


def _cache(folder: Path, files: _Files) -> int:
    fields = dict(line.split() for line in read_record(folder / "memory.stat").splitlines())
    return sum(int(fields.get(name, 0)) for name in files.cache)
