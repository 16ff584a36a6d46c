"""Digests of the pages of a known file, and which part of it each comes from.

Owns the digest: XXH3-64 under a fixed seed, so that a file is digested once and not again
for each run. Nothing is merged by it. A guest that makes pages collide on purpose only makes
a report about itself wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from vmdedup.core.digest import zero_digest
from vmdedup.units import PAGE_BYTES

SEED = 0x766D6465_64757031
"""Of all digests that are kept on disk."""
ZERO = np.uint64(zero_digest(SEED))


@dataclass(frozen=True)
class KnownPages:
    """The distinct non-zero pages of one known file."""

    source: str
    """Path of the file or folder, as the user gave it."""
    kind: str
    parts: tuple[str, ...]
    """Names inside the source: a member of an archive, a file of a folder."""
    digest: NDArray[np.uint64]
    """Ascending, none twice; shape (n,)."""
    part: NDArray[np.int32]
    """Index in `parts` of each page; the first part wins that has it."""


def page_digests(data: bytes | memoryview) -> NDArray[np.uint64]:
    """The digest of each page of `data`; the last page is filled up with zeroes."""
    view = memoryview(data)
    whole = len(view) - len(view) % PAGE_BYTES
    found = [
        xxh3_64_intdigest(view[at : at + PAGE_BYTES], SEED) for at in range(0, whole, PAGE_BYTES)
    ]
    if whole < len(view):
        found.append(xxh3_64_intdigest(bytes(view[whole:]).ljust(PAGE_BYTES, b"\0"), SEED))
    return np.array(found, dtype=np.uint64)


def known_pages(
    source: str, kind: str, found: Iterable[tuple[str, NDArray[np.uint64]]]
) -> KnownPages:
    """The pages of a source from (part, digests of its pages), part by part.

    Names of parts may be a guest's: nothing in them reaches a terminal but what can be printed.
    """
    parts: dict[str, int] = {}
    digests, numbers = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int32)]
    for part, digest in found:
        digests.append(digest)
        at = parts.setdefault(part, len(parts))
        numbers.append(np.full(len(digest), at, dtype=np.int32))
    distinct, first = np.unique(np.concatenate(digests), return_index=True)
    part_of = np.concatenate(numbers)[first]
    is_content = distinct != ZERO
    names = tuple("".join(it if it.isprintable() else "?" for it in part) for part in parts)
    return KnownPages(source, kind, names, distinct[is_content], part_of[is_content])
