"""Which VMs are alike, on whatever hosts.

Owns the kinds and the pairs. Promises that VMs with the same contents are compared once,
however many they are, and that memory is bounded however many pairs there are. Refuses fleets
whose pairs would take an hour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vmdedup.core.sketch import counted
from vmdedup.errors import VmdedupError
from vmdedup.hosts.documents import Alike, FleetSimilarity, HostRow, Kind, VmPlace
from vmdedup.hosts.grouping import Int64s, Part
from vmdedup.hosts.sketch_table import Classes, SketchTable
from vmdedup.units import PAGE_BYTES

_MOST_JOINED = 100_000_000_000
"""Most (pair, class) combinations: 45 million took a second on two busy cores."""
_PAIRS_AT_ONCE = 8_000_000
"""Pairs in memory at a time, 100 bytes each."""

Pairs = tuple[Int64s, Int64s, Int64s]
"""The first VM of each pair, the second, and how many sampled contents both have."""


def similarity(
    table: SketchTable, hosts: Sequence[HostRow], *, alike: float, most_pairs: int
) -> FleetSimilarity:
    """The kinds of VMs and the pairs that share most; `alike`: least part of the contents
    that VMs of one kind have in common.

    Raises VmdedupError for too large a fleet.
    """
    contents, twin = table.contents, _twins(table.classes, len(table))
    nothing = np.empty(0, dtype=np.int64)
    most: Pairs = (nothing, nothing, nothing)
    kind = _joined(np.arange(len(table)), *_alike(_twin_pairs(table, twin), contents, alike))
    for some in _pairs(table, twin):
        kind = _joined(kind, *_alike(some, contents, alike))
        most = _most(most, some, most_pairs)

    def place(vm: int) -> VmPlace:
        return VmPlace(host=table.hosts[vm], vm=table.vms[vm])

    pairs = []
    for a, b, found in zip(*(each.tolist() for each in most), strict=True):
        estimate = counted(found, table.rate)
        pairs.append(
            Alike(
                one=place(a),
                other=place(b),
                shared_bytes=round(estimate.value) * PAGE_BYTES,
                error_bytes=round(estimate.error) * PAGE_BYTES,
                of_one=found / max(1, int(contents[a])),
                of_other=found / max(1, int(contents[b])),
            )
        )
    kinds = [
        Kind(trust_domain=table.domains[members[0]], vms=[place(vm) for vm in members])
        for members in _groups(kind)
        if len(members) > 1
    ]
    return FleetSimilarity(rate=table.rate, hosts=list(hosts), kinds=kinds, pairs=pairs)


def _twins(classes: Classes, vms: int) -> Int64s:
    """For each VM the first that is in exactly the same classes; itself if it is in none."""
    # Sums of random numbers tell sets of classes apart: two of 64 bits, wrong once in 2^127.
    random = np.random.default_rng(0).integers(0, 1 << 63, (2, len(classes)), dtype=np.uint64)
    sums = np.zeros((2, vms), dtype=np.uint64)
    for row in range(2):
        np.add.at(sums[row], classes.vms, random[row][classes.of_member])
    alone = ~np.isin(np.arange(vms), classes.vms)
    sums[:, alone] = np.arange(vms, dtype=np.uint64)[alone]
    sums = np.vstack([sums, alone.astype(np.uint64)])
    _, first, which = np.unique(sums, axis=1, return_index=True, return_inverse=True)
    return np.asarray(first[which.ravel()], dtype=np.int64)


def _pairs(table: SketchTable, twin: Int64s) -> Iterator[Pairs]:
    """Pairs that share sampled contents, some at a time: of twins only the first two VMs."""
    number = np.arange(len(twin))
    first_twin = np.full(len(twin), len(twin))
    np.minimum.at(first_twin, twin[twin != number], number[twin != number])
    compared = (twin == number) | (first_twin[twin] == number)
    classes = table.classes
    sizes = np.bincount(classes.of_member[compared[classes.vms]], minlength=len(classes))
    if (joined := int((sizes * (sizes - 1) // 2).sum())) > _MOST_JOINED:
        raise VmdedupError(
            f"{joined:,} pairs to compare, over {_MOST_JOINED:,}: take a coarser --rate, or fewer"
            " hosts"
        )
    vms = np.flatnonzero(compared)
    parts = -(-min(joined, len(vms) * (len(vms) - 1) // 2) // _PAIRS_AT_ONCE)
    for part in range(parts):
        yield table.pairs(vms, Part(part, parts))


def _twin_pairs(table: SketchTable, twin: Int64s) -> Pairs:
    """Each VM with its first twin: they have in common all that the VM shares with any."""
    classes = table.classes
    again = np.flatnonzero(twin != np.arange(len(twin)))
    shared = np.bincount(classes.vms, classes.marks[classes.of_member], len(twin))
    return twin[again], again, shared[again].astype(np.int64)


def _most(one: Pairs, other: Pairs, most: int) -> Pairs:
    """The pairs of both that share most, the most first."""
    first, second, marks = (np.concatenate(each) for each in zip(one, other, strict=True))
    if len(marks) > most > 0:
        kept = marks >= np.partition(marks, -most)[-most]
        first, second, marks = first[kept], second[kept], marks[kept]
    order = np.lexsort((second, first, -marks))[:most]
    return first[order], second[order], marks[order]


def _alike(pairs: Pairs, contents: Int64s, alike: float) -> tuple[Int64s, Int64s]:
    """The pairs that share at least this part of the contents of the smaller VM."""
    one, other, marks = pairs
    smaller = np.maximum(np.minimum(contents[one], contents[other]), 1)
    is_alike = marks >= alike * smaller
    return one[is_alike], other[is_alike]


def _joined(kind: Int64s, one: Int64s, other: Int64s) -> Int64s:
    """For each VM the first VM of its kind, after the VMs of each pair are of one kind too."""
    while True:
        lower = np.minimum(kind[one], kind[other])
        found = kind.copy()
        for side in (one, other):
            np.minimum.at(found, kind[side], lower)
            np.minimum.at(found, side, lower)
        found = found[found]
        if (found == kind).all():
            return kind
        kind = found


def _groups(kind: Int64s) -> list[list[int]]:
    """The VMs of each kind, the largest kind first."""
    order = np.argsort(kind, kind="stable")
    edges = np.flatnonzero(np.diff(kind[order])) + 1
    groups = [group.tolist() for group in np.split(order, edges)] if len(kind) else []
    return sorted(groups, key=lambda members: (-len(members), members[0]))
