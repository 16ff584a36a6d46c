"""Known files, each digested once: the digests are kept below the user's cache folder.

Owns the files there. A file is digested again once its size, its time of change or its inode
is another, or one of a backing file's; a folder once that of any file in it is; a block
device, which has no such sign, each time. Promises to do without the folder where it cannot
be written, and to believe no file there that is not whole.
"""

from __future__ import annotations

import json
import os
import zipfile
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np

from vmdedup.errors import UsageError
from vmdedup.known import extfs, qcow2
from vmdedup.known.contents import digested, files_of
from vmdedup.known.pages import KnownPages
from vmdedup.known.qcow2 import Allowed

_VERSION = 2
"""Changes whenever a file's pages would be others."""


def known_pages_of(source: str, allowed: Allowed = str) -> KnownPages:
    """The pages of a file or folder, from the cache if it is there. Raises UsageError.

    `allowed`: as for `digested`.
    """
    key = _key(source, allowed)
    if key is None:
        return digested(source, allowed)
    path = _folder() / f"{key}.npz"
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        return _loaded(source, path)
    found = digested(source, allowed)
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _save(found, path)
    return found


def _folder() -> Path:
    """In a unit its CacheDirectory, else XDG's cache folder."""
    if unit := os.environ.get("CACHE_DIRECTORY"):
        return Path(unit) / "known"
    given = os.environ.get("XDG_CACHE_HOME")
    return Path(given or Path.home() / ".cache") / "vmdedup" / "known"


def _key(source: str, allowed: Allowed) -> str | None:
    """What tells a source and its state from others; `None` for a block device."""
    has_names = extfs.program() is not None
    found = blake2b(f"{_VERSION} {has_names}".encode(), digest_size=16)
    try:
        top = Path(source).resolve(strict=True)
        if top.is_block_device():
            return None
        for path in [*files_of(top), *_backing_files(top, allowed)]:
            with suppress(FileNotFoundError):  # removed meanwhile
                state = path.lstat()
                identity = (str(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
                found.update(json.dumps(identity).encode())
    except OSError as error:
        raise UsageError(f"known file {source}: {error.strerror or error}") from error
    return found.hexdigest()


def _backing_files(top: Path, allowed: Allowed) -> list[Path]:
    if not top.is_file():
        return []
    with top.open("rb") as file:
        is_qcow2 = file.read(len(qcow2.MAGIC)) == qcow2.MAGIC
    layers = qcow2.layers(str(top), allowed) if is_qcow2 else []
    return [Path(layer.path).resolve() for layer in layers[1:]]


def _loaded(source: str, path: Path) -> KnownPages:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
        about = json.loads(bytes(kept["about"]))
        digest = kept["digest"].astype(np.uint64, casting="safe")
        part = kept["part"].astype(np.int32, casting="safe")
    if len(digest) != len(part) or (len(part) and int(part.max()) >= len(about["parts"])):
        raise ValueError("not whole")
    return KnownPages(source, about["kind"], tuple(about["parts"]), digest, part)


def _save(found: KnownPages, path: Path) -> None:
    about = json.dumps({"kind": found.kind, "parts": found.parts}).encode()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            np.savez(
                file,
                about=np.frombuffer(about, dtype=np.uint8),
                digest=found.digest,
                part=found.part,
            )
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
