"""Sketches as an Arrow table, in Parquet files, and in DuckDB.

Owns the table's columns and the SQL that finds contents of several VMs. Promises that VMs are
compared only under one key, so of one trust domain, and at the coarsest rate of them all.
Refuses a file that is no table of sketches.

    host, vm, trust_domain, key_id   text
    rate, ram_bytes, present_bytes   numbers
    marks, pages                     lists: `core.sketch.Sketch`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vmdedup.errors import UsageError, VmdedupError
from vmdedup.hosts.ask import SketchedVm
from vmdedup.units import FINEST_RATE

try:
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise VmdedupError(f"comparing VMs needs {error.name}: pip install 'vmdedup[fleet]'") from error

_SCHEMA = pa.schema(
    [
        ("host", pa.string()),
        ("vm", pa.string()),
        ("trust_domain", pa.string()),
        ("key_id", pa.string()),
        ("rate", pa.int64()),
        ("ram_bytes", pa.int64()),
        ("present_bytes", pa.int64()),
        ("marks", pa.list_(pa.uint64())),
        ("pages", pa.list_(pa.uint32())),
    ]
)

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """The contents of several VMs, by which VMs have them.

    Class c is `marks[c]` sampled contents that exactly the VMs `vms[first[c]:first[c + 1]]` have,
    by their row in the table.
    """

    marks: Int64s
    first: Int64s
    vms: Int64s

    def __len__(self) -> int:
        return len(self.marks)

    @property
    def of_member(self) -> Int64s:
        """The class of each element of `vms`."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))


def as_table(vms: Sequence[SketchedVm]) -> Any:
    """The VMs as an Arrow table."""
    rows = [
        {
            "host": vm.host,
            "vm": vm.name,
            "trust_domain": vm.trust_domain,
            "key_id": vm.sketch.key_id,
            "rate": vm.sketch.rate,
            "ram_bytes": vm.ram_bytes,
            "present_bytes": vm.present_bytes,
            "marks": vm.sketch.mark,
            "pages": vm.sketch.pages,
        }
        for vm in vms
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def write_parquet(table: Any, path: Path) -> None:
    """Write the table. Raises UsageError."""
    try:
        pq.write_table(table, path, compression="zstd")
    except OSError as error:
        raise UsageError(f"{path}: {error}") from error


def read_parquet(path: Path) -> Any:
    """The table in a file. Raises UsageError."""
    try:
        return pq.read_table(path, schema=_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not a table of sketches: {why}") from error


class SketchTable:
    """The sketches of VMs in DuckDB. `rate` is the one that all are compared at."""

    def __init__(self, table: Any) -> None:
        self.hosts: list[str] = table["host"].to_pylist()
        self.vms: list[str] = table["vm"].to_pylist()
        self.domains: list[str] = table["trust_domain"].to_pylist()
        self.ram_bytes = np.array(table["ram_bytes"].to_pylist(), dtype=np.int64)
        self.present_bytes = np.array(table["present_bytes"].to_pylist(), dtype=np.int64)
        self.rate: int = max(table["rate"].to_pylist(), default=FINEST_RATE)
        self._duckdb = duckdb.connect(config={"enable_external_access": "false"})
        numbered = table.append_column("id", pa.array(range(len(table)), pa.int32()))
        self._duckdb.register("sketch", numbered)
        depth = self.rate.bit_length() - FINEST_RATE.bit_length()
        self._duckdb.execute(
            "CREATE TABLE mark AS SELECT * FROM"
            " (SELECT id, key_id, unnest(marks) AS mark FROM sketch) WHERE mark >> 60 >= ?",
            [depth],
        )

    def __len__(self) -> int:
        return len(self.vms)

    def contents(self) -> Int64s:
        """Sampled contents of each VM."""
        found = np.zeros(len(self), dtype=np.int64)
        rows = self._duckdb.sql("SELECT id, count(*) AS n FROM mark GROUP BY id").fetchnumpy()
        found[rows["id"]] = rows["n"]
        return found

    def classes(self) -> Classes:
        """The contents that several VMs have."""
        found = self._duckdb.sql(
            "SELECT vms, count(*) AS marks FROM"
            " (SELECT list(id ORDER BY id) AS vms FROM mark GROUP BY key_id, mark"
            " HAVING count(*) > 1) GROUP BY vms ORDER BY vms"
        ).to_arrow_table()
        lists = found["vms"].combine_chunks()
        marks = found["marks"].to_numpy().astype(np.int64)
        if not len(marks):
            nothing = np.empty(0, dtype=np.int64)
            return Classes(nothing, np.zeros(1, dtype=np.int64), nothing)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        members = lists.values.to_numpy().astype(np.int64)
        return Classes(marks, offsets - offsets[0], members[offsets[0] : offsets[-1]])

    def on_hosts(self, vm: int) -> dict[str, int]:
        """Sampled contents of this VM that any VM of each host has; the VM's own host too."""
        rows = self._duckdb.execute(
            "SELECT s.host, count(DISTINCT m.mark) FROM mark m JOIN sketch s ON s.id = m.id"
            " JOIN mark own ON own.mark = m.mark AND own.key_id = m.key_id"
            " WHERE own.id = ? GROUP BY s.host",
            [vm],
        ).fetchall()
        return dict(rows)
