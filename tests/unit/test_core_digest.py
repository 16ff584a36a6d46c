"""Digests and fingerprints of real bytes."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from vmdedup.core.digest import (
    digest_pages,
    fingerprint_pages,
    zero_digest,
    zero_fingerprint,
)
from vmdedup.errors import UsageError
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.unit

SEED = 0x1234_5678_9ABC_DEF0
PAGES = [bytes(PAGE_BYTES), b"a" * PAGE_BYTES, bytes(PAGE_BYTES - 1) + b"\1", b"a" * PAGE_BYTES]
BUFFER = b"".join(PAGES)


def test_each_page_has_the_digest_of_its_own_bytes() -> None:
    expected = [xxhash.xxh3_64(page, seed=SEED).intdigest() for page in PAGES]
    digests = digest_pages(BUFFER, SEED)
    assert digests.dtype == np.uint64
    assert digests.tolist() == expected
    assert digests[0] == zero_digest(SEED) != digests[2]


def test_each_page_has_the_fingerprint_of_its_own_bytes() -> None:
    expected = [xxhash.xxh3_128(page, seed=SEED).intdigest() for page in PAGES]
    prints = fingerprint_pages(BUFFER, SEED)
    assert prints.dtype == np.uint64
    assert prints.shape == (len(PAGES), 2)
    assert [(high << 64) | low for high, low in prints.tolist()] == expected
    assert prints[0].tolist() == zero_fingerprint(SEED).tolist() != prints[2].tolist()


def test_another_seed_gives_other_digests() -> None:
    assert not set(digest_pages(BUFFER, 1).tolist()) & set(digest_pages(BUFFER, 2).tolist())


def test_any_buffer_of_whole_pages_will_do() -> None:
    with mmap.mmap(-1, len(BUFFER)) as mapped:
        mapped[:] = BUFFER
        with memoryview(mapped) as view:
            of_mapping = digest_pages(view, SEED)
    words = np.frombuffer(BUFFER, dtype=np.uint64)
    for same in (of_mapping, digest_pages(bytearray(BUFFER), SEED), digest_pages(words.data, SEED)):
        assert same.tolist() == digest_pages(BUFFER, SEED).tolist()


@pytest.mark.parametrize("hash_pages", [digest_pages, fingerprint_pages])
def test_part_of_a_page_is_refused_and_none_is_no_page(
    hash_pages: Callable[[bytes, int], NDArray[np.uint64]],
) -> None:
    assert len(hash_pages(b"", SEED)) == 0
    with pytest.raises(UsageError, match="4097 bytes"):
        hash_pages(bytes(PAGE_BYTES + 1), SEED)
