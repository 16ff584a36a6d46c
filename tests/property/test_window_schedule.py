"""The schedule of windows: young ones always, old ones in every ninth round, together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.window_schedule import WindowSchedule

from .strategies import int64s

pytestmark = pytest.mark.property

WINDOWS = 20
STEP = st.tuples(st.booleans(), st.sets(st.integers(0, WINDOWS - 1)).map(sorted))


@given(st.lists(STEP, max_size=60), st.integers(0, 20))
def test_rounds_tell_exactly_what_was_passed_over(
    steps: list[tuple[bool, list[int]]], turn: int
) -> None:
    schedule = WindowSchedule(WINDOWS, turn)
    since = [0] * WINDOWS
    for everywhere, renewed in steps:
        due = schedule.next_round(everywhere=everywhere).tolist()
        since = [rounds + 1 for rounds in since]
        assert due == sorted(due)
        assert not everywhere or due == list(range(WINDOWS))
        expected = [since[window] if window in due else 0 for window in range(WINDOWS)]
        assert schedule.rounds.tolist() == expected
        assert max(since) <= 9
        since = [0 if window in due else rounds for window, rounds in enumerate(since)]
        schedule.renew(int64s(renewed))


@pytest.mark.parametrize("turn", [0, 4])
def test_old_windows_are_asked_for_in_every_ninth_round_and_together(turn: int) -> None:
    schedule = WindowSchedule(WINDOWS, turn)
    asked = [len(schedule.next_round(everywhere=False)) for _ in range(108)]
    assert asked[:3] == [WINDOWS] * 3
    assert sorted(asked[-9:]) == [0] * 8 + [WINDOWS]
    assert asked[107 - turn] == WINDOWS


def test_slow_windows_have_a_third_of_the_turns_also_if_all_others_are_asked_for() -> None:
    slow = np.arange(WINDOWS) < 5
    schedule = WindowSchedule(WINDOWS, 4)
    asked = [schedule.next_round(everywhere=True, slow=slow) for _ in range(108)]
    assert all(set(range(5, WINDOWS)) <= set(due.tolist()) for due in asked)
    turns = [number for number, due in enumerate(asked) if 0 in due]
    assert turns[:3] == [0, 1, 2]
    assert set(np.diff(turns[-3:]).tolist()) == {27}
    assert [len(due) for due in asked].count(WINDOWS) == len(turns)
    schedule.next_round(everywhere=True)
    assert schedule.rounds[0] == 108 - turns[-1]


def test_new_pages_make_a_window_young() -> None:
    schedule = WindowSchedule(WINDOWS)
    for _ in range(100):
        schedule.next_round(everywhere=False)
    schedule.renew(int64s([5]))
    assert all(5 in schedule.next_round(everywhere=False) for _ in range(3))
