"""The history of each VM, one sample after the other, as the live view would show it.

Owns how histories are laid side by side. The samples of all VMs together set the times: a
VM is in a view if it has a sample within half of the longer of both intervals, since the
two may be averaged over different ones. Promises no rate across a restart of the engine,
whose counters begin again, nor across a time without samples. Pure: no file, no clock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from statistics import median

from vmdedup.models import History, HistorySample
from vmdedup.top.view import COLUMNS, Rates, Row, View, rate

_LATE = 2
"""Intervals between two samples from which on samples between them count as missing."""
_FROM_ZERO = ("gates", "stopped_ms", "cow_breaks")
"""Counters that begin at 0 when the engine starts."""


class ReplaySource:
    """The views of a history that has a sample; stays on its last."""

    columns = tuple(name for name in COLUMNS if name not in ("status", "waiting", "VMAs"))
    title = "history"
    shortest_s = 0.1
    has_steps = True

    def __init__(self, together: History, vms: Mapping[str, History]) -> None:
        samples = together.samples
        gaps_s = [now.unix_s - before.unix_s for before, now in pairwise(samples)]
        interval_s = median(gaps_s) if gaps_s else together.interval_s
        self._at = -1
        self._restarts = [
            now.unix_s for before, now in pairwise(samples) if _has_restarted(before, now)
        ]
        self._together = _Line(together, interval_s)
        self._vms = {
            name: _Line(
                history,
                history.interval_s if history.interval_s > together.interval_s else interval_s,
            )
            for name, history in vms.items()
        }

    def look(self, steps: int = 1) -> View:
        """The view that many steps on from the last, or at the end in that direction."""
        self._at = min(max(self._at + steps, 0), len(self._together.samples) - 1)
        return self.view(self._at)

    def view(self, at: int) -> View:
        """The view at one of the history's samples."""
        samples = self._together.samples
        now = samples[at]
        rows = []
        for name, line in self._vms.items():
            near = line.near(now.unix_s)
            if near is not None:
                rows.append(self._row(name, line, near))
        breaks, gates = self._rates(self._together, at)
        when = datetime.fromtimestamp(now.unix_s).astimezone()
        return View(
            when=f"{when:%Y-%m-%d %H:%M:%S}, sample {at + 1:,} of {len(samples):,}",
            rows=tuple(rows),
            saved_bytes=now.saved_bytes,
            held_bytes=now.present_bytes,
            overhead_bytes=now.overhead_bytes,
            gate_p99_ms=now.gate_p99_ms,
            rates=Rates(breaks=breaks, gates=gates),
            is_last=at == len(samples) - 1,
        )

    def _row(self, name: str, line: _Line, at: int) -> Row:
        sample = line.samples[at]
        breaks, gates = self._rates(line, at)
        return Row(
            name=name,
            held_bytes=sample.present_bytes,
            saved_bytes=sample.saved_bytes,
            merged_pages=sample.pages_sharing,
            zero_pages=sample.zero_pages,
            broken_pages=sample.cow_broken_pages,
            breaks=breaks,
            gates=gates,
        )

    def _rates(self, line: _Line, at: int) -> tuple[float | None, float | None]:
        """Breaks and gates a second since the sample before."""
        if at == 0:
            return None, None
        before, now = line.samples[at - 1], line.samples[at]
        span_s = now.unix_s - before.unix_s
        restarts = bisect_right(self._restarts, now.unix_s)
        if span_s > _LATE * line.interval_s or restarts > bisect_right(
            self._restarts, before.unix_s
        ):
            return None, None
        return (
            rate(now.cow_breaks, before.cow_breaks, span_s),
            rate(now.gates, before.gates, span_s),
        )


class _Line:
    """The samples of one VM, or of all together, and the usual time between two."""

    def __init__(self, history: History, interval_s: float) -> None:
        self.samples = history.samples
        self.interval_s = interval_s
        self._times = [sample.unix_s for sample in history.samples]

    def near(self, unix_s: float) -> int | None:
        """The sample nearest to this time; `None` if it is not within half an interval."""
        after = bisect_left(self._times, unix_s)
        beside = [at for at in (after, after - 1) if 0 <= at < len(self._times)]
        best = min(beside, key=lambda at: abs(self._times[at] - unix_s), default=None)
        if best is None or abs(self._times[best] - unix_s) > self.interval_s / 2:
            return None
        return best


def _has_restarted(before: HistorySample, now: HistorySample) -> bool:
    """Whether another engine has begun to count."""
    counters = ((getattr(before, name), getattr(now, name)) for name in _FROM_ZERO)
    return any(then is not None and since is not None and since < then for then, since in counters)
