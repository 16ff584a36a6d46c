"""The history's SQLite file.

Owns the schema: `fine` has every sample of about a day, `coarse` one row for five
minutes. `vm_fine` and `vm_coarse` are the same for each VM; all VMs share their rows, so
that many VMs have a shorter past, and not a bigger file. All are bounded by their number of
rows, oldest entry first, and not by age: a clock that jumps must neither delete the past nor
let the file grow. A sample, those of its VMs, their shares in coarse rows, and the rows that
they displace are one transaction.

Uses a write-ahead log for three reasons. A commit waits for no disk (only a checkpoint, at
a mebibyte, does). A reader never delays the writer. The next process that opens the file
replays whatever a kill leaves. A power cut may cost the newest samples, not the file.

Promises a DamagedError for a file that is no such database, and a HistoryError, which
leaves the file unchanged, for every other failure.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from vmdedup.closing import Closing
from vmdedup.history.place import HistoryError
from vmdedup.history.series import COLUMNS, LEVELS, PEAKS, Row

FINE_ROWS = 5760
"""Most fine rows: a day of samples 15 seconds apart."""
BUCKET_S = 300
"""Time that one coarse row covers."""

VM_FINE_ROWS = 40_000
"""Most fine rows of all VMs: 40 hours of four VMs, or four of 40."""
VM_COARSE_ROWS = 80_000
"""Most coarse rows of all VMs: 69 days of four VMs, or one week of 40."""

_NEVER_UNIX_S = 1e15
_VERSION = 2
_OURS = 0x766D6464
"""`PRAGMA application_id`: "vmdd"."""
_BUSY_S = 1.0
_CACHE_KIB = 256
_LOG_PAGES = 256


class DamagedError(HistoryError):
    """The file is no database of ours, or not a whole one any more."""


class Database(Closing):
    """The open file. One thread at a time. Raises HistoryError, also in its calls."""

    def __init__(self, path: Path, days: int, *, read_only: bool = False) -> None:
        self._path = path
        self._coarse_rows = days * 86_400 // BUCKET_S
        with self._explained():
            self._connection = _connect(path, read_only)
        try:
            with self._explained():
                version = self._check()
                if not read_only:
                    self._prepare(version)
                elif not version:
                    raise HistoryError(f"{path} has no samples yet")
                self._expressions = _expressions(self._connection)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._connection.close()

    def append(self, rows: Iterable[Row], vms: Iterable[tuple[str, Row]] = ()) -> None:
        """Add samples, and samples of VMs by their names: all of them or none."""
        bounds = {"fine": FINE_ROWS, "coarse": self._coarse_rows}
        bounds |= {"vm_fine": VM_FINE_ROWS, "vm_coarse": VM_COARSE_ROWS}
        with self._explained(), self._connection as connection:
            for row in rows:
                connection.execute(_APPEND, row)
                connection.execute(_JOIN, (math.floor(row[0] / BUCKET_S), *row))
            for vm, row in vms:
                connection.execute(_APPEND_VM, (vm, *row))
                connection.execute(_JOIN_VM, (vm, math.floor(row[0] / BUCKET_S), *row))
            for table, most in bounds.items():
                newest = f"(SELECT max(id) FROM {table})"
                connection.execute(f"DELETE FROM {table} WHERE id <= {newest} - ?", (most,))

    def tier(self, since_unix_s: float, vm: str | None = None) -> str:
        """The table with more about the time since then: fine, unless it begins too late."""
        fine, coarse = ("fine", "coarse") if vm is None else ("vm_fine", "vm_coarse")
        of_vm = "" if vm is None else " AND vm = :vm"
        with self._explained():
            if fine not in self._expressions:
                return fine
            # A VM that has left for long has no fine row any more.
            first_fine = f"SELECT coalesce(min(unix_s), {_NEVER_UNIX_S}) FROM {fine} WHERE 1{of_vm}"
            (begins,) = self._one(first_fine, {"vm": vm})
            if begins <= since_unix_s:
                return fine
            query = f"SELECT count(*) FROM {coarse} WHERE bucket >= :first AND bucket < :end"
            first, end = math.floor(since_unix_s / BUCKET_S), math.floor(begins / BUCKET_S)
            (earlier,) = self._one(query + of_vm, {"first": first, "end": end, "vm": vm})
        return coarse if earlier else fine

    def vm_names(self, since_unix_s: float, until_unix_s: float) -> list[str]:
        """The VMs that have a sample in that time span, in order of their names."""
        limits, names = _limits(since_unix_s, until_unix_s, None), set[str]()
        with self._explained():
            for tier in _TIERS:
                if f"vm_{tier}" in self._expressions:
                    query = f"SELECT DISTINCT vm FROM vm_{tier} WHERE {_WITHIN[tier]}"
                    names |= {str(name) for (name,) in self._connection.execute(query, limits)}
        return sorted(names)

    def count(
        self, tier: str, since_unix_s: float, until_unix_s: float, vm: str | None = None
    ) -> int:
        """Number of rows that `rows` would give."""
        if tier not in self._expressions:
            return 0
        with self._explained():
            query = f"SELECT count(*) FROM {tier} WHERE {_WITHIN[tier]}"
            (number,) = self._one(query, _limits(since_unix_s, until_unix_s, vm))
        return int(number)

    def rows(
        self, tier: str, since_unix_s: float, until_unix_s: float, vm: str | None = None
    ) -> Generator[Row, None, None]:
        """The rows of that time span, in order of time; of one VM in a tier of VMs.

        A file that an older vmdedup wrote has none of VMs, and unknown figures.
        """
        if tier not in self._expressions:
            return
        query = f"SELECT {self._expressions[tier]} FROM {tier} WHERE {_WITHIN[tier]}"
        query += f" ORDER BY {_ORDER[tier]}"
        with self._explained():
            found = self._connection.execute(query, _limits(since_unix_s, until_unix_s, vm))
            with closing(found):
                yield from found

    def _one(self, query: str, values: Mapping[str, object] | None = None) -> Row:
        row: Row = self._connection.execute(query, values or {}).fetchone()
        return row

    def _check(self) -> int:
        """The version of its tables; `0` for an empty file. Raises DamagedError for any other."""
        (application,) = self._one("PRAGMA application_id")
        (version,) = self._one("PRAGMA user_version")
        (things,) = self._one("SELECT count(*) FROM sqlite_master")
        if things and application != _OURS:
            raise DamagedError(f"{self._path} is no history of vmdedup")
        if version > _VERSION:
            raise HistoryError(f"{self._path} is of a newer vmdedup: it is left alone")
        (verdict,) = self._one("PRAGMA quick_check(1)")
        if verdict != "ok":
            raise DamagedError(f"{self._path}: {' '.join(str(verdict).split())}")
        return int(version) if things else 0

    def _prepare(self, version: int) -> None:
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_PAGES * 4096}")
        if version == _VERSION:
            return
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id = {_OURS}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            for statement in _FROM_VERSION_1 if version else _SCHEMA:
                connection.execute(statement)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise SQLite's errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise DamagedError(f"{self._path}: {error}") from error
            raise HistoryError(f"{self._path}: {error}") from error
        except OSError as error:
            raise HistoryError(f"{self._path}: {error.strerror}") from error


def _connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """The connection; only the owner can read a new file, and therefore its log."""
    if not read_only:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    mode = "rw"
    if read_only:
        # Without write access, SQLite cannot make the file by which readers of a
        # write-ahead log coordinate. Without a log there is nothing to coordinate.
        log = path.with_name(f"{path.name}-wal")
        whole = not log.exists() or log.stat().st_size == 0
        mode = "ro&immutable=1" if whole and not os.access(path.parent, os.W_OK) else "ro"
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}",
        uri=True,
        timeout=_BUSY_S,
        check_same_thread=False,
    )


def _limits(since_unix_s: float, until_unix_s: float, vm: str | None) -> dict[str, object]:
    return {"since": since_unix_s, "until": until_unix_s, "vm": vm}


def _expressions(connection: sqlite3.Connection) -> dict[str, str]:
    """What to select of each table that there is: NULL where it lacks a figure."""
    found = {}
    for table in _WITHIN:
        there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        if there:
            found[table] = ", ".join(name if name in there else "NULL" for name in COLUMNS)
    return found


# Coarse rows have an index of their buckets, which are in order of time.
_TIERS = ("fine", "coarse")
_WITHIN = {
    "fine": "unix_s BETWEEN :since AND :until",
    "coarse": f"bucket BETWEEN :since / {BUCKET_S} - 1 AND :until / {BUCKET_S}"
    " AND unix_s BETWEEN :since AND :until",
}
_WITHIN |= {f"vm_{tier}": f"vm = :vm AND {within}" for tier, within in _WITHIN.items()}
_ORDER = {"fine": "unix_s, id", "coarse": "bucket"}
_ORDER |= {f"vm_{tier}": order for tier, order in _ORDER.items()}
_SINCE_2 = ("cow_broken_pages", "unique_pages")
"""Figures that files of version 1 lack."""
_FIGURES = ", ".join(f"{name} REAL" for name in (*LEVELS, *PEAKS))
_VM_SCHEMA = (
    f"CREATE TABLE vm_fine (id INTEGER PRIMARY KEY, vm TEXT NOT NULL, unix_s REAL NOT NULL,"
    f" {_FIGURES})",
    "CREATE INDEX vm_fine_time ON vm_fine (vm, unix_s)",
    "CREATE TABLE vm_coarse (id INTEGER PRIMARY KEY, vm TEXT NOT NULL, bucket INTEGER NOT NULL,"
    f" samples INTEGER NOT NULL, unix_s REAL NOT NULL, {_FIGURES}, UNIQUE (vm, bucket))",
)
_SCHEMA = (
    f"CREATE TABLE fine (id INTEGER PRIMARY KEY, unix_s REAL NOT NULL, {_FIGURES})",
    "CREATE TABLE coarse (id INTEGER PRIMARY KEY, bucket INTEGER UNIQUE NOT NULL,"
    f" samples INTEGER NOT NULL, unix_s REAL NOT NULL, {_FIGURES})",
    *_VM_SCHEMA,
)
_FROM_VERSION_1 = (
    *(f"ALTER TABLE {tier} ADD COLUMN {name} REAL" for tier in _TIERS for name in _SINCE_2),
    *_VM_SCHEMA,
)


def _append(table: str, *keys: str) -> str:
    names = (*keys, *COLUMNS)
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' for _ in names)})"


def _join(table: str, *keys: str) -> str:
    """Add a sample to its coarse row, as `series.joined` would; NULL is unknown."""
    names = ", ".join((*keys, *COLUMNS))
    values = ", ".join("?" for _ in (*keys, *COLUMNS))
    changes = ["samples = samples + 1"]
    for name in ("unix_s", *LEVELS):
        joined = f"({name} * samples + excluded.{name}) / (samples + 1)"
        changes.append(f"{name} = coalesce({joined}, {name}, excluded.{name})")
    for name in PEAKS:
        joined = f"max({name}, excluded.{name})"
        changes.append(f"{name} = coalesce({joined}, {name}, excluded.{name})")
    return (
        f"INSERT INTO {table} (samples, {names}) VALUES (1, {values})"
        f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {', '.join(changes)}"
    )


_APPEND, _APPEND_VM = _append("fine"), _append("vm_fine", "vm")
_JOIN, _JOIN_VM = _join("coarse", "bucket"), _join("vm_coarse", "vm", "bucket")
