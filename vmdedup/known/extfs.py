"""The files of ext2, ext3 and ext4 filesystems inside a raw disk image: names, and where each is.

Owns the way from an image to them: partitions by `partx` (util-linux), folders and extents by
`debugfs` (e2fsprogs), in its mode for damaged filesystems, which reads no bitmaps. Promises
that nothing is mounted or written. An image is a guest's, so its filesystem may lie: a
folder is entered once, no extent reaches over the image's end, all of them together have
no more bytes than the image, and `prlimit` (util-linux) bounds the programs' memory and
processor time. Other filesystems, LVM and files inside their own inode have no names here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

PROGRAM = "debugfs"
_SYSTEM_FOLDERS = "/usr/sbin:/sbin"
"""Where it is, though perhaps not for a user's PATH."""
_SUPERBLOCK_AT, _BLOCK_SHIFT_AT, _MAGIC_AT, _MAGIC = 1024, 24, 56, b"\x53\xef"
_MOST_BLOCK_SHIFT = 6
_SECTOR_BYTES = 512
_CPU_LIMIT_S = 300
"""Of one run. No clock: it waits while the files that it has told are read."""
_MEMORY_LIMIT_BYTES = 512 << 20
"""debugfs keeps 64 bytes for each group of blocks, however many a superblock claims: this is
enough for 1 PiB of 4 KiB blocks."""
_BOUNDED = ("prlimit", f"--cpu={_CPU_LIMIT_S}", f"--as={_MEMORY_LIMIT_BYTES}", "--core=0")
_MOST_DEPTH = 200
"""Folders in folders; each level is a run of debugfs."""
_MOST_NAME_BYTES, _ENTRY_BYTES = 256 << 20, 150
"""Most memory for names, and what each takes besides its string."""
_LONGEST_LINE = 4 << 20
"""Characters of one answer: about 200,000 extents. A more scattered file has no name."""
_FORMAT, _FOLDER, _REGULAR = 0o170000, 0o040000, 0o100000
_ROOT = 2
"""Inode of the root folder."""

_PARTITION = re.compile(r"^ *(\d+) +(\d+) *$", re.MULTILINE)
_COMMAND = re.compile(r"debugfs: \w+.* <(\d+)>")
_ENTRY = re.compile(r"/(\d+)/([0-7]{6})/\d+/\d+/(.*)/\d*/")
_SIZE = re.compile(r"User:.* Size: (\d+)")
_EXTENT = re.compile(r"\((\d+)(?:-(\d+))?\):(\d+)")
"""Logical blocks and the first physical one. The marks of an extent that was never written,
`[u]`, and of a block with the map itself, a word, do not fit."""


class Extent(NamedTuple):
    """A stretch of a file."""

    file_offset: int
    image_offset: int
    length_bytes: int


@dataclass(frozen=True)
class _Filesystem:
    fd: int
    offset: int
    """Its begin in the image, bytes."""
    block_bytes: int


def files(fd: int, image_bytes: int) -> Iterator[tuple[str, list[Extent]]]:
    """Path and extents, ascending, of each regular file of an image; holes are in none.

    None without such a filesystem, or without debugfs.
    """
    if program() is None:
        return
    places = [(0, 0)] if _filesystem(fd, 0) else _partitions(fd)
    found = [
        (number, each)
        for number, at in places
        if at < image_bytes and (each := _filesystem(fd, at))
    ]
    left_bytes = image_bytes
    for number, filesystem in found:
        names = _names(filesystem)
        for inode, extents in _mapped(filesystem, names, image_bytes):
            left_bytes -= sum(extent.length_bytes for extent in extents)
            if left_bytes < 0:
                return
            path = names.get(inode, "")
            if extents:
                yield (f"partition {number}/{path}" if len(found) > 1 else path), extents


def program() -> str | None:
    """The path of debugfs; `None` if it or `prlimit` is not installed."""
    folders = f"{os.environ.get('PATH', '')}:{_SYSTEM_FOLDERS}"
    return shutil.which(PROGRAM, path=folders) if shutil.which(_BOUNDED[0]) else None


def _filesystem(fd: int, offset: int) -> _Filesystem | None:
    superblock = os.pread(fd, 64, offset + _SUPERBLOCK_AT)
    if superblock[_MAGIC_AT : _MAGIC_AT + 2] != _MAGIC:
        return None
    shift = int.from_bytes(superblock[_BLOCK_SHIFT_AT : _BLOCK_SHIFT_AT + 4], "little")
    return _Filesystem(fd, offset, 1024 << shift) if shift <= _MOST_BLOCK_SHIFT else None


def _partitions(fd: int) -> list[tuple[int, int]]:
    """Number and begin in bytes of each partition of an MBR or GPT; none without."""
    command = ["partx", "--raw", "--noheadings", "-o", "NR,START", f"/proc/self/fd/{fd}"]
    done = subprocess.run(
        [*_BOUNDED, *command], capture_output=True, text=True, check=False, pass_fds=[fd]
    )
    return [
        (int(number), int(start) * _SECTOR_BYTES)
        for number, start in _PARTITION.findall(done.stdout)
    ]


def _names(filesystem: _Filesystem) -> dict[int, str]:
    """The path of each regular file by its inode: the first of several names."""
    names: dict[int, str] = {}
    folders, entered, held_bytes = {_ROOT: ""}, {_ROOT}, 0
    for _ in range(_MOST_DEPTH):
        below: dict[int, str] = {}
        for folder, line in _answers(filesystem, "ls -p", folders):
            entry = _ENTRY.fullmatch(line)
            if entry is None:
                continue
            inode, kind, name = int(entry[1]), int(entry[2], 8) & _FORMAT, entry[3]
            path = f"{folders.get(folder, '')}{name}"
            if kind == _REGULAR and inode:
                names.setdefault(inode, path)
            elif kind == _FOLDER and name not in (".", "..") and inode not in entered:
                entered.add(inode)
                below[inode] = f"{path}/"
            held_bytes += sys.getsizeof(path) + _ENTRY_BYTES
            if held_bytes > _MOST_NAME_BYTES:
                return names
        if not below:
            break
        folders = below
    return names


def _mapped(
    filesystem: _Filesystem, inodes: Iterable[int], image_bytes: int
) -> Iterator[tuple[int, list[Extent]]]:
    size_bytes, is_listed = 0, False
    for inode, line in _answers(filesystem, "stat", inodes):
        if size := _SIZE.match(line):
            size_bytes = int(size[1])
        elif is_listed:
            blocks = (
                (int(low), int(high or low), int(at))
                for low, high, at in map(re.Match.groups, _EXTENT.finditer(line))
            )
            yield inode, [*_extents(filesystem, sorted(blocks), size_bytes, image_bytes)]
        is_listed = line in ("BLOCKS:", "EXTENTS:")


def _extents(
    filesystem: _Filesystem,
    blocks: Iterable[tuple[int, int, int]],
    size_bytes: int,
    image_bytes: int,
) -> Iterator[Extent]:
    """Of (first logical block, last, first physical), none across the end of file or image."""
    done = 0
    for first, last, physical in blocks:
        begin = first * filesystem.block_bytes
        at = filesystem.offset + physical * filesystem.block_bytes
        end = min((last + 1) * filesystem.block_bytes, size_bytes, begin + image_bytes - at)
        if done <= begin < end:
            yield Extent(begin, at, end - begin)
            done = end


def _answers(
    filesystem: _Filesystem, command: str, inodes: Iterable[int]
) -> Iterator[tuple[int, str]]:
    """Each line that debugfs answers to a command, with the inode that the command is about."""
    name = f"/proc/self/fd/{filesystem.fd}?offset={filesystem.offset}"
    with tempfile.TemporaryFile("w+") as script:
        script.writelines(f"{command} <{inode}>\n" for inode in inodes)
        script.seek(0)
        with subprocess.Popen(
            [*_BOUNDED, program() or PROGRAM, "-c", "-f", "-", name],
            stdin=script,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[filesystem.fd],
            env={**os.environ, "LC_ALL": "C"},
            encoding="utf-8",
            errors="replace",
        ) as process:
            try:
                assert process.stdout is not None
                read = partial(process.stdout.readline, _LONGEST_LINE)
                yield from _by_command(iter(read, ""))
            finally:
                process.kill()


def _by_command(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """debugfs repeats each command before its answer."""
    inode = 0
    for line in lines:
        if asked := _COMMAND.match(line):
            inode = int(asked[1])
        else:
            yield inode, line.rstrip("\n")
