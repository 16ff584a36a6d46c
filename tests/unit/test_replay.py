"""`vmdedup top --replay`: histories laid side by side, and their rates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.models import History, HistorySample
from vmdedup.top.replay import ReplaySource
from vmdedup.top.view import COLUMNS, ORDERS, Row, View, orders

pytestmark = pytest.mark.unit

NOON = 1_790_000_100.0
STEP_S = 15
NAMES = ("db", "mail", "web")


def sample(unix_s: float, breaks: int | None = 0, gates: int | None = 0) -> HistorySample:
    return HistorySample(
        unix_s=unix_s,
        saved_bytes=round(unix_s - NOON),
        present_bytes=1 << 30,
        vms=1,
        cow_breaks=breaks,
        gates=gates,
        pages_sharing=3,
    )


def history(*samples: HistorySample, interval_s: float = STEP_S) -> History:
    return History(samples=list(samples), interval_s=interval_s)


def counted(*breaks: int, step_s: float = STEP_S, first_s: float = NOON) -> list[HistorySample]:
    return [sample(first_s + step_s * at, number) for at, number in enumerate(breaks)]


def views(source: ReplaySource) -> list[View]:
    found = [source.look()]
    while not found[-1].is_last:
        found.append(source.look())
    return found


def breaks_of(found: Sequence[View], name: str) -> list[float | None]:
    return [row.breaks for view in found for row in view.rows if row.name == name]


# --- rates --------------------------------------------------------------------


def test_rates_are_of_the_time_between_two_samples() -> None:
    line = history(*counted(0, 30, 30))
    found = views(ReplaySource(line, {"web": line}))
    assert breaks_of(found, "web") == [None, 2.0, 0.0]
    assert [view.rates.breaks for view in found] == [None, 2.0, 0.0]


def test_there_is_no_rate_across_a_restart_of_the_engine() -> None:
    """Not even for a VM whose own counter was so low that it did not fall."""
    together = history(*counted(100, 130, 15, 30))
    quiet = history(*counted(0, 0, 15, 30))
    found = views(ReplaySource(together, {"quiet": quiet}))
    assert breaks_of(found, "quiet") == [None, 0.0, None, 1.0]
    assert [view.rates.breaks for view in found] == [None, 2.0, None, 1.0]


def test_there_is_no_rate_for_a_vm_that_was_attached_again() -> None:
    together = history(*counted(100, 130, 160))
    found = views(ReplaySource(together, {"web": history(*counted(90, 3, 18))}))
    assert breaks_of(found, "web") == [None, None, 1.0]
    assert found[1].rates.breaks == 2.0


def test_there_is_no_rate_across_a_time_without_samples() -> None:
    """Engines may have come and gone in it."""
    later = counted(45, 60, first_s=NOON + 900)
    line = history(*counted(0, 15, 30), *later)
    found = views(ReplaySource(line, {"web": line}))
    assert breaks_of(found, "web") == [None, 1.0, 1.0, None, 1.0]


def test_unknown_figures_have_no_rate() -> None:
    line = history(sample(NOON, None, None), sample(NOON + STEP_S), sample(NOON + 2 * STEP_S))
    found = views(ReplaySource(line, {"web": line}))
    assert breaks_of(found, "web") == [None, None, 0.0]


# --- side by side -------------------------------------------------------------


def test_a_vm_is_there_while_it_has_samples() -> None:
    together = history(*counted(0, 0, 0, 0))
    short = history(*counted(0, 0, first_s=NOON + STEP_S))
    found = views(ReplaySource(together, {"short": short}))
    assert [len(view.rows) for view in found] == [0, 1, 1, 0]


def test_the_interval_is_the_samples_own() -> None:
    """The daemon that wrote the file may have had another interval than the reader."""
    together = history(*counted(0, 60, 120, 180, step_s=1))
    left = history(*counted(0, 60, step_s=1))
    found = views(ReplaySource(together, {"left": left}))
    assert [len(view.rows) for view in found] == [1, 1, 0, 0]
    rare = history(*counted(0, 60, 120, step_s=600))
    assert breaks_of(views(ReplaySource(rare, {"web": rare})), "web") == [None, 0.1, 0.1]


def test_a_coarser_history_of_a_vm_is_there_all_the_time() -> None:
    """Many VMs have a shorter fine past than all together."""
    together = history(*counted(*range(0, 400, 10)))
    coarse = history(*counted(0, 300, step_s=300, first_s=NOON + 150), interval_s=300)
    found = views(ReplaySource(together, {"web": coarse}))
    assert all(len(view.rows) == 1 for view in found)
    assert set(breaks_of(found, "web")) == {None, 1.0}


def test_a_finer_history_of_a_vm_gives_its_nearest_sample() -> None:
    together = history(*counted(0, 300, step_s=300), interval_s=300)
    fine = history(*counted(*range(25), first_s=NOON + 5))
    first, last = views(ReplaySource(together, {"web": fine}))
    assert (first.rows[0].saved_bytes, last.rows[0].saved_bytes) == (5, 305)


def test_only_what_the_history_knows_has_a_column() -> None:
    known = orders(ReplaySource.columns)
    assert COLUMNS.keys() - set(ReplaySource.columns) == {"status", "waiting", "VMAs"}
    assert ORDERS.keys() - set(known) == {"waiting", "vmas"}


# --- properties ---------------------------------------------------------------

Growth = st.one_of(st.none(), st.integers(0, 1000))
"""New breaks of a VM since the sample before; `None`: the VM is not there."""
Moments = st.lists(
    st.tuples(st.booleans(), st.tuples(*[Growth for _ in NAMES])), min_size=1, max_size=30
)
"""At each sample: whether another engine has begun to count, and each VM's growth."""


@given(Moments)
def test_each_view_has_the_vms_and_the_growth_of_its_time(
    moments: list[tuple[bool, tuple[int | None, ...]]],
) -> None:
    counters = dict.fromkeys(NAMES, 0)
    gates = 1
    together: list[HistorySample] = []
    lines: dict[str, list[HistorySample]] = {name: [] for name in NAMES}
    for at, (restarted, growths) in enumerate(moments):
        unix_s = NOON + STEP_S * at
        gates = 1 if restarted else gates + 1
        for name, growth in zip(NAMES, growths, strict=True):
            counters[name] = (0 if restarted else counters[name]) + (growth or 0)
            if growth is not None:
                lines[name].append(sample(unix_s, counters[name]))
        together.append(sample(unix_s, sum(counters.values()), gates))
    vms = {name: history(*line) for name, line in lines.items() if line}
    found = views(ReplaySource(history(*together), vms))
    assert len(found) == len(moments)
    for at, (view, (_, growths)) in enumerate(zip(found, moments, strict=True)):
        there = [name for name, growth in zip(NAMES, growths, strict=True) if growth is not None]
        assert [row.name for row in view.rows] == there
        assert all(row.saved_bytes == view.saved_bytes for row in view.rows)
        for row in view.rows:
            _check_rate(row, at, moments)


def _check_rate(row: Row, at: int, moments: list[tuple[bool, tuple[int | None, ...]]]) -> None:
    """A rate is the true growth since the VM's sample before, if the same engine counted both."""
    column = NAMES.index(row.name)
    growths = [growths[column] for _, growths in moments]
    earlier = [each for each in range(at) if growths[each] is not None]
    if not earlier or at - earlier[-1] > 2:
        assert row.breaks is None
        return
    since = range(earlier[-1] + 1, at + 1)
    # The first gate of the next engine hides a restart only right after a first gate.
    if any(moments[each][0] and each > 0 and not moments[each - 1][0] for each in since):
        assert row.breaks is None
    elif not any(moments[each][0] for each in since):
        total = sum(growths[each] or 0 for each in since)
        assert row.breaks == pytest.approx(total / (STEP_S * len(since)))


@given(st.integers(1, 20), st.lists(st.integers(-5, 5)))
def test_steps_lead_to_their_sample_and_not_beyond_the_ends(number: int, steps: list[int]) -> None:
    line = history(*counted(*range(number)))
    source = ReplaySource(line, {"web": line})
    expected = accumulate(steps, lambda at, by: min(max(at + by, 0), number - 1), initial=0)
    for by, at in zip([1, *steps], expected, strict=True):
        view = source.look(by)
        assert view == source.view(at)
        assert f"sample {at + 1} of {number}" in view.when
        assert view.is_last == (at == number - 1)
