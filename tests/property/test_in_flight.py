"""Whether requests in flight end soon: the judgement against simulated disks."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.attach.storage import PAUSES_S
from vmdedup.core.in_flight import (
    LEAST_LOOKS,
    SOON_S,
    Ends,
    Judgement,
    Look,
    Requests,
    Slow,
    Stuck,
    Unclear,
    judge,
)


class Disk:
    """One that serves up to `depth` requests at a time, each `latency_s` long on average.

    After each a slot is idle for `think_s` on average. `stuck` further ones never end.
    """

    def __init__(
        self, depth: int, latency_s: float, think_s: float = 0.0, stuck: int = 0, seed: int = 0
    ) -> None:
        self.stuck = stuck
        drawn = random.Random(seed)
        self.requests = [
            request for _ in range(depth) for request in _requests(drawn, latency_s, think_s)
        ]
        """When each begins and ends."""

    def look(self, at_s: float) -> Look:
        over = [end - begin for begin, end in self.requests if end <= at_s]
        running = sum(begin <= at_s < end for begin, end in self.requests)
        count = running + self.stuck
        places = {"disk": Requests(count, len(over) % 65536)} if count else {}
        return Look(at_s, places, {"disk": sum(over)})


def _requests(drawn: random.Random, latency_s: float, think_s: float) -> list[tuple[float, float]]:
    """Of one slot, for half a second; begun long before the first look."""
    requests = []
    now_s = -3 * (latency_s + think_s) * drawn.random()
    while now_s < 0.5:
        end_s = now_s + latency_s * drawn.uniform(0.5, 1.5)
        requests.append((now_s, end_s))
        now_s = end_s + think_s * drawn.uniform(0.5, 1.5)
    return requests


def judged(disk: Disk) -> tuple[Judgement, int]:
    """As a VM is looked at: until it is clear, or to the last pause; and the looks it took."""
    looks: list[Look] = []
    for number, at_s in enumerate(accumulate(PAUSES_S, initial=0.0)):
        looks.append(disk.look(at_s + 1e-3 * number))
        judgement = judge(looks, is_last=number == len(PAUSES_S))
        if not isinstance(judgement, Unclear):
            break
    return judgement, len(looks)


seeds = st.integers(0, 1 << 32)


def test_nothing_in_flight_takes_one_look() -> None:
    assert judged(Disk(0, 0.001)) == (Ends(is_certain=True), 1)


@given(depth=st.integers(0, 4), stuck=st.integers(1, 64), seed=seeds)
def test_what_stands_still_is_stuck(depth: int, stuck: int, seed: int) -> None:
    """Some requests hang, the others are over."""
    quiet = Disk(depth, 1e-4, 1000.0, stuck, seed)
    judgement, _ = judged(quiet)
    assert isinstance(judgement, Stuck), judgement
    assert judgement.place == "disk"


_TRIES = 50


def _stuck_of(disk: Callable[[int], Disk]) -> float:
    """The share of such disks that are not drained."""
    found = [not isinstance(judged(disk(seed))[0], Ends) for seed in range(_TRIES)]
    return sum(found) / _TRIES


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_request_that_hangs_beside_others_is_seen(depth: int) -> None:
    """Of a disk that is mostly idle; each other request ends within milliseconds."""
    assert _stuck_of(lambda seed: Disk(depth, 0.002, 0.04, 1, seed)) > 0.9


@pytest.mark.parametrize("latency_ms", [0.5, 2, 8])
@pytest.mark.parametrize("depth", [1, 3, 7, 32])
def test_a_disk_that_is_always_busy_ends(depth: int, latency_ms: float) -> None:
    assert _stuck_of(lambda seed: Disk(depth, latency_ms / 1000, seed=seed)) < 0.05


@pytest.mark.parametrize("latency_ms", [0.5, 2, 8])
@pytest.mark.parametrize("depth", [1, 3, 16])
def test_a_disk_that_is_sometimes_idle_ends(depth: int, latency_ms: float) -> None:
    each_s = latency_ms / 1000
    most = 0.05 if depth < 16 else 0.25
    assert _stuck_of(lambda seed: Disk(depth, each_s, 3 * each_s, 0, seed)) <= most


@given(depth=st.integers(8, 64), phase=st.floats(0, 0.99))
def test_a_slow_disk_is_put_off(depth: int, phase: float) -> None:
    """Two requests a second: all that are in flight take seconds."""
    assert depth / 2 > SOON_S
    slow = Disk(0, 0.0)
    slow.requests = [
        (begin_s, begin_s + depth / 2)
        for begin_s in ((each + phase - depth) / 2 for each in range(depth + 4))
    ]
    judgement, _ = judged(slow)
    assert isinstance(judgement, Slow | Stuck), judgement
    if isinstance(judgement, Slow):
        assert judgement.left_s > SOON_S


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.booleans())
def test_seen_empty_once_is_enough(counts: list[int], is_last: bool) -> None:
    """Whatever was in flight at the first look has ended by then, moved or not."""
    looks = [
        Look(0.001 * number, {"queue": Requests(count, 7)} if count else {})
        for number, count in enumerate(counts)
    ]
    assert isinstance(judge(looks, is_last=is_last), Ends) == (0 in counts)


@given(st.sets(st.sampled_from("abcdefgh"), min_size=1), st.sets(st.sampled_from("abcdefgh")))
def test_threads_are_told_apart(before: set[str], after: set[str]) -> None:
    first = Look(0.0, {"files": Requests(len(before), each=frozenset(before))})
    later = {"files": Requests(len(after), each=frozenset(after))} if after else {}
    judgement = judge([first, Look(0.01, later)], is_last=True)
    assert isinstance(judgement, Stuck) == (bool(after) and before <= after)


def test_a_counter_that_wraps_has_moved() -> None:
    looks = [Look(0.0, {"queue": Requests(2, 65535)}), Look(0.01, {"queue": Requests(2, 1)})]
    assert judge(looks, is_last=False) == Ends(is_certain=False)


def test_few_looks_tell_nothing_of_an_average() -> None:
    busy = Disk(2, 0.001)
    looks = [busy.look(0.003 * number) for number in range(LEAST_LOOKS - 1)]
    assert isinstance(judge(looks, is_last=False), Unclear)
