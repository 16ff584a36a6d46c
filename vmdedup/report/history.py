"""The history in the terminal, and as CSV.

Owns the columns. Promises that the table fits 80 columns, and that a gap in time
is a gap in the line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise

from rich.console import Console

from vmdedup.errors import UsageError
from vmdedup.history.series import model_of, row_of, thinned, width_s
from vmdedup.models import History, HistorySample
from vmdedup.report.console import make_console, make_table, print_table
from vmdedup.report.words import count, milliseconds, share, size

_ROWS = 20
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*%#"
_LONGEST_LINE = 72
_LATE = 2
"""Intervals after the last sample from which on the next counts as missing."""
_COLUMNS = ("VMs", "held", "saved", "of held", "overhead", "breaks", "gate p99")


def as_csv(history: History) -> str:
    """A line per sample; the header names each figure with its unit, or without one if counted."""
    out = io.StringIO()
    names = list(HistorySample.model_fields)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["time_utc", *names])
    for sample in history.samples:
        when = datetime.fromtimestamp(sample.unix_s, UTC).isoformat(timespec="seconds")
        writer.writerow([when, *(getattr(sample, name) for name in names)])
    return out.getvalue()


def as_parquet(history: History) -> bytes:
    """A row per sample, the columns of `as_csv`; times are UTC. Raises UsageError."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("parquet needs pyarrow: pip install 'vmdedup[parquet]'") from error
    samples = history.samples
    moments = [round(sample.unix_s * 1000) for sample in samples]
    columns = {"time_utc": pa.array(moments, pa.timestamp("ms", tz="UTC"))}
    for name, field in HistorySample.model_fields.items():
        kind = pa.float64() if "float" in str(field.annotation) else pa.int64()
        columns[name] = pa.array([getattr(sample, name) for sample in samples], kind)
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def show_history(
    history: History, since_s: float, console: Console | None = None, *, rows: int | None = None
) -> None:
    """Print a line of the bytes saved, and a table of at most `rows`; needs samples."""
    console = console or make_console()
    samples = history.samples
    saved = [sample.saved_bytes for sample in samples]
    mean_bytes = sum(saved) // len(saved)
    held_bytes = sum(sample.present_bytes for sample in samples) // len(saved)
    console.print(
        f"{size(mean_bytes)} saved of {size(held_bytes)} held ({share(mean_bytes, held_bytes)})"
        " on average",
        style="bold",
    )
    console.print(
        f"between {size(min(saved))} and {size(max(saved))},"
        f" {_moment(samples[0].unix_s)} to {_moment(samples[-1].unix_s)}"
    )
    bars = _BARS if console.encoding.startswith("utf") else _PLAIN_BARS
    columns = min(_LONGEST_LINE, console.width)
    console.print(spark_line(history, columns, bars), style="green", no_wrap=True)
    table = make_table(["time", *_COLUMNS])
    for sample in _few(samples, rows or _ROWS, since_s):
        table.add_row(_clock(sample.unix_s, since_s), *_cells(sample))
    print_table(console, table)


def spark_line(history: History, columns: int, bars: str) -> str:
    """Bytes saved, from 0 to the highest, in one line; blank where no sample was noted."""
    samples = history.samples
    first, span_s = samples[0].unix_s, samples[-1].unix_s - samples[0].unix_s
    highest = max(1, *(sample.saved_bytes for sample in samples))
    columns = min(columns, 1 + round(span_s / history.interval_s)) if span_s > 0 else 1
    column_of = [
        min(columns - 1, int((sample.unix_s - first) / span_s * columns)) if span_s > 0 else 0
        for sample in samples
    ]
    heights: list[list[int]] = [[] for _ in range(columns)]
    for column, sample in zip(column_of, samples, strict=True):
        heights[column].append(sample.saved_bytes)
    for (column, sample), (following, later) in pairwise(zip(column_of, samples, strict=True)):
        # A sample that came a little late is not missing.
        if later.unix_s - sample.unix_s < _LATE * history.interval_s:
            for between in range(column + 1, following):
                heights[between].append(sample.saved_bytes)
    return "".join(_bar(height, highest, bars) for height in heights)


def _bar(height: list[int], highest: int, bars: str) -> str:
    if not height:
        return " "
    part = sum(height) / len(height) / highest
    return bars[max(0, min(len(bars) - 1, int(part * len(bars))))]


def _few(samples: Sequence[HistorySample], rows: int, since_s: float) -> list[HistorySample]:
    if len(samples) <= rows:
        return list(samples)
    span_s = min(since_s, samples[-1].unix_s - samples[0].unix_s)
    slot_s = width_s(span_s, rows)
    return [model_of(row) for row in thinned(map(row_of, samples), slot_s)]


def _cells(sample: HistorySample) -> list[str]:
    overhead = sample.overhead_bytes
    return [
        count(sample.vms),
        size(sample.present_bytes),
        size(sample.saved_bytes),
        share(sample.saved_bytes, sample.present_bytes),
        "-" if overhead is None else size(overhead),
        count(sample.cow_breaks),
        milliseconds(sample.gate_p99_ms),
    ]


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M")


def _clock(unix_s: float, since_s: float) -> str:
    """Local time, as short as still tells the samples apart."""
    when = datetime.fromtimestamp(unix_s).astimezone()
    return when.strftime("%H:%M:%S" if since_s <= 86_400 // 2 else "%m-%d %H:%M")
