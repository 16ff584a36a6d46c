"""From answers and a list of hosts to a plan, or to the best host for one more VM.

Owns what a search is given: limits, VMs that must or must not be together, and what a move
has to save. Promises that VMs without a sketch keep their memory and stay where they are.
Refuses to plan for a host whose limits are not said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vmdedup.core.sketch import Estimate, counted
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.hosts.alike import similarity
from vmdedup.hosts.ask import Answer
from vmdedup.hosts.documents import (
    FleetCandidates,
    FleetPlan,
    Group,
    GroupedVm,
    HostRow,
    Move,
    PlaceForOne,
    VmPlace,
)
from vmdedup.hosts.inventory import HostEntry, Inventory, matches
from vmdedup.hosts.placement import Int64s, Task, copies, cost, filled, improve, least_cost
from vmdedup.hosts.sketch_table import SketchTable
from vmdedup.units import PAGE_BYTES

_LEAST_MARKS = 4
"""Fewest sampled contents that a move has to save: two standard errors of what it saves."""

_RANDOM_TRIES = 5


@dataclass(frozen=True)
class _Vm:
    """A VM that takes memory; `row` is its row in the table, `None` without a sketch."""

    host: int
    name: str
    row: int | None
    ram_bytes: int


def plan(
    table: SketchTable,
    inventory: Inventory,
    answers: Sequence[Answer],
    rows: Sequence[HostRow],
    *,
    worth_percent: float,
    alike: float = 0.5,
) -> FleetPlan:
    """Where the VMs of the hosts that answered should run. Raises UsageError, VmdedupError.

    `alike`: least part of the contents that VMs of a group have in common.
    """
    hosts = [answer.host for answer in answers if answer.report is not None]
    _require_limits(hosts)
    vms = _vms(table, hosts, answers)
    units = _units(vms, inventory.together)
    task = _task(table, hosts, vms, units, inventory.apart)
    now = np.array([vms[unit[0]].host for unit in units], dtype=np.int64)
    start = _brought_together(task, vms, units, now)

    def worth(unit: int) -> float:
        moved = sum(_present_bytes(table, vms[vm]) for vm in units[unit])
        return max(_LEAST_MARKS, worth_percent / 100 * moved / PAGE_BYTES / table.rate) - 1

    order = sorted(range(len(units)), key=lambda unit: vms[units[unit][0]].name)
    by_name = filled(task, order, now)
    found = improve(task, start, worth)
    moves = [
        Move(
            vm=vms[vm].name,
            source=hosts[vms[vm].host].name,
            target=hosts[int(found[number])].name,
            moved_bytes=_present_bytes(table, vms[vm]),
        )
        for number, unit in enumerate(units)
        for vm in unit
        if vms[vm].host != found[number]
    ]
    # By VM: those that have to be together may be on several hosts now.
    each = _task(table, hosts, vms, [[vm] for vm in range(len(vms))], [])
    before = np.array([vm.host for vm in vms], dtype=np.int64)
    after = before.copy()
    for number, unit in enumerate(units):
        after[unit] = found[number]
    saved = _saved(each, before, after, table.rate)
    present = cost(each, before)

    def more_bytes(marks: float) -> int:
        return round((present - marks) * table.rate) * PAGE_BYTES

    return FleetPlan(
        rate=table.rate,
        hosts=list(rows),
        moves=moves,
        groups=_groups(table, answers, moves, alike),
        moved_bytes=sum(move.moved_bytes for move in moves),
        saved_bytes=round(saved.value) * PAGE_BYTES,
        error_bytes=round(saved.error) * PAGE_BYTES,
        most_bytes=more_bytes(least_cost(task)),
        random_bytes=more_bytes(_random_cost(task, now)),
        by_name_bytes=more_bytes(cost(task, now if by_name is None else by_name)),
    )


def candidates(
    table: SketchTable,
    like: str,
    answers: Sequence[Answer],
    rows: Sequence[HostRow],
) -> FleetCandidates:
    """Hosts for one more VM like the VM `like` (`VM`, or `HOST/VM`), the best first."""
    row = _row_of(table, like)
    shared = table.on_hosts(row)
    listed = []
    for answer in answers:
        if answer.report is None:
            continue
        host = answer.host
        estimate = counted(shared.get(host.name, 0), table.rate)
        used = sum(vm.ram_bytes for vm in answer.report.vms)
        has_room = used + table.ram_bytes[row] <= host.room_bytes
        has_room &= host.max_vms is None or len(answer.report.vms) < host.max_vms
        listed.append(
            PlaceForOne(
                host=host.name,
                shared_bytes=round(estimate.value) * PAGE_BYTES,
                error_bytes=round(estimate.error) * PAGE_BYTES,
                has_room=bool(has_room),
            )
        )
    listed.sort(key=lambda each: (not each.has_room, -each.shared_bytes, each.host))
    place = VmPlace(host=table.hosts[row], vm=table.vms[row])
    return FleetCandidates(like=place, rate=table.rate, hosts=list(rows), candidates=listed)


def _row_of(table: SketchTable, like: str) -> int:
    rows = [
        row
        for row, (host, vm) in enumerate(zip(table.hosts, table.vms, strict=True))
        if like in (vm, f"{host}/{vm}")
    ]
    if not rows:
        raise UsageError(
            f"no VM {like} has a sketch: write VM, or HOST/VM (`vmdedup fleet similar`)"
        )
    if len(rows) > 1:
        where = ", ".join(f"{table.hosts[row]}/{table.vms[row]}" for row in rows[:5])
        raise UsageError(f"{like}: several VMs have this name: write one of {where}")
    return rows[0]


def _require_limits(hosts: Sequence[HostEntry]) -> None:
    for host in hosts:
        if host.ram_gib is None and host.max_vms is None:
            raise UsageError(
                f"host {host.name}: a plan needs its limits: ram_gib, max_vms or both in the list"
            )


def _vms(table: SketchTable, hosts: Sequence[HostEntry], answers: Sequence[Answer]) -> list[_Vm]:
    number = {host.name: index for index, host in enumerate(hosts)}
    known: dict[tuple[str, str], list[int]] = {}
    for row, place in enumerate(zip(table.hosts, table.vms, strict=True)):
        known.setdefault(place, []).append(row)
    found: list[_Vm] = []
    for answer in answers:
        for vm in () if answer.report is None else answer.report.vms:
            if vm.status != "gone":
                rows = known.get((answer.host.name, vm.name), [])
                sketched = rows.pop(0) if rows else None
                found.append(_Vm(number[answer.host.name], vm.name, sketched, vm.ram_bytes))
    return found


def _units(vms: Sequence[_Vm], together: Sequence[list[str]]) -> list[list[int]]:
    """VMs that must be on one host, by their numbers; a VM of no group is a unit of its own."""
    unit = list(range(len(vms)))
    for patterns in together:
        members = [number for number, vm in enumerate(vms) if matches(patterns, vm.name)]
        joined = {unit[member] for member in members}
        unit = [min(joined) if each in joined else each for each in unit]
    return [[n for n, each in enumerate(unit) if each == first] for first in sorted(set(unit))]


def _task(
    table: SketchTable,
    hosts: Sequence[HostEntry],
    vms: Sequence[_Vm],
    units: Sequence[list[int]],
    apart: Sequence[list[str]],
) -> Task:
    classes = table.classes
    order = np.argsort(classes.vms, kind="stable")
    by_vm, of_class = classes.vms[order], classes.of_member[order]
    edges = np.searchsorted(by_vm, np.arange(len(table) + 1))

    def classes_of(unit: list[int]) -> Int64s:
        parts = [
            of_class[edges[row] : edges[row + 1]]
            for row in (vms[vm].row for vm in unit)
            if row is not None
        ]
        nothing = np.empty(0, dtype=np.int64)
        return np.asarray(np.unique(np.concatenate([nothing, *parts])), dtype=np.int64)

    sets = []
    for patterns in apart:
        members = [n for n, u in enumerate(units) for vm in u if matches(patterns, vms[vm].name)]
        if len(set(members)) < len(members):
            raise UsageError(f"apart {patterns}: two of these VMs are in one `together`")
        sets.append(frozenset(members))
    return Task(
        weight=classes.marks,
        classes=[classes_of(unit) for unit in units],
        size_bytes=np.array([sum(vms[vm].ram_bytes for vm in unit) for unit in units]),
        vms=np.array([len(unit) for unit in units], dtype=np.int64),
        room_bytes=np.array([host.room_bytes for host in hosts], dtype=np.float64),
        room_vms=np.array(
            [np.inf if host.max_vms is None else host.max_vms for host in hosts], dtype=np.float64
        ),
        apart=sets,
        fixed=frozenset(
            number for number, unit in enumerate(units) if all(vms[vm].row is None for vm in unit)
        ),
    )


def _brought_together(
    task: Task, vms: Sequence[_Vm], units: Sequence[list[int]], now: Int64s
) -> Int64s:
    """A start of the search in which the VMs of each unit are on one host.

    Raises VmdedupError where a unit fits nowhere.
    """
    start = now.copy()
    apart = [number for number, unit in enumerate(units) if len({vms[vm].host for vm in unit}) > 1]
    for number in apart:
        names = ", ".join(vms[vm].name for vm in units[number])
        if number in task.fixed:
            raise VmdedupError(
                f"together: {names}: none has a sketch, and they are on several hosts"
            )
        used = np.bincount(start, task.size_bytes, len(task.room_bytes))
        held = np.bincount(start, task.vms, len(task.room_bytes))
        used[start[number]] -= task.size_bytes[number]
        held[start[number]] -= task.vms[number]
        room = (used + task.size_bytes[number] <= task.room_bytes) & (
            held + task.vms[number] <= task.room_vms
        )
        if not room.any():
            raise VmdedupError(f"together: {names}: no host has room for all of them")
        if not room[start[number]]:
            start[number] = int(room.argmax())
    return start


def _groups(
    table: SketchTable, answers: Sequence[Answer], moves: Sequence[Move], alike: float
) -> list[Group]:
    """The VMs that are alike and on one host after the moves."""
    target = {(move.source, move.vm): move.target for move in moves}
    monitors = {(vm.host, vm.name): vm.qmp for answer in answers for vm in answer.vms}
    found = []
    for kind in similarity(table, [], alike=alike, most_pairs=0).kinds:
        on_host: dict[str, list[GroupedVm]] = {}
        for vm in kind.vms:
            place = vm.host, vm.vm
            home = target.get(place, vm.host)
            on_host.setdefault(home, []).append(GroupedVm(vm=vm.vm, qmp=monitors.get(place)))
        found += [Group(host=host, vms=vms) for host, vms in on_host.items() if len(vms) > 1]
    return found


def _present_bytes(table: SketchTable, vm: _Vm) -> int:
    return vm.ram_bytes if vm.row is None else int(table.present_bytes[vm.row])


def _saved(task: Task, before: Int64s, after: Int64s, rate: int) -> Estimate:
    """What one placement saves more than another: only contents whose copies change count."""
    fewer = copies(task, before) - copies(task, after)
    return counted(int(fewer @ task.weight), rate, float((fewer * fewer) @ task.weight))


def _random_cost(task: Task, now: Int64s) -> float:
    """The mean cost of some random placements within the limits; the present one's if none is."""
    found = []
    for seed in range(_RANDOM_TRIES):
        random = np.random.default_rng(seed)
        placed = filled(task, random.permutation(len(now)).tolist(), now)
        if placed is not None:
            found.append(cost(task, placed))
    return float(np.mean(found)) if found else float(cost(task, now))
