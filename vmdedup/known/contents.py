"""A known file's kind, and the pages of its contents as guests have them in memory.

Owns the ways from a path to pages: a kernel unpacked, an initrd's members, a disk's blocks
(guests' page cache has files block by block), a CD's sectors, a folder's files.
Promises to open files for reading only, and to follow no link inside a folder. The first bytes
of a guest's raw disk are the guest's: what is over 1 GiB is never taken for a kernel, an
initrd or an ELF file, which are read whole.
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmdedup.errors import UsageError
from vmdedup.known import extfs, qcow2
from vmdedup.known.archives import is_cpio, members
from vmdedup.known.extfs import Extent
from vmdedup.known.kernel import elf_contents, is_bzimage, kernel_contents, unpacked
from vmdedup.known.pages import KnownPages, known_pages, page_digests
from vmdedup.known.qcow2 import Allowed
from vmdedup.linux.sparse_file import data_segments
from vmdedup.units import MIB, PAGE_BYTES

_HEAD_BYTES = 0x9000
_CD, _CD_AT = b"CD001", 0x8001
_SECTOR_BYTES = 2048
_MOST_FILE_BYTES = (1 << 63) - 1
"""What the kernel takes for a file's size, though no filesystem has one of that."""
_LEAST_BLOCK_BYTES = 1024
"""Least block of ext2, ext3 and ext4, which mke2fs takes for small filesystems."""
_PIECE_BYTES = 16 * MIB
_MOST_WHOLE_BYTES = 1024 * MIB
_PACKED = (b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18")


Parts = Iterator[tuple[str, NDArray[np.uint64]]]


def digested(source: str, allowed: Allowed = str) -> KnownPages:
    """The pages of a file or folder. Raises UsageError.

    `allowed`: judges the further files that an image names; any may be read without.
    """
    path = Path(source)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return known_pages(source, "folder", _folder(path))
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(f"known file {source}: neither a file nor a folder")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            is_small = file.seek(0, os.SEEK_END) <= _MOST_WHOLE_BYTES
        if head.startswith(qcow2.MAGIC):
            return known_pages(source, "disk image", _qcow2(source, allowed))
        for kind, fits, read in [*_KINDS, *(_WHOLE_KINDS if is_small else ())]:
            if fits(head):
                return known_pages(source, kind, read(path))
        return known_pages(source, "disk image", _disk(path))
    except OSError as error:
        raise UsageError(f"known file {source}: {error.strerror or error}") from error


def _kernel(path: Path) -> Parts:
    for part, content in kernel_contents(str(path), path.read_bytes()):
        yield part, page_digests(content)


def _elf(path: Path) -> Parts:
    data = path.read_bytes()
    try:
        found = [(part, page_digests(content)) for part, content in elf_contents(data)]
    except (ValueError, struct.error):
        found = [("file", page_digests(data))]
    yield from found


def _initrd(path: Path) -> Parts:
    """The members; of a packed file that is no initrd only its bytes."""
    data = path.read_bytes()
    try:
        found = [(name, page_digests(content)) for name, content in members(data)]
        # The loader has put it at a page boundary, and its memory is free again since.
        found.append(("initrd, unpacked", page_digests(unpacked(data))))
    except ValueError:
        found = []
    yield from found
    yield "packed file", page_digests(data)


def _blocks(path: Path, part: str, step_bytes: int = PAGE_BYTES) -> Parts:
    """The pages of a file that begin at multiples of `step_bytes`; holes are left out."""
    with path.open("rb", buffering=0) as file:
        for low, high in _segments(file.fileno()):
            for at in range(low - low % PAGE_BYTES, high, _PIECE_BYTES):
                # The last page of a piece may begin in it, and end in the next one.
                end = min(at + _PIECE_BYTES, high)
                data = memoryview(_read(file.fileno(), at, end - at + PAGE_BYTES))
                for shift in range(0, PAGE_BYTES, step_bytes):
                    yield part, page_digests(data[shift : end - at + shift])


def _segments(fd: int) -> Iterable[tuple[int, int]]:
    """(begin, end) of what is no hole; a block device has none that the kernel would tell."""
    size_bytes = os.lseek(fd, 0, os.SEEK_END)
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return [(0, size_bytes)]
    return data_segments(fd, size_bytes)


def _read(fd: int, offset: int, length: int) -> bytes:
    """The bytes there, up to the end of the file."""
    parts = []
    while length > 0 and (piece := os.pread(fd, length, offset)):
        parts.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return b"".join(parts)


def _disk(path: Path) -> Parts:
    """The files that have names, then all else: a file begins at any block, of 1 KiB at least."""
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        for name, extents in extfs.files(fd, os.lseek(fd, 0, os.SEEK_END)):
            for piece in _pieces(fd, extents):
                yield name, page_digests(piece)
    yield from _blocks(path, "", _LEAST_BLOCK_BYTES)


def _pieces(fd: int, extents: Iterable[Extent]) -> Iterator[bytes]:
    """The pages of a file that an extent is in; what no extent has of them is zero."""
    piece, end = bytearray(), 0
    """Pages, and where the last of them ends in the file, so far as it is read."""
    for extent in extents:
        page = extent.file_offset - extent.file_offset % PAGE_BYTES
        if page > end:
            piece.extend(bytes(-len(piece) % PAGE_BYTES))
            end = page
        piece.extend(bytes(extent.file_offset - end))
        end = extent.file_offset + extent.length_bytes
        at, left = extent.image_offset, extent.length_bytes
        while left:
            length = min(left, _PIECE_BYTES)
            piece += _read(fd, at, length).ljust(length, b"\0")
            at, left = at + length, left - length
            whole = len(piece) - len(piece) % PAGE_BYTES
            if whole >= _PIECE_BYTES:
                yield bytes(piece[:whole])
                del piece[:whole]
    yield bytes(piece)


def _cd(path: Path) -> Parts:
    """A file begins at any sector."""
    yield from _blocks(path, "", _SECTOR_BYTES)


def _qcow2(path: str, allowed: Allowed) -> Parts:
    """The blocks that a guest would see, backing files included; by qemu-img."""
    layers = qcow2.layers(path, allowed)
    # Without a name: whatever ends this process, nothing is left behind.
    with tempfile.TemporaryFile(dir=os.environ.get("CACHE_DIRECTORY", "/var/tmp")) as raw:
        os.ftruncate(raw.fileno(), min(layers[0].size_bytes, _MOST_FILE_BYTES))
        target = f"/proc/self/fd/{raw.fileno()}"
        # -U: a VM may be using the image; it is opened for reading only.
        command = ["qemu-img", "convert", "-U", "-n", "--target-is-zero"]
        command += ["-O", "raw", qcow2.opened(layers), target]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, pass_fds=[raw.fileno()]
            )
        except FileNotFoundError as error:
            raise UsageError(f"known file {path}: qcow2 needs qemu-img (qemu-utils)") from error
        if done.returncode:
            reason = " ".join(done.stderr.split())
            raise UsageError(f"known file {path}: {reason}")
        yield from _disk(Path(target))


def _folder(top: Path) -> Parts:
    """Every regular file below a folder, by its path there; what cannot be read is left out."""
    for path in files_of(top):
        with suppress(OSError):
            if stat.S_ISREG(path.lstat().st_mode):
                yield from _blocks(path, str(path.relative_to(top)))


def files_of(source: Path) -> Iterator[Path]:
    """What is no folder below a folder, in order of the names; a file itself.

    Filesystems that are mounted below are left out: /proc and /sys below /, for instance.
    """
    if not source.is_dir():
        yield source
        return
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(it for it in folders if not Path(folder, it).is_mount())
        yield from (Path(folder, name) for name in sorted(names))


_Kinds = tuple[tuple[str, Callable[[bytes], bool], Callable[[Path], Parts]], ...]
"""Kinds of files by their first bytes, and how each is read; any other file is a disk image."""
_KINDS: _Kinds = (("CD image", lambda head: head[_CD_AT : _CD_AT + len(_CD)] == _CD, _cd),)
_WHOLE_KINDS: _Kinds = (
    ("kernel", is_bzimage, _kernel),
    ("ELF file", lambda head: head.startswith(b"\x7fELF"), _elf),
    ("initrd", lambda head: is_cpio(head) or head.startswith(_PACKED), _initrd),
)
