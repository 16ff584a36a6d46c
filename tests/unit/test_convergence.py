"""Convergence: two quiet passes in a row, from the third on, by the net."""

from __future__ import annotations

import pytest

from vmdedup.core.convergence import Convergence

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("merged_after_each_pass", "reached_after"),
    [
        ([1000, 1005, 1006], 3),
        ([1000, 1500, 1501, 1502], 4),
        ([1000, 1005, 1100, 1101, 1102], 5),
        ([1000, 900, 905], 3),
        ([0, 0, 0], 3),
        ([1000, 2000, 3000, 4000], None),
        ([1000, 1000], None),
    ],
)
def test_reached(merged_after_each_pass: list[int], reached_after: int | None) -> None:
    convergence = Convergence()
    reached = []
    for merged_pages in merged_after_each_pass:
        convergence.add(merged_pages)
        reached.append(convergence.reached)
    first = reached.index(True) + 1 if True in reached else None
    assert first == reached_after


def test_a_pass_that_ended_early_is_not_a_quiet_one() -> None:
    convergence = Convergence()
    for troubled in (True, True, False, False, True, False):
        assert not convergence.reached
        convergence.add(0, troubled=troubled)
    assert not convergence.reached
    convergence.add(0)
    assert convergence.reached


def test_trouble_that_stays_is_not_waited_for() -> None:
    convergence = Convergence()
    for _ in range(8):
        convergence.add(100, troubled=True)
    assert convergence.reached


def test_no_pass_counts_until_it_is_known_whether_storage_hangs() -> None:
    """A drain is put off for a second before storage counts as hanging; passes take less."""
    convergence = Convergence()
    for _ in range(20):
        convergence.add(100, troubled=True, awaits_storage=True)
        assert not convergence.reached
    for reached in (False, False, True):
        convergence.add(100)
        assert convergence.reached is reached
