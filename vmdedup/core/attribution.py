"""Pages by where their content comes from.

Pure. Owns the counting: each page of each VM gets the label of its content, and counts as
shared if any other page of any VM has the same content. Promises that a VM's shared and
unique pages sum to the pages that were given. Zero pages are the caller's: he gives none.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Attribution:
    """Pages by label; the last label is that of contents that no source has."""

    shared: NDArray[np.int64]
    """Pages whose content another page has too: shape (VMs, labels)."""
    unique: NDArray[np.int64]
    """All other pages: shape (VMs, labels)."""
    pairs: dict[tuple[int, int], NDArray[np.int64]]
    """Distinct contents that two VMs both have, by label: shape (labels,). The pairs with most,
    these first."""


def attribute(
    vms: Sequence[NDArray[np.uint64]],
    known: NDArray[np.uint64],
    label: NDArray[np.int32],
    labels: int,
    most_pairs: int,
) -> Attribution:
    """Attribute each VM's pages, given by their digests, to `labels` and one label more.

    `known`: ascending digests, none twice, each with its `label`.
    """
    held = [np.unique(digest, return_counts=True) for digest in vms]
    every = np.concatenate([np.empty(0, dtype=np.uint64), *(distinct for distinct, _ in held)])
    content, which = np.unique(every, return_inverse=True)
    pages = np.concatenate([np.empty(0, dtype=np.int64), *(counts for _, counts in held)])
    total = np.bincount(which, weights=pages, minlength=len(content)).astype(np.int64)
    of_content = _labels(content, known, label, labels)
    shared, unique, holding = [], [], []
    begin = 0
    for distinct, counts in held:
        mine = which[begin : begin + len(distinct)]
        begin += len(distinct)
        is_shared = total[mine] > 1
        shared.append(_by_label(of_content[mine], np.where(is_shared, counts, 0), labels))
        unique.append(_by_label(of_content[mine], np.where(is_shared, 0, counts), labels))
        holding.append(mine)
    pairs = _pairs(holding, of_content, labels)
    largest = heapq.nlargest(most_pairs, pairs, key=lambda pair: int(pair[1].sum()))
    shape = (len(vms), labels + 1)
    return Attribution(
        np.array(shared, dtype=np.int64).reshape(shape),
        np.array(unique, dtype=np.int64).reshape(shape),
        dict(largest),
    )


def _pairs(
    holding: Sequence[NDArray[np.int64]], of_content: NDArray[np.int64], labels: int
) -> Iterator[tuple[tuple[int, int], NDArray[np.int64]]]:
    for one, mine in enumerate(holding):
        is_mine = np.zeros(len(of_content), dtype=np.bool_)
        is_mine[mine] = True
        for other in range(one + 1, len(holding)):
            common = holding[other][is_mine[holding[other]]]
            yield (one, other), np.bincount(of_content[common], minlength=labels + 1)


def label_pages(
    vms: Sequence[NDArray[np.uint64]],
    known: NDArray[np.uint64],
    label: NDArray[np.int32],
    labels: int,
) -> NDArray[np.int64]:
    """Pages of all VMs together by label, arguments as `attribute`; shape (labels,)."""
    pages = np.zeros(labels + 1, dtype=np.int64)
    for digest in vms:
        pages += np.bincount(_labels(digest, known, label, labels), minlength=labels + 1)
    return pages[:-1]


def _labels(
    content: NDArray[np.uint64], known: NDArray[np.uint64], label: NDArray[np.int32], labels: int
) -> NDArray[np.int64]:
    """The label of each content; `labels` for one that is not known."""
    found = np.full(len(content), labels, dtype=np.int64)
    if len(known):
        at = np.minimum(np.searchsorted(known, content), len(known) - 1)
        is_known = known[at] == content
        found[is_known] = label[at[is_known]]
    return found


def _by_label(label: NDArray[np.int64], pages: NDArray[np.int64], labels: int) -> NDArray[np.int64]:
    return np.bincount(label, weights=pages, minlength=labels + 1).astype(np.int64)
