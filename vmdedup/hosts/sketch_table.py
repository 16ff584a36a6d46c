"""Sketches as an Arrow table, in Parquet files, and what VMs have in common.

Owns the table's columns. Promises that VMs are compared only under one key, so of one trust
domain, and at the coarsest rate of them all. Refuses a file that is no table of sketches.

    host, vm, trust_domain, key_id   text
    rate, ram_bytes, present_bytes   numbers
    marks, pages                     lists: `core.sketch.Sketch`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vmdedup.errors import UsageError
from vmdedup.hosts.ask import SketchedVm
from vmdedup.hosts.grouping import Embedded, Grouper, Int64s, Part, database
from vmdedup.units import FINEST_RATE, RATES

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


_ALL_PAIRS = Part()


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
        table = pq.read_table(path, schema=_SCHEMA)
        _require_sense(table)
    except (OSError, ValueError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not a table of sketches: {why}") from error
    return table


def _require_sense(table: Any) -> None:
    """Raises ValueError for what no sketch has; something else may have written the file."""
    for name in table.column_names:
        if table[name].null_count:
            raise ValueError(f"{name} is missing, at least once")
    for rate in pc.unique(table["rate"]).to_pylist():
        if rate not in RATES:
            raise ValueError(f"rate {rate} is no power of two that a sketch has")
    for chunk in table["marks"].chunks:
        mark = chunk.flatten()
        ends = np.cumsum(pc.list_value_length(chunk).to_numpy())
        rises = mark.to_numpy(zero_copy_only=False)
        rises = rises[1:] > rises[:-1]
        rises[ends[(ends > 0) & (ends < len(mark))] - 1] = True  # from one VM to the next
        if mark.null_count or not rises.all():
            raise ValueError("marks out of order")


class SketchTable:
    """The sketches of VMs, grouped. `rate` is the one that all are compared at."""

    def __init__(self, table: Any, group: Grouper | None = None) -> None:
        """`group`: what groups the marks, `Embedded` by default."""
        self.hosts: list[str] = table["host"].to_pylist()
        self.vms: list[str] = table["vm"].to_pylist()
        self.domains: list[str] = table["trust_domain"].to_pylist()
        self.ram_bytes = np.array(table["ram_bytes"].to_pylist(), dtype=np.int64)
        self.present_bytes = np.array(table["present_bytes"].to_pylist(), dtype=np.int64)
        self.rate: int = max(table["rate"].to_pylist(), default=FINEST_RATE)
        sketches = pa.table(
            {
                "id": pa.array(range(len(table)), pa.int32()),
                "key": pc.rank(table["key_id"], tiebreaker="dense").cast(pa.int32()),
                "marks": table["marks"],
            }
        )
        self._groups = (group or Embedded)(
            sketches, self.rate.bit_length() - FINEST_RATE.bit_length()
        )

    def __len__(self) -> int:
        return len(self.vms)

    @cached_property
    def contents(self) -> Int64s:
        """Sampled contents of each VM."""
        found = np.zeros(len(self), dtype=np.int64)
        rows = self._groups.contents()
        found[rows["id"].to_numpy()] = rows["contents"].to_numpy()
        return found

    @cached_property
    def classes(self) -> Classes:
        """The contents that several VMs have."""
        with database(part=self._groups.classes()) as connection:
            found = connection.sql(
                "SELECT vms, sum(marks)::BIGINT AS marks FROM part GROUP BY vms ORDER BY vms"
            ).to_arrow_table()
        marks = found["marks"].to_numpy()
        if not len(marks):
            nothing = np.empty(0, dtype=np.int64)
            return Classes(nothing, np.zeros(1, dtype=np.int64), nothing)
        lists = found["vms"].combine_chunks()
        offsets = lists.offsets.to_numpy().astype(np.int64)
        members = lists.values.to_numpy().astype(np.int64)
        return Classes(marks, offsets - offsets[0], members[offsets[0] : offsets[-1]])

    def pairs(self, compared: Int64s, part: Part = _ALL_PAIRS) -> tuple[Int64s, Int64s, Int64s]:
        """A part of the pairs of these VMs, the first has the lower row, and how many sampled
        contents both have. Pairs that share nothing are left out. Raises VmdedupError."""
        found = self._groups.pairs(compared, part)
        one, other, marks = (
            found[name].to_numpy().astype(np.int64) for name in ("one", "other", "marks")
        )
        return one, other, marks

    def on_hosts(self, vm: int) -> dict[str, int]:
        """Sampled contents of this VM that any VM of each host has; the VM's own host too."""
        classes = self.classes
        found: dict[str, int] = {self.hosts[vm]: int(self.contents[vm])}
        for c in classes.of_member[classes.vms == vm].tolist():
            members = classes.vms[classes.first[c] : classes.first[c + 1]]
            for host in {self.hosts[member] for member in members} - {self.hosts[vm]}:
                found[host] = found.get(host, 0) + int(classes.marks[c])
        return found
