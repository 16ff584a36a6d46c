"""The search for a placement, beside all placements of small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.hosts.placement import Int64s, Task, copies, cost, filled, improve, least_cost

pytestmark = pytest.mark.property

Case = tuple[Task, Int64s]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 6 units on up to 3 hosts, placed within the limits."""
    hosts, units = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    number = draw(st.integers(1, 6))
    of_class = [
        draw(st.sets(st.integers(0, units - 1), min_size=min(2, units), max_size=units))
        for _ in range(number)
    ]
    classes = [
        np.array([c for c in range(number) if unit in of_class[c]], dtype=np.int64)
        for unit in range(units)
    ]
    now = np.array([draw(st.integers(0, hosts - 1)) for _ in range(units)], dtype=np.int64)
    apart = draw(st.sets(st.integers(0, units - 1), max_size=3))
    if len({int(now[unit]) for unit in apart}) < len(apart):
        apart = set()
    held = np.bincount(now, minlength=hosts)
    room = [int(n) + draw(st.integers(0, 3)) for n in held]
    task = Task(
        weight=np.array([draw(st.integers(1, 50)) for _ in range(number)], dtype=np.int64),
        classes=classes,
        size_bytes=np.full(units, 1, dtype=np.int64),
        vms=np.ones(units, dtype=np.int64),
        room_bytes=np.array(room, dtype=np.float64),
        room_vms=np.full(hosts, np.inf) if draw(st.booleans()) else np.array(room, float),
        apart=[frozenset(apart)] if len(apart) > 1 else [],
        fixed=frozenset(draw(st.sets(st.integers(0, units - 1), max_size=2))),
    )
    return task, now


def is_allowed(task: Task, now: Int64s, host: Int64s) -> bool:
    if any(host[unit] != now[unit] for unit in task.fixed):
        return False
    if (np.bincount(host, task.size_bytes, len(task.room_bytes)) > task.room_bytes).any():
        return False
    if (np.bincount(host, task.vms, len(task.room_vms)) > task.room_vms).any():
        return False
    return all(len({int(host[u]) for u in group}) == len(group) for group in task.apart)


def naive_cost(task: Task, host: Int64s) -> int:
    held = {(int(host[u]), int(c)) for u, own in enumerate(task.classes) for c in own}
    return sum(int(task.weight[c]) for _, c in held)


def best_cost(task: Task, now: Int64s) -> int:
    every = itertools.product(range(len(task.room_bytes)), repeat=len(now))
    placed = (np.array(host, dtype=np.int64) for host in every)
    return min(naive_cost(task, host) for host in placed if is_allowed(task, now, host))


def nothing(_: int) -> float:
    return 0.0


@given(cases())
def test_the_plan_is_allowed_never_worse_and_never_below_the_bound(case: Case) -> None:
    task, now = case
    found = improve(task, now, nothing)
    assert is_allowed(task, now, found)
    assert cost(task, found) == naive_cost(task, found) <= naive_cost(task, now)
    best = best_cost(task, now)
    assert least_cost(task) <= best <= cost(task, found)


@given(cases(), st.integers(1, 200))
def test_a_move_saves_what_it_has_to(case: Case, least: int) -> None:
    """No moved unit could go back home alone for less than its move had to save."""
    task, now = case
    found = improve(task, now, lambda _: least)
    assert is_allowed(task, now, found)
    for unit in np.flatnonzero(found != now).tolist():
        back = found.copy()
        back[unit] = now[unit]
        if is_allowed(task, now, back):
            assert cost(task, back) - cost(task, found) > least
    again = improve(task, found, lambda _: least)
    assert cost(task, again) <= cost(task, found)


def mixed(seed: int, kinds: int, each: int) -> Case:
    """So many kinds of so many VMs, mixed among full hosts: only exchanges help."""
    random = np.random.default_rng(seed)
    kind = np.repeat(np.arange(kinds), each)
    random.shuffle(kind)
    weight = np.concatenate([random.integers(20, 100, kinds), [30]]).astype(np.int64)
    units = kinds * each
    task = Task(
        weight=weight,
        classes=[np.array([k, kinds], dtype=np.int64) for k in kind],
        size_bytes=np.ones(units, dtype=np.int64),
        vms=np.ones(units, dtype=np.int64),
        room_bytes=np.full(kinds, float(each)),
        room_vms=np.full(kinds, np.inf),
    )
    return task, np.repeat(np.arange(kinds), each).astype(np.int64)


def test_small_cases_are_solved_exactly() -> None:
    """Two kinds by trying all placements; more, where each kind fits on one host, by sum."""
    for seed in range(20):
        task, now = mixed(seed, 2, 3)
        assert cost(task, improve(task, now, nothing)) == best_cost(task, now)
    for kinds in (3, 4, 5):
        found = [mixed(seed, kinds, 4) for seed in range(20)]
        costs = [cost(task, improve(task, now, nothing)) for task, now in found]
        # Each kind once, and what all have on each host.
        best = [int(task.weight[:-1].sum() + kinds * task.weight[-1]) for task, _ in found]
        assert sum(costs) <= 1.02 * sum(best)
        assert sum(a == b for a, b in zip(costs, best, strict=True)) >= 18


@given(cases())
def test_filling_in_an_order_is_allowed_or_impossible(case: Case) -> None:
    task, now = case
    placed = filled(task, list(range(len(now))), now)
    if placed is not None:
        assert is_allowed(task, now, placed)
        assert (copies(task, placed) <= len(task.room_bytes)).all()
