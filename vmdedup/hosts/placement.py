"""Where VMs should run so that most is shared: a search over moves and exchanges.

Pure: numbers in, numbers out. Owns the search, and what a placement costs: for each class of
contents one copy on each host with a VM that has it. Promises a placement within every limit,
never worse than the present one, and only moves worth their bytes. It need not be the best.

A *unit* is a VM, or several that must stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_NOWHERE = -1
"""Host of a unit that was taken from its own."""

_KICK, _MOST_KICKS, _KICKED_UNITS = 3, 60, 6000
"""Random exchanges that lead out of a local optimum; how often, and for how many units in all."""


@dataclass(frozen=True)
class Task:
    """What is to be placed, and where it may be."""

    weight: Int64s
    """Sampled contents of each class."""
    classes: Sequence[Int64s]
    """The classes of each unit, ascending."""
    size_bytes: Int64s
    """Memory that each unit needs if nothing is shared."""
    vms: Int64s
    """VMs of each unit."""
    room_bytes: Floats
    """Memory of each host for VMs."""
    room_vms: Floats
    apart: Sequence[frozenset[int]] = ()
    """Sets of units of which no host may have two."""
    fixed: frozenset[int] = frozenset()
    """Units that stay where they are."""


@dataclass
class _State:
    """A placement while it is changed."""

    task: Task
    host: Int64s
    count: npt.NDArray[np.int16] = field(init=False)
    """Units with each class, by class and host: of 10,000 VMs on a host at most."""
    used_bytes: Floats = field(init=False)
    used_vms: Floats = field(init=False)

    def __post_init__(self) -> None:
        hosts = len(self.task.room_bytes)
        self.count = np.zeros((len(self.task.weight), hosts), dtype=np.int16)
        self.used_bytes, self.used_vms = np.zeros(hosts), np.zeros(hosts)
        self.host = self.host.copy()
        for unit, host in enumerate(self.host.tolist()):
            self.put(unit, host)

    def put(self, unit: int, host: int) -> None:
        """Put a unit that is on no host on this one."""
        self._count(unit, host, 1)
        self.host[unit] = host

    def take(self, unit: int) -> None:
        """Take a unit from its host."""
        self._count(unit, int(self.host[unit]), -1)
        self.host[unit] = _NOWHERE

    def move(self, unit: int, host: int) -> None:
        self.take(unit)
        self.put(unit, host)

    def _count(self, unit: int, host: int, sign: int) -> None:
        self.count[self.task.classes[unit], host] += sign
        self.used_bytes[host] += sign * self.task.size_bytes[unit]
        self.used_vms[host] += sign * self.task.vms[unit]

    def gains(self, unit: int) -> Int64s:
        """Sampled contents saved more if the unit moves to each host; 0 for its own."""
        own, classes = int(self.host[unit]), self.task.classes[unit]
        weight, count = self.task.weight[classes], self.count[classes]
        # Floats are exact up to 2^53, and many times as fast here.
        there = weight.astype(np.float64) @ (count > 0).astype(np.float64)
        gains = there.astype(np.int64) - (count[:, own] > 1) @ weight
        gains[own] = 0
        return np.asarray(gains, dtype=np.int64)

    def gain(self, unit: int, host: int) -> int:
        """`gains` for one host, which is not the unit's own."""
        classes = self.task.classes[unit]
        weight = self.task.weight[classes]
        there = (self.count[classes, host] > 0) @ weight
        return int(there - (self.count[classes, self.host[unit]] > 1) @ weight)

    def fits(self, unit: int) -> npt.NDArray[np.bool_]:
        """On which hosts there is room for the unit, beside all that are there."""
        room = self.used_bytes + self.task.size_bytes[unit] <= self.task.room_bytes
        room &= self.used_vms + self.task.vms[unit] <= self.task.room_vms
        for group in self.task.apart:
            if unit in group:
                there = self.host[list(group - {unit})]
                room[there[there != _NOWHERE]] = False
        return np.asarray(room)

    def is_within(self, host: int) -> bool:
        """Whether a host's limits hold."""
        task = self.task
        if (
            self.used_bytes[host] > task.room_bytes[host]
            or self.used_vms[host] > task.room_vms[host]
        ):
            return False
        return all(sum(1 for unit in group if self.host[unit] == host) < 2 for group in task.apart)


def copies(task: Task, host: Int64s) -> Int64s:
    """For each class the hosts that have it, and so the copies of its contents."""
    return np.asarray((_State(task, host).count > 0).sum(axis=1), dtype=np.int64)


def cost(task: Task, host: Int64s) -> int:
    """Sampled contents over all hosts, each as often as hosts have it."""
    return int(copies(task, host) @ task.weight)


def least_cost(task: Task) -> int:
    """No placement costs less: each class on as few hosts as the units that have it fit on."""
    most = float(task.room_vms.max()) if len(task.room_vms) else 0.0
    members = np.zeros(len(task.weight))
    for classes, vms in zip(task.classes, task.vms.tolist(), strict=True):
        members[classes] += vms
    # A unit of several VMs counts as one that fits, which keeps the bound below the truth.
    return int(np.ceil(members / max(most, 1.0)).clip(min=1) @ task.weight) if most else 0


def improve(task: Task, host: Int64s, worth: Callable[[int], float], *, rounds: int = 20) -> Int64s:
    """A placement reached from `host` by moves and exchanges.

    `worth(unit)`: sampled contents that moving the unit has to save at least.
    """
    state = _State(task, host)
    _descend(state, rounds)
    best, least = state.host.copy(), cost(task, state.host)
    random = np.random.default_rng(0)
    for _ in range(min(_MOST_KICKS, _KICKED_UNITS // max(1, len(host)))):
        for _ in range(_KICK):
            _exchange_at_random(state, random)
        _descend(state, rounds)
        if (now := cost(task, state.host)) < least:
            best, least = state.host.copy(), now
        else:
            state = _State(task, best)
    state = _State(task, best)
    _undo_what_is_not_worth_it(state, host, worth)
    return state.host


def _descend(state: _State, rounds: int) -> None:
    """Take steps that save until none is left, or so many rounds over all units are done."""
    for _ in range(rounds):
        steps = [
            _move_or_exchange(state, unit)
            for unit in range(len(state.host))
            if unit not in state.task.fixed
        ]
        if not any(steps):
            return


def _exchange_at_random(state: _State, random: np.random.Generator) -> None:
    """Have two units change places whatever that saves, if the limits allow it."""
    one, other = random.integers(0, len(state.host), 2).tolist()
    here, there = int(state.host[one]), int(state.host[other])
    if here == there or {one, other} & state.task.fixed:
        return
    state.move(one, there)
    state.move(other, here)
    if not (state.is_within(here) and state.is_within(there)):
        state.move(one, here)
        state.move(other, there)


def _move_or_exchange(state: _State, unit: int) -> bool:
    """Take the best step that this unit can take; whether there was one that saves."""
    gains, fits = state.gains(unit), state.fits(unit)
    possible = np.where(fits, gains, 0)
    best = int(possible.argmax())
    gain, exchange = int(possible[best]), -1
    # Only hosts with more to gain than that are worth looking for an exchange.
    for target in np.argsort(-gains, kind="stable")[:4].tolist():
        if gains[target] <= gain:
            break
        for other in np.flatnonzero(state.host == target).tolist():
            if other in state.task.fixed:
                continue
            # Once the unit is there, the other one gains here less than now, or as much.
            if gains[target] + state.gain(other, int(state.host[unit])) <= gain:
                continue
            found = _gain_of_exchange(state, unit, other)
            if found > gain:
                gain, best, exchange = found, target, other
    if gain <= 0:
        return False
    if exchange >= 0:
        state.move(exchange, int(state.host[unit]))
    state.move(unit, best)
    return True


def _gain_of_exchange(state: _State, one: int, other: int) -> int:
    """Sampled contents saved more if two units change places; 0 if limits forbid it."""
    here, there = int(state.host[one]), int(state.host[other])
    gain = state.gain(one, there)
    state.move(one, there)
    gain += state.gain(other, here)
    state.move(other, here)
    allowed = state.is_within(here) and state.is_within(there)
    state.move(one, here)
    state.move(other, there)
    return gain if allowed else 0


def _undo_what_is_not_worth_it(
    state: _State, before: Int64s, worth: Callable[[int], float]
) -> None:
    """Send units back, alone or in exchange, whose move saves less than it has to."""
    again = True
    while again:
        again = False
        for unit in np.flatnonzero(state.host != before).tolist():
            home, there = int(before[unit]), int(state.host[unit])
            if state.fits(unit)[home]:
                if -state.gain(unit, home) <= worth(unit):
                    state.move(unit, home)
                    again = True
                continue
            for other in np.flatnonzero((state.host == home) & (before == there)).tolist():
                gain = _gain_of_exchange(state, unit, other)
                if gain != 0 and -gain <= worth(unit) + worth(other):
                    state.move(other, there)
                    state.move(unit, home)
                    again = True
                    break


def filled(task: Task, order: Sequence[int], before: Int64s) -> Int64s | None:
    """The placement that fills hosts one after the other in this order of all units.

    `None` where something does not fit: that order is no placement.
    """
    state = _State(task, before)
    moved = [unit for unit in order if unit not in task.fixed]
    for unit in moved:
        state.take(unit)
    for unit in moved:
        fits = state.fits(unit)
        if not fits.any():
            return None
        state.put(unit, int(fits.argmax()))
    return state.host
