"""The history's file, for any reader with access, with or without a daemon.

Promises to change nothing: a damaged file is an error here, and stays where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from vmdedup.history.database import Database
from vmdedup.history.keeper import read_history
from vmdedup.history.place import HistoryError
from vmdedup.models import History

_Result = TypeVar("_Result")


class Histories(NamedTuple):
    """The history of all VMs together, and of each by its name."""

    together: History
    vms: dict[str, History]


def read_offline(
    path: Path, since_s: float, max_points: int, interval_s: float, vm: str | None = None
) -> History | None:
    """The samples of the last `since_s` seconds; `None` without a file. Raises HistoryError."""

    def read(database: Database, span: tuple[float, float]) -> History:
        return read_history(database, interval_s, span, max_points, vm=vm)

    return _read(path, since_s, read)


def read_each_offline(
    path: Path, since_s: float, max_points: int, interval_s: float
) -> Histories | None:
    """The same, also of each VM that has a sample then. Raises HistoryError."""

    def read(database: Database, span: tuple[float, float]) -> Histories:
        return Histories(
            read_history(database, interval_s, span, max_points),
            {
                name: read_history(database, interval_s, span, max_points, vm=name)
                for name in database.vm_names(*span)
            },
        )

    return _read(path, since_s, read)


def _read(
    path: Path, since_s: float, read: Callable[[Database, tuple[float, float]], _Result]
) -> _Result | None:
    """What `read` reads of the last `since_s` seconds; `None` without a file."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror}") from error
    now = time.time()
    with Database(path, 0, read_only=True) as database:
        return read(database, (now - since_s, now))
