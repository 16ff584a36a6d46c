"""/proc/meminfo, /proc/swaps: the host's memory, and its free swap. Reads only."""

from __future__ import annotations

from pathlib import Path

_SWAPS = Path("/proc/swaps")


def memory_bytes() -> tuple[int, int]:
    """MemAvailable and MemTotal of /proc/meminfo, in bytes."""
    available, total = _amounts("MemAvailable", "MemTotal")
    return available, total


def available_bytes() -> int:
    """MemAvailable of /proc/meminfo, in bytes."""
    return memory_bytes()[0]


def swap_free_bytes() -> int:
    """SwapFree of /proc/meminfo, in bytes; `0` without swap."""
    return _amounts("SwapFree")[0]


def host_room_bytes() -> tuple[int, int, int]:
    """MemAvailable, free swap, and MemTotal, in bytes.

    Free swap on zram is left out: what is swapped there stays in the host's memory, compressed.
    """
    available, swap_free, total = _amounts("MemAvailable", "SwapFree", "MemTotal")
    return available, max(0, swap_free - _zram_free_bytes()), total


def _zram_free_bytes() -> int:
    try:
        lines = _SWAPS.read_text(errors="replace").splitlines()
    except FileNotFoundError:  # a kernel without swap
        return 0
    rows = [line.split() for line in lines if line.startswith("/dev/zram")]
    return sum(int(size) - int(used) for _, _, size, used, *_ in rows) * 1024


def _amounts(*names: str) -> list[int]:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return [int(fields[name].split()[0]) * 1024 if name in fields else 0 for name in names]
