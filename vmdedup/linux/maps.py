"""/proc/PID/maps as columns.

Owns the parsing, and asking for mappings one by one (PROCMAP_QUERY). A merged VM has
tens of thousands of mappings, so they are kept as numpy columns and never as objects;
`Vma` rows are made only for the few that are asked for. Promises one consistent read per
call, sorted by address; the process may change its mappings right after.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from vmdedup.errors import UnsupportedError, VmGoneError
from vmdedup.linux.unsynced_stat import FileStatus, stat_unsynced

_FILE = re.compile(rb"([0-9a-f]{1,8}):([0-9a-f]{1,8}) (\d{1,19}) *(.*)")
_NEWLINE, _SPACE, _DASH = b"\n -"
_PERMISSIONS_BYTES = 4
_HEAD_BYTES = 64
"""Addresses, permissions and offset are at most 55 characters (fs/proc/task_mmu.c)."""

_NO_DIGIT = 16
_DIGIT = np.full(256, _NO_DIGIT, dtype=np.uint8)
_DIGIT[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)
_MOST_DIGITS = 16

ZERO_DEVICE = "/dev/zero"
"""Our name for mappings of the zero device, whatever a mount namespace calls it."""
_ZERO_DEVICE_NUMBER = os.makedev(1, 5)
_MOST_TRIES = 4

STORE_SUFFIX = ".store"
"""End of the name of each stable store."""
_STORE_MARK = "vmdedup"
_DELETED = " (deleted)"

_NAME_BYTES = 4096
"""PATH_MAX, bytes: the kernel reports no longer name."""


def is_store_path(path: str) -> bool:
    """Whether a path in a `Maps`, or of a descriptor, is a stable store, deleted or not."""
    return may_name_store(path) and _STORE_MARK in path


def may_name_store(path: str) -> bool:
    """Whether a path can be a store's in any mount namespace, by its last part alone.

    Ask this before looking at a file: on storage that hangs, that look never ends.
    """
    return path.removesuffix(_DELETED).endswith(STORE_SUFFIX)


def is_merged_onto(path: str) -> bool:
    """Whether a path in a `Maps` is a file that pages are merged onto."""
    return path == ZERO_DEVICE or is_store_path(path)


@dataclass(frozen=True)
class Vma:
    """One mapping: [start, end) in host-virtual bytes, its file and offset."""

    start: int
    end: int
    permissions: str
    offset_bytes: int
    device: int
    """`st_dev` of the mapped file, `0` for anonymous memory."""
    inode: int
    path: str


@dataclass(frozen=True)
class Maps:
    """All mappings of a process, one row each, ascending.

    `start`, `end`, `offset_bytes`, `device`, `inode`: uint64, shape (n,);
    `permissions` and `path`: str, shape (n,), as the kernel prints them.
    """

    start: npt.NDArray[np.uint64]
    end: npt.NDArray[np.uint64]
    offset_bytes: npt.NDArray[np.uint64]
    device: npt.NDArray[np.uint64]
    inode: npt.NDArray[np.uint64]
    permissions: npt.NDArray[np.object_]
    path: npt.NDArray[np.object_]

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


def parse_maps(text: bytes, pid: int | None = None) -> Maps:
    """Columns from the text of a maps file; lines of another form are skipped.

    `pid`: the process it is of. Then the zero device and stores are recognised by the file
    itself, not by the name that some mount namespace gives it (`is_merged_onto`).
    """
    lines = _Lines(text)
    start, end, offset = lines.numbers()
    permissions, files = lines.permissions(), lines.files()
    # Nearly all of tens of thousands of mappings are of two or three files.
    kinds = {file: number for number, file in enumerate(set(files))}
    kind = np.fromiter(map(kinds.__getitem__, files), dtype=np.int64, count=len(files))
    meaning = [_parse_file(file) for file in kinds]
    fits = lines.fit & np.array([it is not None for it in meaning], dtype=np.bool_)[kind]
    known = [it or (0, 0, "") for it in meaning]
    if pid is not None:
        for number, (device, inode, path) in enumerate(known):
            if not _may_be_merged_onto(device, path):
                continue
            rows = np.flatnonzero((kind == number) & (permissions == "rw-p"))[:_MOST_TRIES]
            spans = list(zip(start[rows].tolist(), end[rows].tolist(), strict=True))
            known[number] = device, inode, _name_by_file(pid, spans, path)
    kind = kind[fits]
    return Maps(
        start=start[fits],
        end=end[fits],
        offset_bytes=offset[fits],
        device=np.array([each[0] for each in known], dtype=np.uint64)[kind],
        inode=np.array([each[1] for each in known], dtype=np.uint64)[kind],
        permissions=permissions[fits],
        path=np.array([*(each[2] for each in known), None], dtype=np.object_)[kind],
    )


def _may_be_merged_onto(device: int, path: str) -> bool:
    """Whether to look at the file: device nodes and stores lie on filesystems without a disk.

    No other file is looked at, as it may lie on storage that hangs. A node that was mounted
    by itself has the name `/` once its mount is gone.
    """
    if os.major(device) != 0 or not path.startswith("/") or is_store_path(path):
        return False
    name = path.removesuffix(_DELETED).rpartition("/")[2]
    return name in ("", "zero") or may_name_store(path)


def _name_by_file(pid: int, spans: Sequence[tuple[int, int]], path: str) -> str:
    """The name of the file mapped at one of these (start, end), as `is_merged_onto` takes it.

    The kernel prints a path as the reader's mount namespace shows it. Once the namespace in
    which it was opened has ended, `/dev/zero` reads `/zero` for all, and another file may
    have that name. Only the last part of a store's path is sure to stay.
    """
    for start, end in spans:
        try:
            found = stat_unsynced(f"/proc/{pid}/map_files/{start:x}-{end:x}")
        except FileNotFoundError:
            continue  # unmapped meanwhile
        except OSError:
            return path  # without privileges there is only the name
        if stat.S_ISCHR(found.mode) and found.node == _ZERO_DEVICE_NUMBER:
            return ZERO_DEVICE
        if _may_be_store(path, found):
            return f"{_STORE_MARK}:{path}"
        return path if path != ZERO_DEVICE else f"{path} (another file)"
    return path


def _may_be_store(path: str, found: FileStatus) -> bool:
    """Whether a file has the name of a store, belongs to us, and is closed to all others."""
    is_private = stat.S_ISREG(found.mode) and not found.mode & 0o077
    return may_name_store(path) and is_private and found.uid == os.geteuid()


class _Lines:
    """The lines of a maps file, cut into fields all at once: `start-end permissions offset file`.

    `fit` says which lines have those fields and hexadecimal numbers; ignore all others.
    """

    def __init__(self, text: bytes) -> None:
        self._text = text if text.endswith(b"\n") else text + b"\n"
        padded = np.frombuffer(self._text + bytes(_HEAD_BYTES), dtype=np.uint8)
        self._behind = np.flatnonzero(padded == _NEWLINE)
        self._first = np.append(0, self._behind[:-1] + 1)[: len(self._behind)]
        self._head = np.lib.stride_tricks.sliding_window_view(padded, _HEAD_BYTES)[self._first]
        is_space = self._head == _SPACE
        is_dash = self._head == _DASH
        self._dash = is_dash.argmax(axis=1)
        self._space = is_space.argmax(axis=1)
        self._space_2 = self._space + 1 + _PERMISSIONS_BYTES
        column = np.arange(_HEAD_BYTES)
        self._space_3 = (is_space & (column > self._space_2[:, np.newaxis])).argmax(axis=1)
        row = np.arange(len(self._first))
        self.fit = (
            (self._dash < self._space)
            & is_space[row, np.minimum(self._space_2, _HEAD_BYTES - 1)]
            & (self._space_3 > self._space_2)
            & (self._first + self._space_3 < self._behind)
        )

    def numbers(self) -> tuple[npt.NDArray[np.uint64], ...]:
        """Start, end and offset: uint64, shape (lines,)."""
        return (
            self._hexadecimal(np.zeros_like(self._dash), self._dash),
            self._hexadecimal(self._dash + 1, self._space),
            self._hexadecimal(self._space_2 + 1, self._space_3),
        )

    def _hexadecimal(
        self, first: npt.NDArray[np.int64], behind: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint64]:
        """The numbers in these columns, parsed place by place: there are few distinct places."""
        value = np.zeros(len(first), dtype=np.uint64)
        width = behind - first
        self.fit &= (width > 0) & (width <= _MOST_DIGITS)
        place = np.where(self.fit, first * _HEAD_BYTES + behind, 0)
        for each in np.flatnonzero(np.bincount(place)).tolist():
            rows = np.flatnonzero(place == each)
            low, high = divmod(each, _HEAD_BYTES)
            text = (
                self._head[:, low:high] if len(rows) == len(place) else self._head[rows, low:high]
            )
            digit = np.zeros((len(rows), _MOST_DIGITS), dtype=np.uint8)
            digit[:, _MOST_DIGITS - (high - low) :] = _DIGIT[text]
            self.fit[rows] &= (digit < _NO_DIGIT).all(axis=1)
            # Two digits a byte, the most significant first.
            pairs = np.ascontiguousarray((digit[:, 0::2] << 4) | (digit[:, 1::2] & 0xF))
            value[rows] = pairs.view(">u8").reshape(-1)
        return value

    def permissions(self) -> npt.NDArray[np.object_]:
        """The second field of each line."""
        column = self._space[:, np.newaxis] + 1 + np.arange(_PERMISSIONS_BYTES)
        rows = np.arange(len(column))[:, np.newaxis]
        letters = self._head[rows, np.minimum(column, _HEAD_BYTES - 1)]
        letters = letters.view(np.uint32).reshape(-1)
        column_of = np.empty(len(letters), dtype=np.object_)
        left = np.ones(len(letters), dtype=np.bool_)
        while left.any():  # a handful of kinds: one after the other is quicker than a sort
            kind = letters[left.argmax()]
            same = letters == kind
            column_of[same] = kind.tobytes().decode("ascii", "replace")
            left &= ~same
        return column_of

    def files(self) -> list[bytes]:
        """The rest of each line: device, inode and path."""
        text, first = self._text, self._first + self._space_3 + 1
        return [text[a:b] for a, b in zip(first.tolist(), self._behind.tolist(), strict=True)]


def _parse_file(text: bytes) -> tuple[int, int, str] | None:
    """Device (as st_dev), inode and path; `None` if the text has another form."""
    match = _FILE.fullmatch(text)
    if match is None:
        return None
    major, minor, inode, path = match.groups()
    return os.makedev(int(major, 16), int(minor, 16)), int(inode), os.fsdecode(path)


class _Query(ctypes.Structure):
    """`struct procmap_query` (include/uapi/linux/fs.h)."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("query_flags", ctypes.c_uint64),
        ("query_addr", ctypes.c_uint64),
        ("vma_start", ctypes.c_uint64),
        ("vma_end", ctypes.c_uint64),
        ("vma_flags", ctypes.c_uint64),
        ("vma_page_size", ctypes.c_uint64),
        ("vma_offset", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("vma_name_size", ctypes.c_uint32),
        ("build_id_size", ctypes.c_uint32),
        ("vma_name_addr", ctypes.c_uint64),
        ("build_id_addr", ctypes.c_uint64),
    )


_PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query)
_COVERING_OR_NEXT, _FILE_BACKED = 0x10, 0x20
_FLAG_LETTERS = "rwx"
_SHARED = 8


def files_mapped_beside(
    vm: str, pid: int, device: int, spans: Sequence[tuple[int, int]]
) -> list[Vma]:
    """The mappings in process `pid` of files on `device` that begin outside these spans.

    `device`: an st_dev; `spans`: (start, end) addresses. Mappings inside the spans cost
    nothing, however many they are; mappings of other files cost a microsecond each.
    Raises UnsupportedError before Linux 6.11, VmGoneError when the process ended.
    """
    found: list[Vma] = []
    name = ctypes.create_string_buffer(_NAME_BYTES)
    query = _Query(size=ctypes.sizeof(_Query), query_flags=_COVERING_OR_NEXT | _FILE_BACKED)
    left = sorted(spans)
    with _opened(vm, pid) as file:
        while _ask(vm, pid, file, query):
            while left and left[0][1] <= query.vma_start:
                del left[0]
            if left and left[0][0] <= query.vma_start:
                query.query_addr = left.pop(0)[1]
                continue
            if os.makedev(query.dev_major, query.dev_minor) == device:
                # Only the name takes long, so a second query asks for it.
                query.query_addr = query.vma_start
                query.vma_name_size, query.vma_name_addr = _NAME_BYTES, ctypes.addressof(name)
                if not _ask(vm, pid, file, query):
                    break
                found.append(_row_of(query, os.fsdecode(name.value)))
            query.query_addr = query.vma_end
            query.vma_name_size = query.vma_name_addr = 0
    return found


def _ask(vm: str, pid: int, file: BinaryIO, query: _Query) -> bool:
    """Fill `query` with the mapping at its address, or the next; whether there is one."""
    try:
        fcntl.ioctl(file, _PROCMAP_QUERY, query)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        if error.errno == errno.ESRCH:
            raise VmGoneError(vm, "the VM's process ended", pid=pid) from error
        raise UnsupportedError("procmap-query", f"PROCMAP_QUERY: {error}") from error
    return True


def _row_of(query: _Query, path: str) -> Vma:
    letters = [
        letter if query.vma_flags & (1 << bit) else "-" for bit, letter in enumerate(_FLAG_LETTERS)
    ]
    return Vma(
        query.vma_start,
        query.vma_end,
        "".join([*letters, "s" if query.vma_flags & _SHARED else "p"]),
        query.vma_offset,
        os.makedev(query.dev_major, query.dev_minor),
        query.inode,
        path,
    )


@contextmanager
def _opened(vm: str, pid: int) -> Iterator[BinaryIO]:
    try:
        file = open(f"/proc/{pid}/maps", "rb")  # noqa: SIM115
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmGoneError(vm, "the VM's process ended", pid=pid) from error
    with file:
        yield file


def read_maps(vm: str, pid: int, *, naming: bytes = b"") -> Maps:
    """The mappings of process `pid` now; only those whose line contains `naming`.

    Raises VmGoneError when it ended, PermissionError when it may not be read.
    """
    with _opened(vm, pid) as file:
        try:
            text = file.read()
        except ProcessLookupError as error:
            raise VmGoneError(vm, "the VM's process ended", pid=pid) from error
    if not text:
        raise VmGoneError(vm, "the VM's process ended", pid=pid)
    return parse_maps(_lines_with(naming, text) if naming else text, pid)


def _lines_with(needle: bytes, text: bytes) -> bytes:
    """The lines that contain the needle; quick if they are few."""
    found, at = [], text.find(needle)
    while at >= 0:
        behind = text.find(b"\n", at) + 1 or len(text)
        found.append(text[text.rfind(b"\n", 0, at) + 1 : behind])
        at = text.find(needle, behind)
    return b"".join(found)
