"""Other mappings of a VM's RAM file.

A merge replaces QEMU's mapping only. Another process that maps the same file
(vhost-user, virtiofsd, a second QEMU) continues to write and read the file itself. So
does a second mapping inside QEMU. Mapping and file diverge silently. Owns the search
for such mappings; one sweep over /proc for any number of files. Reads only; skips a
process that ends meanwhile, or that we may not look at.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmdedup.attach.monitor import one_line
from vmdedup.attach.ranges import Region
from vmdedup.linux.maps import parse_maps, read_maps
from vmdedup.linux.process import Process


@dataclass(frozen=True)
class Mapper:
    """A process that maps the RAM file of a backend."""

    backend: str
    pid: int
    name: str


def processes_mapping(
    files: Mapping[tuple[int, int], str], excluded_pids: Collection[int]
) -> Iterator[Mapper]:
    """Processes that map one of `files`, (st_dev, st_ino) to backend id."""
    if not files:
        return
    needles = {f" {inode} ".encode(): (device, inode) for device, inode in files}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in excluded_pids:
            continue
        try:
            text = Path(f"/proc/{name}/maps").read_bytes()
        except OSError:
            continue
        hits = [identity for needle, identity in needles.items() if needle in text]
        if not hits:
            continue
        maps = parse_maps(text)
        for identity in hits:
            if len(maps.of_file(*identity)):
                yield Mapper(files[identity], int(name), _comm(name))


def _comm(pid: str) -> str:
    try:
        return one_line(Path(f"/proc/{pid}/comm").read_text(errors="replace"), 32)
    except OSError:
        return "ended"


def own_aliases(process: Process, regions: Sequence[Region]) -> Iterator[str]:
    """Addresses at which QEMU maps the RAM file of a region outside all regions."""
    files = {region.ram_file for region in regions if region.share and region.ram_file}
    if not files:
        return
    maps = read_maps(process.vm, process.pid)
    for device, inode in files:
        for row in maps.of_file(device, inode).tolist():
            start = int(maps.start[row])
            if not any(region.start <= start < region.end for region in regions):
                yield f"{start:#x}"
