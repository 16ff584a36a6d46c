"""The secret that hosts share so that sketches of their VMs can be compared.

Owns the file's rules. Promises never to show its content. Refuses a file that other users
may read or write, or that is too short to be secret.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vmdedup.errors import UsageError

_LEAST_BYTES, _MOST_BYTES = 16, 4096


def read_secret(path: Path) -> bytes:
    """The content of the secret file, without a line's end. Raises UsageError."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _unusable(path, "not a file")
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o077:
                raise _unusable(path, "not root's alone: chmod 600 it, and chown it to root")
            secret = file.read(_MOST_BYTES + 1).rstrip(b"\r\n")
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    if not _LEAST_BYTES <= len(secret) <= _MOST_BYTES:
        raise _unusable(
            path, f"it must have {_LEAST_BYTES} to {_MOST_BYTES} bytes: openssl rand -hex 32"
        )
    return secret


def _open_at_once(path: str, flags: int) -> int:
    """Open it; a pipe without a writer does not keep us waiting."""
    return os.open(path, flags | os.O_NONBLOCK)


def _unusable(path: Path, why: str) -> UsageError:
    return UsageError(f"setting sketch_secret: {path}: {why}")
