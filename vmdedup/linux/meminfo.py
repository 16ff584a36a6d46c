"""/proc/meminfo: the host's memory, in all and available. Reads only."""

from __future__ import annotations


def memory_bytes() -> tuple[int, int]:
    """MemAvailable and MemTotal of /proc/meminfo, in bytes."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    available, total = (int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return available * 1024, total * 1024


def available_bytes() -> int:
    """MemAvailable of /proc/meminfo, in bytes."""
    return memory_bytes()[0]
