"""What an initrd unpacks to: the members of its cpio archives.

Owns the format newc (Documentation/driver-api/early-userspace/buffer-format.rst): several
archives one after the other, each packed or not, with zeroes between them. A guest has each
member page by page, from its first byte on. A guest may have written the file: no part of it is
read twice, and nothing is unpacked from what was packed.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator

from vmdedup.known.kernel import unpacked

_MAGICS = (b"070701", b"070702")
_HEAD_BYTES = 110
_NUMBERS = re.compile(rb"[0-9A-Fa-f]{104}")
_ZEROES = re.compile(rb"\0+")
_LAST = "TRAILER!!!"
_REGULAR = 0o100000
_FORMAT = 0o170000


def is_cpio(data: bytes) -> bool:
    """Whether an archive begins here."""
    return data[:6] in _MAGICS


def members(data: bytes, *, was_packed: bool = False) -> Iterator[tuple[str, memoryview]]:
    """Name and content of every regular file in all archives. Raises ValueError."""
    rest = memoryview(data)
    while rest:
        if bytes(rest[:6]) in _MAGICS:
            rest = yield from _archive(rest)
        elif zeroes := _ZEROES.match(rest):
            rest = rest[zeroes.end() :]
        else:
            plain = b"" if was_packed else unpacked(bytes(rest))
            if not is_cpio(plain):
                raise ValueError("there is no cpio archive inside")
            yield from members(plain, was_packed=True)
            return


def _archive(data: memoryview) -> Generator[tuple[str, memoryview], None, memoryview]:
    """The members of one archive; returns what follows it."""
    at = 0
    while True:
        head = bytes(data[at : at + _HEAD_BYTES])
        if head[:6] not in _MAGICS or not _NUMBERS.fullmatch(head, 6):
            raise ValueError(f"a cpio member's header is broken at byte {at}")
        mode, size_bytes, name_bytes = (int(head[i : i + 8], 16) for i in (14, 54, 94))
        name = bytes(data[at + _HEAD_BYTES : at + _HEAD_BYTES + name_bytes - 1]).decode(
            errors="replace"
        )
        begin = _aligned(at + _HEAD_BYTES + name_bytes)
        at = _aligned(begin + size_bytes)
        if name == _LAST:
            return data[at:]
        if mode & _FORMAT == _REGULAR and size_bytes:
            yield name, data[begin : begin + size_bytes]


def _aligned(offset: int) -> int:
    return -(-offset // 4) * 4
