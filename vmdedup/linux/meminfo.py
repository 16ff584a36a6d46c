"""/proc/meminfo: how much memory the host has, and can still give. Reads only."""

from __future__ import annotations


def memory_bytes() -> tuple[int, int]:
    """MemAvailable and MemTotal of /proc/meminfo."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    available, total = (int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return available * 1024, total * 1024


def available_bytes() -> int:
    """MemAvailable of /proc/meminfo."""
    return memory_bytes()[0]
