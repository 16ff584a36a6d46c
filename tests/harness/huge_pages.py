"""Transparent huge pages for tests: the host's settings, and what collapses memory.

Settings concern every process of the host, so they are for tests that run alone, and for
short; what was found is put back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.harness.kernel import Vma
from vmdedup.linux.syscalls import process_madvise

_CONTROLS = Path("/sys/kernel/mm/transparent_hugepage")
_PMD_KIB = 2048
_MADV_COLLAPSE = 25


def huge_pages_missing(size_kib: int = _PMD_KIB) -> str | None:
    """Whether this kernel has transparent huge pages of that size, and may be told so."""
    control = _CONTROLS / ("enabled" if size_kib == _PMD_KIB else f"hugepages-{size_kib}kB/enabled")
    try:
        control.write_text(_chosen(control))
    except OSError as error:
        return f"no transparent huge pages of {size_kib} KiB to be had here: {error}"
    return None


@contextmanager
def huge_pages(controls: Mapping[str, str]) -> Iterator[None]:
    """Controls below /sys/kernel/mm/transparent_hugepage set for the block."""
    with ExitStack() as exits:
        for name, value in controls.items():
            control = _CONTROLS / name
            exits.callback(control.write_text, _chosen(control))
            control.write_text(value)
        yield


def collapse(pid: int, mappings: Iterable[Vma]) -> int:
    """Have the kernel collapse mappings now, as khugepaged does in the course of an hour.

    Returns how many it was willing to. Settings of the host do not matter, flags do.
    """
    pidfd = os.pidfd_open(pid)
    try:
        return sum(_collapse(pidfd, mapping) for mapping in mappings)
    finally:
        os.close(pidfd)


def _collapse(pidfd: int, mapping: Vma) -> bool:
    try:
        process_madvise(pidfd, [(mapping.start, mapping.end - mapping.start)], _MADV_COLLAPSE)
    except OSError:
        return False
    return True


def _chosen(control: Path) -> str:
    """What a control is set to, of the values that it offers."""
    return control.read_text().partition("[")[2].partition("]")[0]
