"""/proc/meminfo: the host's memory, in all and available, and its free swap. Reads only."""

from __future__ import annotations


def memory_bytes() -> tuple[int, int]:
    """MemAvailable and MemTotal of /proc/meminfo, in bytes."""
    available, total = amounts("MemAvailable", "MemTotal")
    return available, total


def available_bytes() -> int:
    """MemAvailable of /proc/meminfo, in bytes."""
    return memory_bytes()[0]


def swap_free_bytes() -> int:
    """SwapFree of /proc/meminfo, in bytes; `0` without swap."""
    return amounts("SwapFree")[0]


def amounts(*names: str) -> list[int]:
    """Amounts of /proc/meminfo by their names, in bytes; `0` for one that this kernel lacks."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return [int(fields[name].split()[0]) * 1024 if name in fields else 0 for name in names]
