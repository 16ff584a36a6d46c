"""VmFlags of mappings, from /proc/PID/smaps.

Owns the parsing of the flags alone. smaps walks the page tables of each mapping
it prints and is slow on large VMs, so callers stop reading early.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vmdedup.errors import VmGoneError

_HEAD = re.compile(rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([rwxsp-]{4}) \S+ \S+ \d+ *(.*)$")


@dataclass(frozen=True)
class FlaggedVma:
    """A mapping and its two-letter flags (Documentation/filesystems/proc.rst: VmFlags)."""

    start: int
    end: int
    permissions: str
    path: str
    flags: frozenset[str]


def flagged_vmas(vm: str, pid: int) -> Iterator[FlaggedVma]:
    """Mappings in ascending order, read as they are asked for. Raises VmGoneError."""
    try:
        with open(f"/proc/{pid}/smaps", "rb") as file:
            yield from parse_smaps(file)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmGoneError(vm, "the VM's process ended", pid=pid) from error


def parse_smaps(lines: Iterable[bytes]) -> Iterator[FlaggedVma]:
    """Mappings from the lines of a smaps file; lines of another form are skipped."""
    head = None
    for line in lines:
        if match := _HEAD.match(line.rstrip(b"\n")):
            head = match
        elif head is not None and line.startswith(b"VmFlags:"):
            yield FlaggedVma(
                int(head[1], 16),
                int(head[2], 16),
                head[3].decode(),
                head[4].decode(errors="replace"),
                frozenset(line.decode(errors="replace").split()[1:]),
            )


def is_guest_ram(vm: str, pid: int, start: int, end: int) -> bool:
    """True when every mapping in [start, end) has what QEMU sets on guest RAM and little else.

    `dc` is MADV_DONTFORK (softmmu/physmem.c: ram_block_add): heap and stacks lack it.
    """
    for vma in flagged_vmas(vm, pid):
        if vma.start >= end:
            return True
        if vma.end > start and "dc" not in vma.flags:
            return False
    return True


def has_unmergeable_lock(vm: str, pid: int, start: int, end: int) -> bool:
    """True when a mapping in [start, end) is locked at map time (`lo` without `lf`).

    MAP_LOCKED populates a private mapping at once. So the kernel would copy each page of a
    remap at once as well, and nothing would be shared.
    """
    for vma in flagged_vmas(vm, pid):
        if vma.start >= end:
            return False
        if vma.end > start and "lo" in vma.flags and "lf" not in vma.flags:
            return True
    return False


def process_pss_bytes(pid: int | None = None) -> int:
    """Proportional set size of a process (ours by default), `0` when it is gone.

    Shared memory is left out: while pages are compared the store is mapped, and its pages
    exist anyway.
    """
    try:
        with open(f"/proc/{pid or os.getpid()}/smaps_rollup", encoding="ascii") as file:
            parts = [line.split() for line in file]
    except OSError:
        return 0
    return 1024 * sum(int(part[1]) for part in parts if part[0] in ("Pss_Anon:", "Pss_File:"))
