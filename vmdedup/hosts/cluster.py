"""The grouping on an existing Dask cluster, for a fleet whose marks exceed one machine's memory.

Owns how marks are spread: sketches go out in slices, Dask shuffles their marks by mark, and each
partition is grouped by the SQL of `grouping` where it lies. Only classes, counts and pairs come
back. Promises that DuckDB takes no more of a worker than its share of threads and memory. The
workers need this package with its extra [fleet]. Refuses a cluster that does not answer, or
whose workers fail, in one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from vmdedup.errors import UsageError, VmdedupError
from vmdedup.hosts.grouping import (
    CONFIG,
    Grouper,
    Int64s,
    Part,
    classes_of,
    contents_of,
    marks_of,
    pairs_of,
    summed_pairs,
)

try:
    import dask
    import dask.dataframe as dd
    import distributed
    import pandas as pd
    import pyarrow as pa
except ModuleNotFoundError as error:
    raise VmdedupError(f"--scheduler needs {error.name}: pip install 'vmdedup[fleet]'") from error

_CONNECT_LIMIT_S = 20
_PART_OF_MEMORY = 0.6
"""Of a worker's limit, for DuckDB; Dask itself ends a worker at 95%."""
_SLICES_EACH = 4
"""Slices and partitions for each worker: what one of them groups at a time is a fourth."""


class OnCluster:
    """`GroupedMarks` by the workers of a Dask cluster."""

    def __init__(self, client: Any, sketches: Any, depth: int) -> None:
        """See `Grouper`. Raises VmdedupError."""
        self._client = client
        with _told():
            pieces = _slices(sketches, _SLICES_EACH * len(client.nthreads()))
            there = client.scatter(pieces, hash=False)
            marks = [dask.delayed(_marks)(piece, depth) for piece in there]
            with dask.config.set({"dataframe.convert-string": False}):
                frame = dd.from_delayed(marks, meta=_NO_MARKS, verify_meta=False)
                shuffled = frame.shuffle(on="mark", npartitions=len(pieces), shuffle_method="p2p")
                parts = shuffled.to_delayed()
            # Each VM's marks are in one slice, each mark's VMs in one partition.
            self._contents = client.compute([dask.delayed(_contents)(each) for each in marks])
            self._classes = client.compute([dask.delayed(_classes)(each) for each in parts])

    def contents(self) -> Any:
        return self._gathered(self._contents)

    def classes(self) -> Any:
        return self._gathered(self._classes)

    def pairs(self, compared: Int64s, part: Part) -> Any:
        with _told():
            found = self._client.map(_pairs, self._classes, compared=compared, part=part)
            return self._client.submit(_summed, found).result()

    def _gathered(self, tables: Any) -> Any:
        """The tables as one. Raises VmdedupError."""
        with _told():
            return pa.concat_tables(self._client.gather(tables))


@contextmanager
def _told() -> Iterator[None]:
    """Raise VmdedupError for whatever goes wrong there: exceptions of the workers come here."""
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise VmdedupError(f"the cluster failed, try again: {why}") from error


@contextmanager
def grouped_on(scheduler: str) -> Iterator[Grouper]:
    """What groups marks on the cluster of this scheduler. Raises UsageError."""
    try:
        client = distributed.Client(
            scheduler, timeout=_CONNECT_LIMIT_S, set_as_default=False, name="vmdedup"
        )
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"--scheduler {scheduler}: no Dask scheduler answers: {why}") from error
    with client:
        if not client.nthreads():
            raise UsageError(f"--scheduler {scheduler}: it has no workers")
        yield partial(OnCluster, client)


_NO_MARKS = pd.DataFrame({"id": [], "key": [], "mark": []}).astype(
    {"id": "int32", "key": "int32", "mark": "uint64"}
)


def _slices(sketches: Any, number: int) -> list[Any]:
    each = max(1, -(-len(sketches) // number))
    return [sketches.slice(at, each) for at in range(0, max(1, len(sketches)), each)]


@contextmanager
def _within_worker() -> Iterator[None]:
    """Bound DuckDB: several workers, each with several threads, may be on one machine."""
    worker = distributed.get_worker()
    config: dict[str, Any] = {"threads": 1}
    if limit := worker.memory_manager.memory_limit:
        config["memory_limit"] = f"{int(_PART_OF_MEMORY * limit / worker.state.nthreads) >> 10}KiB"
    token = CONFIG.set(config)
    try:
        yield
    finally:
        CONFIG.reset(token)


def _marks(sketches: Any, depth: int) -> Any:
    with _within_worker():
        return marks_of(sketches, depth).to_pandas()


def _contents(marks: Any) -> Any:
    with _within_worker():
        return contents_of(pa.Table.from_pandas(marks, preserve_index=False))


def _classes(marks: Any) -> Any:
    with _within_worker():
        return classes_of(pa.Table.from_pandas(marks, preserve_index=False))


def _pairs(classes: Any, compared: Int64s, part: Part) -> Any:
    with _within_worker():
        return pairs_of(classes, compared, part)


def _summed(pairs: list[Any]) -> Any:
    with _within_worker():
        return summed_pairs(pairs)
