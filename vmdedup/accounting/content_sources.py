"""Where the contents of VMs' memory come from (`vmdedup explain --contents`).

Owns one look at all memory of attached VMs, piece by piece, and the count of its digests among
those of known files, which needs no VM. Promises that nothing changes by it, except that a
store page that was swapped out is read in. A guest changes what it has read: a page counts
for a source only if it is the same still. Pages that are swapped out or absent are not looked
at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmdedup.core.attribution import Attribution, attribute, label_pages
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

MOST_PARTS, MOST_FOLDERS = 40, 20
"""Most parts of known sources that are told apart, and most folders that stand for others."""
_FOLDER_DEPTH = 3
MOST_PAIRS = 200
"""Most pairs of VMs that are told: those with most contents in common."""
OTHER_PARTS = "other parts"


class Label(NamedTuple):
    """A source, or a part of it; the source is `None` for contents that are in none."""

    source: str | None
    part: str


@dataclass(frozen=True)
class HeldContents:
    """What one VM has in memory."""

    name: str
    pid: int
    zero_pages: int
    digest: npt.NDArray[np.uint64]
    """Of each page that is not zero."""


def held_contents(vm: AttachedVm) -> Generator[None, None, HeldContents]:
    """Look at one VM; stops after each piece. Raises VmError."""
    state, _, digest = yield from vm.scan.held_digests(SEED)
    is_zero = digest == ZERO
    zero_pages = int(np.count_nonzero(state.zero)) + int(np.count_nonzero(is_zero))
    return HeldContents(vm.name, vm.pid, zero_pages, digest[~is_zero])


def content_sources(held: Sequence[HeldContents], known: Sequence[KnownPages]) -> ContentSources:
    """Count the pages of these VMs by known files."""
    digests = [each.digest for each in held]
    labels, digest, label = _numbered(known)
    labels, column = _shown(labels, label_pages(digests, digest, label, len(labels)))
    found = attribute(digests, digest, column[label], len(labels), MOST_PAIRS)
    labels.append(Label(None, ""))
    shared = found.shared.sum(axis=0)
    return ContentSources(
        known=[
            KnownSource(
                path=each.source,
                kind=each.kind,
                pages=len(each.digest),
                parts=sum(part != "" for part in each.parts),
            )
            for each in known
        ],
        shared_pages=int(shared.sum()),
        explained_pages=int(shared[:-1].sum()),
        vms=[
            VmSources(
                name=vm.name,
                pid=vm.pid,
                zero_pages=vm.zero_pages,
                sources=_of_vm(labels, found, number),
            )
            for number, vm in enumerate(held)
        ],
        pairs=[
            PairSources(vms=[held[one].name, held[other].name], sources=_of_pair(labels, pages))
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


def _shown(
    labels: Sequence[Label], pages: npt.NDArray[np.int64]
) -> tuple[list[Label], npt.NDArray[np.int32]]:
    """The labels that are told apart, and which of them stands for each label.

    Files beyond the largest count as their folder, and those of small folders together.
    """
    alone = {labels[at] for at in np.argsort(-pages, kind="stable")[:MOST_PARTS].tolist()}
    rest: Counter[Label] = Counter()
    for label, held in zip(labels, pages.tolist(), strict=True):
        if label not in alone:
            rest[_folder(label)] += held
    folders = {folder for folder, _ in rest.most_common(MOST_FOLDERS)}

    def shown(label: Label) -> Label:
        if label in alone:
            return label
        folder = _folder(label)
        return folder if folder in folders else Label(label.source, OTHER_PARTS)

    number: dict[Label, int] = {}
    column = [number.setdefault(shown(label), len(number)) for label in labels]
    return list(number), np.array(column, dtype=np.int32)


def _folder(label: Label) -> Label:
    """The folder that a file counts as: the upper ones of its path."""
    above = label.part.split("/")[:-1][:_FOLDER_DEPTH]
    return Label(label.source, "/".join([*above, ""]) if above else OTHER_PARTS)


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
