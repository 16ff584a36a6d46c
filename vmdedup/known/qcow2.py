"""The layers of a qcow2 image: it, its backing file, that one's, and so on.

Owns the reading of their headers (QEMU's docs/interop/qcow2.txt), and what qemu-img is told to
open: each layer by its path, so that it follows no header itself. A guest can write a header
into its raw disk. Promises that each layer was allowed as the image was. Refuses a backing that
is no file, data in a further file, and chains without end.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from vmdedup.errors import UsageError

Allowed = Callable[[str], str]
"""The path to open for one that an image names. Raises UsageError."""

MAGIC = b"QFI\xfb"
_HEAD = struct.Struct(">4sIQIIQ")
"""Magic, version, where the backing's name is and its length, cluster size, bytes of the disk."""
_HEAD_BYTES, _FEATURES_AT, _LENGTH_AT = 104, 72, 100
_EXTERNAL_DATA = 1 << 2
_BACKING_FORMAT = 0xE2792ACA
_MOST_NAME_BYTES, _MOST_LAYERS, _MOST_EXTENSIONS = 1023, 64, 64


@dataclass(frozen=True)
class Layer:
    """One file of an image."""

    path: str
    size_bytes: int
    """What a guest would see; 0 for a raw layer, which is never the image itself."""
    is_qcow2: bool


def layers(path: str, allowed: Allowed) -> list[Layer]:
    """The image first. Raises UsageError, OSError."""
    found: list[Layer] = []
    form: str | None = "qcow2"
    next_path: str | None = path
    while next_path is not None:
        if len(found) == _MOST_LAYERS:
            raise UsageError(f"known file {path}: over {_MOST_LAYERS} backing files")
        here = next_path
        if not stat.S_ISREG(mode := os.stat(here).st_mode) and not stat.S_ISBLK(mode):
            raise UsageError(f"known file {path}: its backing {here} is no file")
        with open(here, "rb") as file:
            head = file.read(_HEAD_BYTES).ljust(_HEAD_BYTES, b"\0")
            magic, version, at, length, _, size_bytes = _HEAD.unpack_from(head)
            if form == "raw" or (form is None and magic != MAGIC):
                return [*found, Layer(here, 0, is_qcow2=False)]
            if form not in (None, "qcow2") or magic != MAGIC:
                raise UsageError(f"known file {path}: {here} is neither qcow2 nor raw")
            (features,) = struct.unpack_from(">Q", head, _FEATURES_AT)
            if version >= 3 and features & _EXTERNAL_DATA:
                raise UsageError(f"known file {path}: the data of {here} is in another file")
            found.append(Layer(here, size_bytes, is_qcow2=True))
            next_path = _backing(path, here, _read(file, at, min(length, _MOST_NAME_BYTES)))
            (first,) = struct.unpack_from(">I", head, _LENGTH_AT) if version >= 3 else (72,)
            form = _backing_format(file, first)
        if next_path is not None:
            next_path = allowed(next_path)
    return found


def opened(found: list[Layer]) -> str:
    """What qemu-img opens for these layers."""
    node: dict[str, Any] | None = None
    for layer in reversed(found):
        is_device = stat.S_ISBLK(os.stat(layer.path).st_mode)
        driver = "host_device" if is_device else "file"
        file = {"driver": driver, "filename": layer.path}
        if layer.is_qcow2:
            node = {"driver": "qcow2", "file": file, "backing": node}
        else:
            node = {"driver": "raw", "file": file}
    return f"json:{json.dumps(node)}"


def _backing(image: str, here: str, name: bytes) -> str | None:
    """The path of the backing file; `None` without one."""
    if not name:
        return None
    try:
        backing = name.decode()
    except UnicodeDecodeError:
        backing = ":"
    if re.match(r"[\w.+-]*:", backing) or "\0" in backing:
        raise UsageError(f"known file {image}: its backing is no file")
    return os.path.join(os.path.dirname(here), backing)


def _backing_format(file: BinaryIO, at: int) -> str | None:
    """What the extensions of the header, which begin there, say of the backing file."""
    for _ in range(_MOST_EXTENSIONS):
        kind, length = struct.unpack(">II", _read(file, at, 8).ljust(8, b"\0"))
        if kind == _BACKING_FORMAT:
            return _read(file, at + 8, min(length, 16)).decode(errors="replace")
        if not kind:
            break
        at += 8 + -(-length // 8) * 8
    return None


def _read(file: BinaryIO, at: int, length: int) -> bytes:
    file.seek(min(at, 1 << 40))
    return file.read(length)
