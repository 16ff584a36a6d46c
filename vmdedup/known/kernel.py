"""The Linux kernel of a bzImage, as a boot loader leaves it and as it unpacks itself.

Owns the layout of a bzImage (Documentation/arch/x86/boot.rst) and of the ELF file inside. A
guest's memory has both: the packed kernel stays in memory that is free again. The running
kernel has changed some of its pages: relocations, alternatives, its own data.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from typing import Protocol

from vmdedup.errors import UsageError
from vmdedup.units import PAGE_BYTES

_HEADER_MAGIC, _HEADER_MAGIC_AT = b"HdrS", 0x202
_SETUP_SECTORS_AT, _VERSION_AT, _PAYLOAD_AT = 0x1F1, 0x206, 0x248
_WITH_PAYLOAD = 0x0208
"""First version of the boot protocol that tells where the payload is."""
_SECTOR_BYTES = 512
_LOAD = 1
"""PT_LOAD."""
_MOST_BYTES = 1 << 30


class _Stream(Protocol):
    """A decompressor of the standard library."""

    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def is_bzimage(head: bytes) -> bool:
    """Whether a file begins like a bzImage that tells where its payload is."""
    if head[_HEADER_MAGIC_AT : _HEADER_MAGIC_AT + 4] != _HEADER_MAGIC:
        return False
    return int.from_bytes(head[_VERSION_AT : _VERSION_AT + 2], "little") >= _WITH_PAYLOAD


def kernel_contents(path: str, image: bytes) -> Iterator[tuple[str, bytes]]:
    """(part, bytes from a page boundary on) of a bzImage. Raises UsageError."""
    setup = (image[_SETUP_SECTORS_AT] or 4) * _SECTOR_BYTES + _SECTOR_BYTES
    try:
        offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
        payload = image[setup + offset : setup + offset + length]
        vmlinux = unpacked(payload)
        yield from elf_contents(vmlinux)
    except (ValueError, struct.error) as error:
        raise UsageError(f"{path}: its kernel cannot be unpacked: {error}") from error
    yield "kernel, packed", image[setup:]


def elf_contents(vmlinux: bytes) -> Iterator[tuple[str, bytes]]:
    """The loaded segments of a 64-bit ELF file, and the file as it is. Raises ValueError."""
    if vmlinux[:5] != b"\x7fELF\x02":
        raise ValueError("there is no 64-bit ELF file inside")
    (table,) = struct.unpack_from("<Q", vmlinux, 32)
    (number,) = struct.unpack_from("<H", vmlinux, 56)
    left_bytes = len(vmlinux)
    for at in range(table, table + 56 * number, 56):
        kind, _, offset, _, start, size_bytes = struct.unpack("<IIQQQQ", vmlinux[at : at + 40])
        if kind == _LOAD and size_bytes:
            # The kernel's segments begin at page boundaries of physical memory.
            segment = vmlinux[offset : offset + size_bytes]
            left_bytes -= len(segment)
            if left_bytes < 0:
                raise ValueError("its segments are larger than the ELF file")
            yield "kernel, as loaded", bytes(start % PAGE_BYTES) + segment
    yield "kernel, unpacked file", vmlinux


def unpacked(data: bytes) -> bytes:
    """The data without its compression, which its first bytes name. Raises ValueError.

    What follows a compressed stream is left out: a kernel's size, padding.
    """
    if data.startswith(b"\x1f\x8b"):
        return _streamed(zlib.decompressobj(wbits=31), data)
    if data.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return _streamed(lzma.LZMADecompressor(memlimit=_MOST_BYTES), data)
    if data.startswith(b"BZh"):
        return _streamed(bz2.BZ2Decompressor(), data)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return _piped("zstd", data)
    if data.startswith((b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18")):
        return _piped("lz4", data)
    return data


def _streamed(stream: _Stream, data: bytes) -> bytes:
    try:
        plain = stream.decompress(data, _MOST_BYTES)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(str(error)) from error
    if not stream.eof:
        raise ValueError("its compressed stream ends early, or unpacks to over 1 GiB")
    return plain


def _piped(program: str, data: bytes) -> bytes:
    """Through a program that ends with an error at what follows the stream: that is no failure."""
    with tempfile.TemporaryFile() as packed, tempfile.TemporaryFile() as said:
        packed.write(data)
        packed.seek(0)
        try:
            process = subprocess.Popen(
                [program, "-dc"], stdin=packed, stdout=subprocess.PIPE, stderr=said
            )
        except FileNotFoundError as error:
            raise ValueError(f"it is packed with {program}, which is not installed") from error
        with process:
            assert process.stdout is not None
            plain = process.stdout.read(_MOST_BYTES + 1)
            if len(plain) > _MOST_BYTES:
                process.kill()
                raise ValueError("it unpacks to over 1 GiB")
        if not plain:
            said.seek(0)
            raise ValueError(f"{program}: {said.read().decode(errors='replace').strip()}")
        return plain
