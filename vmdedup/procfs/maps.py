"""/proc/PID/maps as columns.

Owns the parsing. A merged VM has tens of thousands of mappings, so they are
kept as numpy columns and never as objects; `Vma` rows are made only for the
few that are asked for. Promises one consistent read per call, sorted by
address; the process may change its mappings right after.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.errors import VmGoneError

_LINE = re.compile(
    rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([rwxsp-]{4}) ([0-9a-f]{1,16})"
    rb" ([0-9a-f]{1,8}:[0-9a-f]{1,8} \d{1,19} *.*)$",
    re.MULTILINE,
)
_FILE = re.compile(rb"([0-9a-f]{1,8}):([0-9a-f]{1,8}) (\d{1,19}) *(.*)")


@dataclass(frozen=True)
class Vma:
    """One mapping: [start, end) in host-virtual bytes, its file and offset."""

    start: int
    end: int
    permissions: str
    offset_bytes: int
    device: int
    """`st_dev` of the mapped file, 0 for anonymous memory."""
    inode: int
    path: str


@dataclass(frozen=True)
class Maps:
    """All mappings of a process, one row each, ascending.

    `start`, `end`, `offset_bytes`, `device`, `inode`: uint64, shape (n,);
    `permissions` and `path` as the kernel prints them.
    """

    start: npt.NDArray[np.uint64]
    end: npt.NDArray[np.uint64]
    offset_bytes: npt.NDArray[np.uint64]
    device: npt.NDArray[np.uint64]
    inode: npt.NDArray[np.uint64]
    permissions: tuple[str, ...]
    path: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.start)

    def row(self, index: int) -> Vma:
        """The mapping at `index`."""
        return Vma(
            int(self.start[index]),
            int(self.end[index]),
            self.permissions[index],
            int(self.offset_bytes[index]),
            int(self.device[index]),
            int(self.inode[index]),
            self.path[index],
        )

    def within(self, start: int, end: int) -> Maps:
        """The mappings that overlap [start, end)."""
        first = int(np.searchsorted(self.end, start, side="right"))
        last = int(np.searchsorted(self.start, end, side="left"))
        rows = slice(first, max(first, last))
        return Maps(
            self.start[rows],
            self.end[rows],
            self.offset_bytes[rows],
            self.device[rows],
            self.inode[rows],
            self.permissions[rows],
            self.path[rows],
        )

    def covers(self, start: int, end: int) -> bool:
        """True when [start, end) is mapped without a gap."""
        part = self.within(start, end)
        if not len(part) or part.start[0] > start or part.end[-1] < end:
            return False
        return bool(np.all(part.end[:-1] == part.start[1:]))

    def of_file(self, device: int, inode: int) -> npt.NDArray[np.intp]:
        """Rows that map the file with that device and inode."""
        return np.flatnonzero((self.inode == inode) & (self.device == device))


def parse_maps(text: bytes) -> Maps:
    """Columns from the text of a maps file; lines of another form are skipped."""
    rows = _LINE.findall(text)
    numbers = np.array(
        [(int(row[0], 16), int(row[1], 16), int(row[3], 16)) for row in rows], dtype=np.uint64
    ).reshape(-1, 3)
    # Of tens of thousands of mappings nearly all are of two or three files.
    files = {file: _parse_file(file) for file in {row[4] for row in rows}}
    device_inode = np.array([files[row[4]][:3] for row in rows], dtype=np.uint64).reshape(-1, 3)
    return Maps(
        start=numbers[:, 0].copy(),
        end=numbers[:, 1].copy(),
        offset_bytes=numbers[:, 2].copy(),
        device=_makedev(device_inode[:, 0], device_inode[:, 1]),
        inode=device_inode[:, 2].copy(),
        permissions=tuple(row[2].decode() for row in rows),
        path=tuple(files[row[4]][3] for row in rows),
    )


def _parse_file(text: bytes) -> tuple[int, int, int, str]:
    """Major and minor device number, inode and path."""
    match = _FILE.fullmatch(text)
    assert match is not None, "as matched by _LINE"
    major, minor, inode, path = match.groups()
    return int(major, 16), int(minor, 16), int(inode), os.fsdecode(path)


def _makedev(
    major: npt.NDArray[np.uint64], minor: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """glibc's makedev(3), so that columns compare with st_dev."""
    u = np.uint64
    return np.asarray(
        ((major & u(0xFFF)) << u(8))
        | ((major & u(0xFFFFF000)) << u(32))
        | (minor & u(0xFF))
        | ((minor & u(0xFFFFFF00)) << u(12)),
        dtype=np.uint64,
    )


def read_maps(vm: str, pid: int, *, naming: bytes = b"") -> Maps:
    """The mappings of process `pid` now; only those whose line has `naming` in it.

    Raises VmGoneError when it ended, PermissionError when it may not be read.
    """
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmGoneError(vm, "the VM's process ended", pid=pid) from error
    if not text:
        raise VmGoneError(vm, "the VM's process ended", pid=pid)
    if naming:
        text = b"".join(line for line in text.splitlines(keepends=True) if naming in line)
    return parse_maps(text)
