"""Where the contents of VMs' memory come from (`vmdedup explain --contents`).

Owns one look at all memory of attached VMs, whose digests are looked up among those of known
files. Promises that nothing changes by it, except that a store page that was swapped out is
read in. A guest changes what it has read: a page counts for a source only if it is the same
still. Pages that are swapped out or absent are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmdedup.core.attribution import Attribution, attribute
from vmdedup.known.pages import SEED, ZERO, KnownPages
from vmdedup.models import (
    ContentSources,
    KnownSource,
    PairPages,
    PairSources,
    SourcePages,
    VmSources,
)
from vmdedup.vm.attached_vm import AttachedVm

MOST_PARTS = 40
"""Most parts of known sources that are told apart; the others of a source count together."""
OTHER_PARTS = "other parts"


class Label(NamedTuple):
    """A source, or a part of it; the source is `None` for contents that are in none."""

    source: str | None
    part: str


def content_sources(vms: Sequence[AttachedVm], known: Sequence[KnownPages]) -> ContentSources:
    """Look at these VMs. Raises VmError for a VM that cannot be read."""
    digests, zero_pages = [], []
    for vm in vms:
        state, _, digest = vm.scan.held_digests(SEED)
        is_zero = digest == ZERO
        digests.append(digest[~is_zero])
        zero_pages.append(int(np.count_nonzero(state.zero)) + int(np.count_nonzero(is_zero)))
    labels, digest, label = _numbered(known)
    found = attribute(digests, digest, label, len(labels))
    labels, found = _joined([*labels, Label(None, "")], found)
    shared = found.shared.sum(axis=0)
    return ContentSources(
        known=[
            KnownSource(path=each.source, kind=each.kind, pages=len(each.digest)) for each in known
        ],
        shared_pages=int(shared.sum()),
        explained_pages=int(shared[:-1].sum()),
        vms=[
            VmSources(
                name=vm.name,
                pid=vm.pid,
                zero_pages=zero_pages[number],
                sources=_of_vm(labels, found, number),
            )
            for number, vm in enumerate(vms)
        ],
        pairs=[
            PairSources(vms=[vms[one].name, vms[other].name], sources=_of_pair(labels, pages))
            for (one, other), pages in found.pairs.items()
        ],
    )


def _numbered(
    known: Sequence[KnownPages],
) -> tuple[list[Label], npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """All labels, and the ascending digests of all sources; the first source wins."""
    labels = [Label(each.source, part) for each in known for part in each.parts]
    begins = np.cumsum([0, *(len(each.parts) for each in known)])
    digests = [np.empty(0, dtype=np.uint64), *(each.digest for each in known)]
    numbers = [np.empty(0, dtype=np.int32)]
    numbers += [each.part + np.int32(at) for each, at in zip(known, begins.tolist(), strict=False)]
    digest, first = np.unique(np.concatenate(digests), return_index=True)
    return labels, digest, np.concatenate(numbers)[first]


def _joined(labels: list[Label], found: Attribution) -> tuple[list[Label], Attribution]:
    """The same with the smallest parts of each source as one. The last label stays the last."""
    pages = found.shared.sum(axis=0) + found.unique.sum(axis=0)
    largest = set(np.argsort(-pages[:-1], kind="stable")[:MOST_PARTS].tolist())
    kept = [
        label if at in largest or label.source is None else Label(label.source, OTHER_PARTS)
        for at, label in enumerate(labels)
    ]
    names = list(dict.fromkeys(kept))
    number = {name: at for at, name in enumerate(names)}
    column = np.array([number[name] for name in kept])
    is_in = (column[:, None] == np.arange(len(names))).astype(np.int64)

    def summed(pages: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.asarray(pages @ is_in)

    pairs = {pair: summed(contents) for pair, contents in found.pairs.items()}
    return names, Attribution(summed(found.shared), summed(found.unique), pairs)


def _of_vm(labels: list[Label], found: Attribution, vm: int) -> list[SourcePages]:
    rows = [
        SourcePages(
            source=label.source,
            part=label.part,
            shared_pages=int(found.shared[vm, at]),
            unique_pages=int(found.unique[vm, at]),
        )
        for at, label in enumerate(labels)
    ]
    some = [row for row in rows if row.shared_pages or row.unique_pages]
    return sorted(some, key=lambda row: -(row.shared_pages + row.unique_pages))


def _of_pair(labels: list[Label], contents: npt.NDArray[np.int64]) -> list[PairPages]:
    rows = [
        PairPages(source=label.source, part=label.part, pages=pages)
        for label, pages in zip(labels, contents.tolist(), strict=True)
        if pages
    ]
    return sorted(rows, key=lambda row: -row.pages)
