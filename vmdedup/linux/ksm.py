"""The kernel's own KSM: its settings, and what it counts for one process.

Owns the reading of /sys/kernel/mm/ksm and /proc/PID/ksm_stat. Promises the kernel's defaults
where this kernel has no KSM, or lacks a setting. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path("/sys/kernel/mm/ksm")


@dataclass(frozen=True)
class KernelKsm:
    """The settings that decide what KSM merges (Documentation/admin-guide/mm/ksm.rst)."""

    exists: bool
    max_page_sharing: int
    use_zero_pages: bool
    merge_across_nodes: bool


def read_ksm() -> KernelKsm:
    """The settings now."""
    return KernelKsm(
        exists=_FOLDER.exists(),
        max_page_sharing=_setting("max_page_sharing", 256),
        use_zero_pages=_setting("use_zero_pages", 0) != 0,
        merge_across_nodes=_setting("merge_across_nodes", 1) != 0,
    )


def _setting(name: str, default: int) -> int:
    try:
        return int((_FOLDER / name).read_text())
    except (OSError, ValueError):
        return default


def zero_pages_of(pid: int) -> int:
    """Pages of a process that KSM has put on the zero page; `0` if the kernel does not say."""
    try:
        lines = Path(f"/proc/{pid}/ksm_stat").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[-1] for line in lines if line.startswith("ksm_zero_pages")]
    return int(found[0]) if found and found[0].isdigit() else 0
