"""The judgement whether a VM's disk requests in flight will end soon, from looks at them.

Owns the judgement alone: it takes one `Look` after the other and returns a value. Consider
the places with requests in flight at the first look. It promises `Ends` only if each was
seen empty since, or goes on ending requests, soon all of them. It cannot make out one
request that never ends among others that end without a pause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

SOON_S = 2.0
"""Longest drain, seconds; a longer one is put off, as the guest's devices stop in it."""
LEAST_LOOKS = 20
"""Fewest looks that tell if requests go on ending while some are always in flight."""
_TURNS = 3.0
"""Shortest time that these looks take together, in multiples of a request's median time."""
_LONGEST_STAND = 3.0
"""Longest time in which no request may end, in multiples of a request's median time."""
_SAME = 0.35
"""Largest difference between two counts of the requests in flight, as a share of one."""
_MANY = 8
"""Requests always in flight from which on a single one that never ends is not made out."""
_COUNTER = 1 << 16
"""Value at which counters of ended requests may wrap, as a virtqueue's used index does."""


@dataclass(frozen=True)
class Requests:
    """The requests in flight at one place: a queue, a controller, a pool of threads."""

    count: int
    """Requests in flight; never `0`."""
    ended: int = 0
    """Requests that have ended there, modulo 2**16."""
    each: frozenset[str] = frozenset()
    """The identities of the requests, if known; `ended` means nothing then."""

    def ended_until(self, later: Requests) -> int:
        """Requests that have ended between this look and a later one at the same place."""
        if self.each:
            return len(self.each - later.each)
        return (later.ended - self.ended) % _COUNTER


@dataclass(frozen=True)
class Look:
    """The requests in flight at one moment."""

    at_s: float
    """Moment of the look, seconds on CLOCK_MONOTONIC."""
    places: Mapping[str, Requests] = field(default_factory=dict)
    """Requests by the place's name in messages; places without requests are left out."""
    spent_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the requests ended there took together, by place, if known."""


@dataclass(frozen=True)
class Ends:
    """All requests in flight end soon."""

    is_certain: bool = True
    """Whether each place was seen empty; if not, requests only go on ending there."""


@dataclass(frozen=True)
class Unclear:
    """More looks are needed."""

    place: str


@dataclass(frozen=True)
class Stuck:
    """Nothing has ended at this place since the first look, or one request has not."""

    place: str
    count: int
    """Requests in flight at the last look."""


@dataclass(frozen=True)
class Doubtful:
    """Requests end, but perhaps not all: some are always in flight, and at times none ends."""

    place: str
    count: int
    """Requests in flight at the last look."""


@dataclass(frozen=True)
class Slow:
    """Requests end, but not soon all of them."""

    place: str
    count: int
    left_s: float
    """Seconds until the last of them will have ended at this pace."""


Judgement = Ends | Unclear | Stuck | Doubtful | Slow


def has_moved(first: Look, last: Look) -> bool:
    """Whether a request that was in flight at first, or one after it, has ended."""
    return any(
        place not in last.places or requests.ended_until(last.places[place])
        for place, requests in first.places.items()
    )


def judge(looks: Sequence[Look], *, is_last: bool) -> Judgement:
    """Judge the requests in flight by these looks, at least one.

    `is_last`: no further look will be taken, so that the answer is never `Unclear`.
    """
    is_certain = True
    for place in looks[0].places:
        seen = [look.places.get(place) for look in looks]
        there = [requests for requests in seen if requests is not None]
        if len(there) < len(seen):
            continue  # it was empty: what was in flight at first has ended
        judged = _judge_place(place, looks, there, is_last=is_last)
        if not isinstance(judged, Ends):
            return judged
        is_certain = False
    return Ends(is_certain)


def _judge_place(
    place: str, looks: Sequence[Look], seen: Sequence[Requests], *, is_last: bool
) -> Judgement:
    """Judge a place that had requests in flight at each look."""
    first, last = seen[0], seen[-1]
    ended = first.ended_until(last)
    if not ended:
        return Stuck(place, last.count) if is_last else Unclear(place)
    passed_s = looks[-1].at_s - looks[0].at_s
    left_s = last.count * passed_s / ended
    if left_s > SOON_S:
        return Slow(place, last.count, left_s) if is_last else Unclear(place)
    if place in looks[0].spent_s:
        return _judge_pace(place, looks, seen, is_last=is_last)
    return Ends() if ended >= first.count or is_last else Unclear(place)


def _judge_pace(
    place: str, looks: Sequence[Look], seen: Sequence[Requests], *, is_last: bool
) -> Judgement:
    """Judge whether all requests end at a place where some are always in flight.

    If all end, hardly a moment passes in which none does. If one never ends, nothing ends
    while it is alone, for much longer than requests take there. If all end, the requests in
    flight are their total time divided by the time between the looks (Little's law).
    """
    if min(requests.count for requests in seen) >= _MANY:
        return (
            Ends() if is_last or seen[0].ended_until(seen[-1]) >= seen[0].count else Unclear(place)
        )
    takes_s: list[float] = []
    longest_s = stands_s = 0.0
    for (look, requests), (later, after) in pairwise(zip(looks, seen, strict=True)):
        ended = requests.ended_until(after)
        stands_s = 0.0 if ended else stands_s + later.at_s - look.at_s
        longest_s = max(longest_s, stands_s)
        if ended:
            takes_s.append((later.spent_s[place] - look.spent_s[place]) / ended)
    each_s = median(takes_s)
    passed_s = looks[-1].at_s - looks[0].at_s
    explained = (looks[-1].spent_s[place] - looks[0].spent_s[place]) / passed_s
    differ = abs(explained - mean(requests.count for requests in seen))
    goes_on = longest_s <= _LONGEST_STAND * each_s and differ <= _SAME * max(1.0, explained)
    if goes_on and len(looks) >= LEAST_LOOKS and passed_s >= _TURNS * each_s:
        return Ends()
    if not is_last:
        return Unclear(place)
    return Ends() if goes_on else Doubtful(place, seen[-1].count)
