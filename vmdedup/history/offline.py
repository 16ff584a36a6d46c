"""The history's file, for any reader with access, with or without a daemon.

Promises to change nothing: a damaged file is an error here, and stays where it is.
"""

from __future__ import annotations

import time
from pathlib import Path

from vmdedup.history.database import Database
from vmdedup.history.keeper import read_history
from vmdedup.history.place import HistoryError
from vmdedup.models import History


def read_offline(
    path: Path, since_s: float, max_points: int, interval_s: float, vm: str | None = None
) -> History | None:
    """The samples of the last `since_s` seconds; `None` without a file. Raises HistoryError."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror}") from error
    now = time.time()
    with Database(path, 0, read_only=True) as database:
        return read_history(database, interval_s, (now - since_s, now), max_points, vm=vm)
