"""The names of scratch memory inside targets, and finding it by its name.

Owns two file names for each session: of the stub (`vmdedup-stub-…`) and of the table
(`vmdedup-table-…`). Both name the process that made them, so that a successor can tell
scratch that is in use from scratch that was left behind. Reads only.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from vmdedup.errors import UnsupportedError, VmGoneError
from vmdedup.linux.descriptors import descriptor_links
from vmdedup.linux.maps import Vma, files_mapped_beside, read_maps
from vmdedup.linux.process import ProcessId, is_running, read_process_id

_PREFIXES = ("vmdedup-table-", "vmdedup-stub-")


SCRATCH_LINK = "/memfd:"
"""Prefix of memfd names in /proc."""
_LINK = re.compile(
    rf"{SCRATCH_LINK}(?P<name>({'|'.join(_PREFIXES)})"
    r"(?P<pid>[0-9]+)-(?P<start_ticks>[0-9]+)-(?P<nonce>[0-9a-f]+))( \(deleted\))?"
)


@dataclass(frozen=True)
class ScratchNames:
    """Names of the two files of one session: role, maker's pid and start time, nonce."""

    table: str
    stub: str
    nonce: int

    @classmethod
    def fresh(cls) -> ScratchNames:
        """Names that no one else has."""
        maker = read_process_id(os.getpid())
        nonce = secrets.randbits(63) | 1
        tail = f"{maker.pid}-{maker.start_ticks}-{nonce:016x}"
        return cls(f"{_PREFIXES[0]}{tail}", f"{_PREFIXES[1]}{tail}", nonce)


@dataclass(frozen=True)
class Scratch:
    """A mapping or descriptor of ours inside a target, recognized by its file's name."""

    name: str
    maker: ProcessId
    nonce: int

    @classmethod
    def parse(cls, link: str) -> Scratch | None:
        """Parse a path in /proc/PID/maps or /proc/PID/fd; `None` if it is not ours."""
        # Any process may name a file almost so.
        if (found := _LINK.fullmatch(link)) is None:
            return None
        return cls(
            found["name"],
            ProcessId(int(found["pid"]), int(found["start_ticks"])),
            int(found["nonce"], 16),
        )

    @property
    def is_table(self) -> bool:
        """Whether it is the table, not the stub."""
        return self.name.startswith(_PREFIXES[0])

    def maker_runs(self) -> bool:
        """Whether the vmdedup that made it still runs."""
        return is_running(self.maker)


def scratch_mappings(
    pid: int, *, vm: str = "", beside: Sequence[tuple[int, int]] = ()
) -> list[tuple[Scratch, Vma]]:
    """Every scratch mapping of any vmdedup inside `pid`.

    `beside`: (start, end) spans that contain many mappings but no scratch.
    """
    vm = vm or f"pid {pid}"
    found = None
    if beside:
        with suppress(UnsupportedError):
            found = files_mapped_beside(vm, pid, _memfd_device(), beside)
    if found is None:
        maps = read_maps(vm, pid, naming=f"{SCRATCH_LINK}vmdedup-".encode())
        found = [maps.row(index) for index in range(len(maps))]
    rows = ((Scratch.parse(vma.path), vma) for vma in found)
    return [(scratch, vma) for scratch, vma in rows if scratch is not None]


@cache
def _memfd_device() -> int:
    """The st_dev of every memfd without huge pages (mm/shmem.c: shm_mnt)."""
    fd = os.memfd_create("vmdedup-probe")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def is_table(vma: Vma) -> bool:
    """Whether a scratch mapping is the table itself, starting at its header."""
    return _PREFIXES[0] in vma.path and not vma.offset_bytes


def table_of(vmas: Sequence[Vma]) -> Vma | None:
    """The mapping of a session's table; its rooms are other mappings of the same file."""
    return next((vma for vma in vmas if is_table(vma)), None)


def stale_scratch(pid: int, *, vm: str = "") -> list[Vma]:
    """Scratch mappings inside `pid` whose vmdedup no longer runs."""
    return [vma for scratch, vma in scratch_mappings(pid, vm=vm) if not scratch.maker_runs()]


def scratch_fds(pid: int, *, vm: str = "") -> list[tuple[Scratch, int]]:
    """Every descriptor of `pid` that refers to a scratch file of any vmdedup."""
    try:
        links = descriptor_links(pid)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmGoneError(vm or f"pid {pid}", "the process ended", pid=pid) from error
    parsed = [(Scratch.parse(link), fd) for fd, link in links.items()]
    return [(scratch, fd) for scratch, fd in parsed if scratch is not None]
