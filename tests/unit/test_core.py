"""What the core refuses, and sizes at which only large inputs show anything."""

from __future__ import annotations

import numpy as np
import pytest

from vmdedup.core.census import Census
from vmdedup.core.counters import sharing_counts
from vmdedup.core.matrix import common_contents
from vmdedup.core.plan import assign_slots
from vmdedup.core.rmap import BYTES_PER_PAGE, PageColumns
from vmdedup.core.sorting import stable_order
from vmdedup.core.unstable_tree import Groups, group
from vmdedup.errors import StoreError, UsageError

pytestmark = pytest.mark.unit


def a_group() -> Groups:
    return group(
        np.array([9, 9], dtype=np.uint64),
        np.array([0, 1], dtype=np.int32),
        np.array([3, 4], dtype=np.int64),
    )


def test_columns_take_what_they_say_and_no_more_than_the_limit() -> None:
    columns = PageColumns(1_000)
    assert columns.memory_bytes == 1_000 * BYTES_PER_PAGE
    assert BYTES_PER_PAGE <= 24


def test_the_last_slot_is_given_and_none_after_it() -> None:
    last = 2**31 - 1
    assert assign_slots(a_group(), last).tolist() == [last]
    with pytest.raises(StoreError, match="slots"):
        assign_slots(a_group(), last + 1)


def test_pages_without_a_vm_are_refused() -> None:
    census = Census(np.zeros(2, dtype=np.uint64))
    with pytest.raises(UsageError):
        census.feed_zero(1)
    with pytest.raises(UsageError):
        census.feed(np.zeros((1, 2), dtype=np.uint64))
    census.add_vm("a")
    census.feed_zero(1)
    assert census.result().zero_pages == 1


def test_sites_and_zero_pages_must_be_of_the_same_vms() -> None:
    with pytest.raises(UsageError, match="1 VMs"):
        sharing_counts([np.empty(0, dtype=np.int32)], [])


def test_stable_order_of_many_digests_that_differ_only_in_their_low_bits() -> None:
    random = np.random.default_rng(7)
    spread = random.integers(0, 2**64, 50_000, dtype=np.uint64)
    low = np.uint64(2**40) + random.integers(0, 2**17, 50_000, dtype=np.uint64)
    digests = np.concatenate((spread, low, spread[:10_000]))
    random.shuffle(digests)
    assert np.array_equal(stable_order(digests), np.argsort(digests, kind="stable"))


def test_matrix_counts_over_many_chunks() -> None:
    contents = 200_000
    every = np.arange(contents, dtype=np.int64)
    third = every[every % 3 == 0]
    content = np.concatenate((every, third, third))
    vm = np.repeat(np.array([0, 1, 1], dtype=np.int32), [len(every), len(third), len(third)])
    shared = len(third)
    assert common_contents(vm, content, 3).tolist() == [
        [contents, shared, 0],
        [shared, shared, 0],
        [0, 0, 0],
    ]


def test_census_of_more_pages_than_it_keeps_unsorted() -> None:
    number = np.arange(1_000_000, dtype=np.uint64)
    contents = np.stack((number * np.uint64(0x9E3779B97F4A7C15), number + np.uint64(1)), axis=1)
    census = Census(np.zeros(2, dtype=np.uint64))
    census.add_vm("big")
    for batch in (contents[:600_000], contents[600_000:], contents[:500_000]):
        census.feed(batch)
    big = census.result().vms[0]
    assert (big.total_pages, big.distinct_pages) == (1_500_000, 1_000_000)
    assert big.duplicate_pages == 500_000
