"""Which VMs have a content, and how many contents two VMs have in common, in SQL on DuckDB.

Owns the SQL, which runs here (`Embedded`) or on the workers of a cluster (`cluster`). Both give
the same numbers: a mark is counted where all its rows are, and counts of several places add up.
DuckDB spills to a folder of its own below the system's for temporary files.

    mark   (id, key, mark)   a content in the sample of a VM, under a key
    class  (vms, marks)      contents that exactly these VMs have, at least two
    pair   (one, other, marks)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vmdedup.errors import VmdedupError

try:
    import duckdb
    import pyarrow as pa
except ModuleNotFoundError as error:
    raise VmdedupError(f"comparing VMs needs {error.name}: pip install 'vmdedup[fleet]'") from error

_MARKS = """
    SELECT id, key, mark FROM (SELECT id, key, unnest(marks) AS mark FROM sketch)
    WHERE mark >> 60 >= $depth
"""
_CONTENTS = "SELECT id, count(*) AS contents FROM mark GROUP BY id"
_CLASSES = """
    SELECT vms, count(*) AS marks
    FROM (SELECT list(id ORDER BY id) AS vms FROM mark GROUP BY key, mark HAVING count(*) > 1)
    GROUP BY vms
"""
_PAIRS = """
    WITH member AS (
        SELECT number, marks, id
        FROM (SELECT number, marks, unnest(vms) AS id FROM class) SEMI JOIN compared USING (id)
    )
    SELECT a.id AS one, b.id AS other, sum(a.marks)::BIGINT AS marks
    FROM member a JOIN member b ON a.number = b.number AND a.id < b.id
    WHERE a.id % $parts = $part
    GROUP BY a.id, b.id
"""
_SUMMED_PAIRS = "SELECT one, other, sum(marks)::BIGINT AS marks FROM part GROUP BY one, other"

CONFIG: ContextVar[dict[str, Any] | None] = ContextVar("CONFIG", default=None)
"""What DuckDB may take; by default all cores, and 80% of memory."""

Int64s = npt.NDArray[np.int64]


class Part(NamedTuple):
    """A share of all pairs, by the first VM: so many at a time are in memory."""

    part: int = 0
    parts: int = 1


class GroupedMarks(Protocol):
    """The marks of all VMs, grouped. Columns and rows as above, in any order."""

    def contents(self) -> Any:
        """An Arrow table (id, contents): sampled contents of each VM that has some."""

    def classes(self) -> Any:
        """An Arrow table (vms, marks); the same VMs may come more than once."""

    def pairs(self, compared: Int64s, part: Part) -> Any:
        """An Arrow table (one, other, marks) of these VMs, each pair once."""


Grouper = Callable[[Any, int], GroupedMarks]
"""Of an Arrow table (id, key, marks), and the depth that marks of the coarsest rate have."""


class Embedded:
    """`GroupedMarks` by DuckDB in this process."""

    def __init__(self, sketches: Any, depth: int) -> None:
        """See `Grouper`."""
        marks = marks_of(sketches, depth)
        self._contents, self._classes = contents_of(marks), classes_of(marks)

    def contents(self) -> Any:
        return self._contents

    def classes(self) -> Any:
        return self._classes

    def pairs(self, compared: Int64s, part: Part) -> Any:
        return pairs_of(self._classes, compared, part)


@contextmanager
def database(**tables: Any) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory that sees these tables, and no file. Raises VmdedupError."""
    with tempfile.TemporaryDirectory(prefix="vmdedup-") as folder:
        config: dict[str, Any] = {"enable_external_access": "false", "temp_directory": folder}
        config |= CONFIG.get() or {}
        with duckdb.connect(config=config) as connection:
            # By default on where no file is run, and on stdout.
            connection.execute("SET enable_progress_bar = false")
            for name, table in tables.items():
                connection.register(name, table)
            try:
                yield connection
            except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
                raise VmdedupError(
                    "the sketches do not fit into memory: take a coarser --rate, fewer hosts, or"
                    f" --scheduler: {' '.join(str(error).split())[:200]}"
                ) from error


def marks_of(sketches: Any, depth: int) -> Any:
    """The Arrow table (id, key, mark) of sketches."""
    with database(sketch=sketches) as connection:
        return connection.sql(_MARKS, params={"depth": depth}).to_arrow_table()


def contents_of(marks: Any) -> Any:
    """See `GroupedMarks.contents`."""
    with database(mark=marks) as connection:
        return connection.sql(_CONTENTS).to_arrow_table()


def classes_of(marks: Any) -> Any:
    """See `GroupedMarks.classes`."""
    with database(mark=marks) as connection:
        return connection.sql(_CLASSES).to_arrow_table()


def pairs_of(classes: Any, compared: Int64s, part: Part) -> Any:
    """See `GroupedMarks.pairs`."""
    numbered = classes.append_column("number", pa.array(np.arange(len(classes))))
    with database(**{"class": numbered, "compared": pa.table({"id": compared})}) as connection:
        return connection.sql(_PAIRS, params=part._asdict()).to_arrow_table()


def summed_pairs(tables: Sequence[Any]) -> Any:
    """Pairs of several places, each pair once."""
    with database(part=pa.concat_tables(tables)) as connection:
        return connection.sql(_SUMMED_PAIRS).to_arrow_table()
