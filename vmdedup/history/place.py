"""The state directory: its place, and its one holder.

Owns the default path and `history.lock`. Promises that one process at a time
writes there, and that the lock goes with its holder. Refuses a directory that
others may write: a link put there could make root write elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmdedup.errors import VmdedupError

FILE_NAME = "history.db"
_LOCK_NAME = "history.lock"


class HistoryError(VmdedupError):
    """The history cannot be written or read now; nothing else depends on it."""


@dataclass(frozen=True)
class HistoryPlan:
    """Where and how the history is kept."""

    directory: Path
    interval_s: int
    days: int
    """Days of history kept on disk; `0` keeps none there."""


def default_directory() -> Path:
    """`/var/lib/vmdedup`; for another user than root, a directory of that user's."""
    if os.geteuid() == 0:
        return Path("/var/lib/vmdedup")
    given = os.environ.get("XDG_STATE_HOME", "")
    state = Path(given) if given.startswith("/") else Path.home() / ".local" / "state"
    return state / "vmdedup"


def hold(directory: Path) -> int:
    """Make the directory and lock it; the lock's descriptor. Raises HistoryError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise HistoryError(f"state directory {directory} is not a directory: remove it")
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise HistoryError(f"state directory {directory} is not ours alone: chmod 700 it")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock_fd = os.open(directory / _LOCK_NAME, flags, 0o600)
    except OSError as error:
        raise HistoryError(
            f"state directory {directory}: {error.strerror}; set VMDEDUP_STATE_DIR"
        ) from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_fd)
        raise HistoryError(
            f"another vmdedup keeps its history in {directory}: set VMDEDUP_STATE_DIR"
        ) from error
    return lock_fd


def move_aside(path: Path) -> Path:
    """Rename a damaged database and its side files; returns the new path. Raises HistoryError.

    An older one that was moved aside is replaced: they must not fill the disk.
    """
    aside = path.with_name(f"{path.name}.damaged")
    try:
        for ending in ("-wal", "-shm"):
            aside.with_name(aside.name + ending).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                path.with_name(path.name + ending).replace(aside.with_name(aside.name + ending))
        path.replace(aside)
    except OSError as error:
        raise HistoryError(
            f"{path} is damaged and cannot be moved aside: {error.strerror}"
        ) from error
    return aside
