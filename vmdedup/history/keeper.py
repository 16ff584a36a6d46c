"""The history, kept through failures of its file.

Owns the open file, its lock, and the samples that are not in it yet. Promises to keep
samples that cannot be written now for later (the newest UNSAVED_SAMPLES), and to move a
damaged file aside and begin a new one. While anything is wrong, `problem` says so in one
line. Refuses nothing: a history that cannot be on disk exists as far as memory has it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from heapq import merge
from itertools import islice
from typing import NamedTuple, TypeVar

from vmdedup.closing import Closing
from vmdedup.history.database import BUCKET_S, DamagedError, Database
from vmdedup.history.place import FILE_NAME, HistoryError, HistoryPlan, hold, move_aside
from vmdedup.history.series import Row, model_of, row_of, thinned, width_s
from vmdedup.models import History, HistorySample

_Result = TypeVar("_Result")

UNSAVED_SAMPLES = 960
"""Most samples kept in memory for later: four hours of samples 15 seconds apart."""


class _Noted(NamedTuple):
    """One time's sample, and those of its VMs by name."""

    row: Row
    vms: Mapping[str, Row]


class Keeper(Closing):
    """The history of one daemon. One thread at a time."""

    def __init__(self, plan: HistoryPlan) -> None:
        self.problem: str | None = None
        """Why samples are not on disk, if they should be."""
        self.moved_aside: str | None = None
        """Where a damaged file is now and what was wrong with it, if there was one."""
        self._plan = plan
        self._path = plan.directory / FILE_NAME
        self._lock_fd = -1
        self._database: Database | None = None
        self._file: tuple[int, int] | None = None
        self._unsaved: deque[_Noted] = deque(maxlen=UNSAVED_SAMPLES)

    @property
    def unsaved(self) -> int:
        """How many samples are in memory alone."""
        return len(self._unsaved)

    def close(self) -> None:
        """Close the file and release the lock. Idempotent."""
        self._close_file()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def note(self, sample: HistorySample, vms: Mapping[str, HistorySample] | None = None) -> None:
        """Add a sample and its VMs' by name, and write all samples that are not written yet."""
        rows = {name: row_of(each) for name, each in (vms or {}).items()}
        self._unsaved.append(_Noted(row_of(sample), rows))
        if self._plan.days == 0:
            return
        try:
            self._with_file(self._save)
        except HistoryError as error:
            self.problem = str(error)
            # The connection's state after a failure is not known; the next one is new.
            self._close_file()
        else:
            self.problem = None

    def read(
        self, since_unix_s: float, until_unix_s: float, max_points: int, vm: str | None = None
    ) -> History:
        """The samples of that time span, evenly averaged into at most `max_points`.

        Of all VMs together, or of one.
        """
        span = since_unix_s, until_unix_s
        rows = [each.row if vm is None else each.vms.get(vm) for each in self._unsaved]
        unsaved = [row for row in rows if row and since_unix_s <= row[0] <= until_unix_s]

        def read(database: Database | None) -> History:
            interval_s = self._plan.interval_s
            return read_history(database, interval_s, span, max_points, unsaved, vm)

        if self._plan.days == 0:
            return read(None)
        try:
            return self._with_file(read)
        except HistoryError as error:
            self.problem = str(error)
            self._close_file()
        return read(None)

    def _save(self, database: Database) -> None:
        vms = [named for each in self._unsaved for named in each.vms.items()]
        database.append([each.row for each in self._unsaved], vms)
        self._unsaved.clear()

    def _with_file(self, do: Callable[[Database], _Result]) -> _Result:
        """The result of `do`, with a new file if the old one turns out to be damaged."""
        try:
            return do(self._opened())
        except DamagedError as error:
            self._close_file()
            aside = move_aside(self._path)
            self.moved_aside = f"{error}; vmdedup renamed it to {aside} and begins a new one"
            return do(self._opened())

    def _opened(self) -> Database:
        """The file, opened again if it is not the one at its path any more."""
        if self._lock_fd < 0:
            self._lock_fd = hold(self._plan.directory)
        if self._database is not None and self._file != self._there():
            self._close_file()
        if self._database is None:
            self._database = Database(self._path, self._plan.days)
            self._file = self._there()
        return self._database

    def _there(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _close_file(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


def read_history(
    database: Database | None,
    interval_s: float,
    span: tuple[float, float],
    max_points: int,
    unsaved: Sequence[Row] = (),
    vm: str | None = None,
) -> History:
    """Samples of `span` from the file, joined with `unsaved`. Raises HistoryError."""
    since_unix_s, until_unix_s = span
    saved: Generator[Row, None, None] | None = None
    number = len(unsaved)
    if database is not None:
        tier = database.tier(since_unix_s, vm)
        number += database.count(tier, *span, vm)
        saved = database.rows(tier, *span, vm)
        if tier.endswith("coarse"):
            interval_s = max(interval_s, BUCKET_S)
    rows: Iterator[Row] = merge(saved or (), sorted(unsaved, key=_time), key=_time)
    if number > max_points:
        slot_s = width_s(until_unix_s - since_unix_s, max_points)
        rows = thinned(rows, slot_s)
        interval_s = max(interval_s, min(slot_s, until_unix_s - since_unix_s))
    with closing(saved) if saved is not None else nullcontext():
        try:
            samples = [model_of(row) for row in islice(rows, max_points)]
        except (ValueError, TypeError, OverflowError) as error:
            raise DamagedError("it holds a row that is no sample") from error
    return History(samples=samples, interval_s=interval_s, vm=vm)


def _time(row: Row) -> float:
    return float(row[0])
