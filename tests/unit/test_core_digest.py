"""Digests and fingerprints of real bytes."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import xxhash

from vmdedup.core.digest import (
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


def test_a_page_of_zeroes_has_the_digest_of_its_bytes() -> None:
    assert zero_digest(SEED) == xxhash.xxh3_64(bytes(PAGE_BYTES), seed=SEED).intdigest()


def test_each_page_has_the_fingerprint_of_its_own_bytes() -> None:
    expected = [xxhash.xxh3_128(page, seed=SEED).intdigest() for page in PAGES]
    prints = fingerprint_pages(BUFFER, SEED)
    assert prints.dtype == np.uint64
    assert prints.shape == (len(PAGES), 2)
    assert [(high << 64) | low for high, low in prints.tolist()] == expected
    assert prints[0].tolist() == zero_fingerprint(SEED).tolist() != prints[2].tolist()


def test_another_seed_gives_other_fingerprints() -> None:
    one, other = fingerprint_pages(BUFFER, 1), fingerprint_pages(BUFFER, 2)
    assert not set(map(tuple, one.tolist())) & set(map(tuple, other.tolist()))


def test_any_buffer_of_whole_pages_will_do() -> None:
    with mmap.mmap(-1, len(BUFFER)) as mapped:
        mapped[:] = BUFFER
        with memoryview(mapped) as view:
            of_mapping = fingerprint_pages(view, SEED)
    words = np.frombuffer(BUFFER, dtype=np.uint64)
    others = [fingerprint_pages(each, SEED) for each in (bytearray(BUFFER), words.data)]
    for same in (of_mapping, *others):
        assert same.tolist() == fingerprint_pages(BUFFER, SEED).tolist()


def test_part_of_a_page_is_refused_and_none_is_no_page() -> None:
    assert len(fingerprint_pages(b"", SEED)) == 0
    with pytest.raises(UsageError, match="4097 bytes"):
        fingerprint_pages(bytes(PAGE_BYTES + 1), SEED)
