"""Huge pages by the memory that is available: the states, their edges, and the density in each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vmdedup.policy.huge_pages import PLENTY, density_in, state_of_memory

TOTAL = 1000


def states(percents: Sequence[float], *, threshold: int = 20, hysteresis: int = 5) -> list[int]:
    """The state after each of these shares of available memory, one after the other."""
    found, state = [], PLENTY
    for percent in percents:
        available = int(percent * 10)
        state = state_of_memory(state, available, TOTAL, threshold, hysteresis)
        found.append(state)
    return found


def test_each_edge_is_half_of_the_one_before() -> None:
    assert states([100, 20, 19.9, 10, 9.9, 5, 4.9, 0]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_memory_that_comes_back_must_exceed_the_edge_by_the_hysteresis() -> None:
    assert states([4.9, 9.9, 10, 14.9, 15, 24.9, 25]) == [3, 3, 2, 2, 1, 1, 0]


def test_a_state_is_kept_between_both_edges() -> None:
    assert states([19, 22, 24, 19, 25, 22, 20]) == [1, 1, 1, 1, 0, 0, 0]


def test_without_a_threshold_twenty_percent_holds() -> None:
    percents = [100, 19, 9, 4, 30]
    assert states(percents, threshold=0) == states(percents)
    assert states(percents, threshold=40) == [0, 2, 3, 3, 1]


def test_a_jump_takes_as_many_states_as_it_must() -> None:
    assert states([100, 1, 100]) == [0, 3, 0]


@pytest.mark.parametrize(("density", "falls"), [(320, [320, 160, 80, 0]), (1, [1, 0, 0, 0])])
def test_density_falls_to_nothing(density: int, falls: list[int]) -> None:
    assert [density_in(state, density) for state in range(4)] == falls
