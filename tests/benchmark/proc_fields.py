"""Sizes that the kernel tells in /proc, as `Name:  12 kB`."""

from __future__ import annotations

import re
from pathlib import Path

from tests.benchmark.errors import BenchError


def read_kib(file: Path, name: str) -> int:
    """A field of a file like /proc/PID/status, in KiB. Raises BenchError."""
    found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    if found is None:
        raise BenchError(f"{file} has no {name}")
    return int(found[1])
