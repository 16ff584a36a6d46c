"""/proc/meminfo: the host's memory, in all and available, and its free swap. Reads only."""

from __future__ import annotations


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
    """MemAvailable, SwapFree and MemTotal of /proc/meminfo, in bytes."""
    available, swap_free, total = _amounts("MemAvailable", "SwapFree", "MemTotal")
    return available, swap_free, total


def _amounts(*names: str) -> list[int]:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return [int(fields[name].split()[0]) * 1024 if name in fields else 0 for name in names]
