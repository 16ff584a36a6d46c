"""Where the kernel swaps to now, what it takes there, and what room that leaves the host.

Owns the reading of /proc/swaps, of zram's mm_stat and of zswap's figures. Promises to call
swap fast only if it is memory: the devices that the kernel fills next are all zram, or zswap
stands before them. Reads only.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmdedup.linux import meminfo
from vmdedup.linux.proc_file import read_record

_SWAPS = Path("/proc/swaps")
_BLOCK = Path("/sys/block")
_ZSWAP = Path("/sys/module/zswap/parameters")
_PRESSURE = Path("/proc/pressure/memory")
_SOME = re.compile(r"^some avg10=([0-9.]+)", re.MULTILINE)


@dataclass(frozen=True)
class SwapDevice:
    """A line of /proc/swaps."""

    path: str
    size_bytes: int
    used_bytes: int
    priority: int

    @property
    def free_bytes(self) -> int:
        """Room that is left."""
        return self.size_bytes - self.used_bytes

    @property
    def is_zram(self) -> bool:
        """Whether it is memory, compressed."""
        return Path(self.path).name.startswith("zram") and self.path.startswith("/dev/")


@dataclass(frozen=True)
class Swap:
    """The host's swap."""

    devices: tuple[SwapDevice, ...]
    has_zswap: bool
    held_bytes: int
    """Memory that compressed pages take: zram's and zswap's own figures."""

    @property
    def next_devices(self) -> list[SwapDevice]:
        """The devices that the kernel fills next: those with room of the highest priority."""
        free = [device for device in self.devices if device.free_bytes > 0]
        most = max((device.priority for device in free), default=0)
        return [device for device in free if device.priority == most]

    @property
    def is_zram(self) -> bool:
        """Whether what is swapped out next goes to zram."""
        coming = self.next_devices
        return bool(coming) and all(device.is_zram for device in coming)

    @property
    def is_memory(self) -> bool:
        """Whether what is swapped out next stays in memory, compressed."""
        return self.is_zram or (bool(self.next_devices) and self.has_zswap)

    @property
    def free_bytes(self) -> int:
        """Room that is left on the devices that are filled next."""
        return sum(device.free_bytes for device in self.next_devices)

    @property
    def saved_share(self) -> float:
        """Memory given back, as a share of what is swapped out, 0 to 1."""
        used_bytes = sum(device.used_bytes for device in self.devices)
        return max(0.0, 1 - self.held_bytes / used_bytes) if used_bytes else 0.0

    @property
    def what(self) -> str:
        """Its kind in words."""
        names = ", ".join(Path(device.path).name for device in self.next_devices)
        return f"{names} behind zswap" if self.has_zswap else names


def host_room_bytes() -> tuple[int, int, int]:
    """MemAvailable, free swap, and MemTotal, in bytes.

    Free swap on zram is left out: what is swapped there stays in the host's memory, compressed.
    """
    available, swap_free, total = meminfo.amounts("MemAvailable", "SwapFree", "MemTotal")
    in_memory = sum(device.free_bytes for device in _devices() if device.is_zram)
    return available, max(0, swap_free - in_memory), total


def read_swap() -> Swap:
    """The swap as it is now."""
    devices = _devices()
    held_bytes = sum(_zram_bytes(device) for device in devices if device.is_zram)
    (zswap_bytes,) = meminfo.amounts("Zswap")
    return Swap(devices, _has_zswap(), held_bytes + zswap_bytes)


def _devices() -> tuple[SwapDevice, ...]:
    try:
        lines = read_record(_SWAPS).splitlines()[1:]
    except FileNotFoundError:  # a kernel without swap
        return ()
    return tuple(
        SwapDevice(path, int(size) << 10, int(used) << 10, int(priority))
        for path, _, size, used, priority in (line.rsplit(None, 4) for line in lines)
    )


def memory_pressure_percent() -> float | None:
    """PSI's share of the last 10 s in which some task waited for memory; `None` without PSI."""
    with suppress(OSError):  # not built in, or off (psi=0)
        found = _SOME.search(read_record(_PRESSURE))
        return None if found is None else float(found[1])
    return None


def _zram_bytes(device: SwapDevice) -> int:
    """Memory that a zram device takes (Documentation/admin-guide/blockdev/zram.rst: mm_stat)."""
    with suppress(OSError, ValueError, IndexError):  # it has just been reset
        return int(read_record(_BLOCK / Path(device.path).name / "mm_stat").split()[2])
    return 0


def _has_zswap() -> bool:
    with suppress(OSError, ValueError):  # not built in
        is_on = read_record(_ZSWAP / "enabled").strip() == "Y"
        return is_on and int(read_record(_ZSWAP / "max_pool_percent")) > 0
    return False
