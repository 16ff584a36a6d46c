"""The space that a filesystem must keep free for the RAM files on it.

A RAM file is sparse: a page gets its block when it is first touched, and if no block is
left QEMU dies of SIGBUS. Owns finding the RAM files of every visible QEMU, attached or
not, and the space they have not allocated yet. Merged pages need no block: a write to one
goes to anonymous memory, and an unmerge asks first.
Promises no more than a moment's truth: others allocate too, hence the reserve. Reads only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vmdedup.attach.discover import running_qemus
from vmdedup.attach.ranges import Region
from vmdedup.core.rmap import OWN
from vmdedup.errors import VmError
from vmdedup.guest.mapping_state import standing_pages
from vmdedup.linux.maps import is_store_path, read_maps
from vmdedup.units import BLOCK_BYTES, MIB, PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

_RESERVE_BYTES = 16 * MIB
_RESERVE_SHARE = 16
"""The reserve of a small filesystem is its size divided by this."""


@dataclass(frozen=True)
class Room:
    """The free space of a filesystem, and the part that its RAM files may still need."""

    free_bytes: int
    promised_bytes: int
    reserve_bytes: int
    """Space kept free beyond that, as others allocate too; `0` if no RAM file lies there."""

    @property
    def left_bytes(self) -> int:
        """Space that a store may take so that every RAM file still gets its blocks."""
        return max(0, self.free_bytes - self.promised_bytes - self.reserve_bytes)


class RamFiles:
    """The RAM files on one filesystem; the first call of `room` looks for them.

    `place`: a path or a descriptor there. `vms`: the attached VMs, whose mappings need
    not be read.
    """

    def __init__(self, place: Path | int, vms: Sequence[AttachedVm] = ()) -> None:
        self._place = place
        self._vms = vms
        self._found: dict[tuple[int, int], tuple[str, Callable[[], int]]] | None = None

    def room(self) -> Room:
        """The room there now. Raises OSError when the place is gone."""
        if self._found is None:
            self._found = {}
            device = os.stat(self._place).st_dev
            for vm in self._vms:
                self._add_attached(self._found, vm, device)
            attached = {vm.pid for vm in self._vms}
            for candidate in running_qemus():
                if candidate.pid is not None and candidate.pid not in attached:
                    self._add_other(self._found, candidate.pid, device)
        free_bytes, reserve_bytes = _asked(self._place)
        return Room(
            free_bytes=free_bytes,
            promised_bytes=sum(
                _sparse_bytes(path, merged) for path, merged in self._found.values()
            ),
            reserve_bytes=reserve_bytes if self._found else 0,
        )

    @property
    def count(self) -> int:
        """Number of RAM files found."""
        return len(self._found or ())

    @staticmethod
    def _add_attached(
        found: dict[tuple[int, int], tuple[str, Callable[[], int]]], vm: AttachedVm, device: int
    ) -> None:
        for index, region in enumerate(vm.regions):
            if region.ram_file is None or region.ram_file[0] != device:
                continue
            merged = partial(_merged_bytes, vm, index) if region.share else int
            with suppress(OSError, VmError):
                found[region.ram_file] = _path_of(vm.pid, region), merged

    @staticmethod
    def _add_other(
        found: dict[tuple[int, int], tuple[str, Callable[[], int]]], pid: int, device: int
    ) -> None:
        try:
            maps = read_maps("", pid)
        except (OSError, VmError):
            return
        standing_bytes = standing_pages(pid) * PAGE_BYTES
        for row in np.flatnonzero(maps.device == device).tolist():
            identity = device, int(maps.inode[row])
            is_ram = maps.permissions[row].startswith("rw") and not is_store_path(maps.path[row])
            if is_ram and identity not in found:
                link = f"/proc/{pid}/map_files/{int(maps.start[row]):x}-{int(maps.end[row]):x}"
                found[identity] = link, partial(int, standing_bytes)
                standing_bytes = 0


def is_ample(place: Path | int, size_bytes: int) -> bool:
    """Whether `size_bytes` can be taken there and still leave the reserve."""
    free_bytes, reserve_bytes = _asked(place)
    return size_bytes <= free_bytes - reserve_bytes


def _asked(place: Path | int) -> tuple[int, int]:
    """Free space of a filesystem and its reserve, in bytes."""
    found = os.statvfs(place)
    size_bytes = found.f_blocks * found.f_frsize
    return found.f_bavail * found.f_frsize, min(_RESERVE_BYTES, size_bytes // _RESERVE_SHARE)


def _path_of(pid: int, region: Region) -> str:
    """A path at which stat reaches the RAM file of a region. Raises OSError, VmError."""
    if region.ram_fd is not None:
        return f"/proc/{pid}/fd/{region.ram_fd}"
    assert region.ram_file is not None
    maps = read_maps("", pid).within(region.start, region.end)
    for row in maps.of_file(*region.ram_file).tolist():
        return f"/proc/{pid}/map_files/{int(maps.start[row]):x}-{int(maps.end[row]):x}"
    raise FileNotFoundError(f"{region.backend}: nothing maps its RAM file")


def _merged_bytes(vm: AttachedVm, region: int) -> int:
    slot = vm.scan.columns.slot[vm.space.slice_of(region)]
    return int(np.count_nonzero(slot != OWN)) * PAGE_BYTES


def _sparse_bytes(path: str, merged: Callable[[], int]) -> int:
    """Bytes that a RAM file may still allocate, without its merged pages; `0` once it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return 0
    return max(0, found.st_size - found.st_blocks * BLOCK_BYTES - merged())
