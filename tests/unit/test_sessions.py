"""Which stretches of a VM's memory a session takes from the dirty tracking.

And when a VM has so many mappings that some are to go.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vmdedup.remap.crowding import is_crowded
from vmdedup.remap.session import stretches
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.unit


def pages(*ranges: tuple[int, int]) -> list[tuple[int, int]]:
    return [(first * PAGE_BYTES, behind * PAGE_BYTES) for first, behind in ranges]


def test_narrow_gaps_are_joined_and_wide_ones_stay_out() -> None:
    ranges = pages((40, 41), (0, 2), (10, 20), (36, 40))
    assert stretches(np.array(ranges), pages((0, 100))) == pages((0, 20), (36, 41))


def test_nothing_is_joined_from_one_region_to_the_next() -> None:
    regions = pages((200, 300), (0, 100), (100, 200))
    ranges = pages((198, 200), (99, 100), (100, 101), (200, 201))
    assert stretches(np.array(ranges), regions) == pages(
        (99, 100), (100, 101), (198, 200), (200, 201)
    )


def test_only_the_widest_gaps_stay_out_of_very_many() -> None:
    gap_pages = np.random.default_rng(1).permutation(np.arange(20, 2520))
    first = np.cumsum(gap_pages + 1)
    ranges = pages(*zip(first.tolist(), (first + 1).tolist(), strict=True))
    found = stretches(np.array(ranges), pages((0, int(first[-1]) + 1)))
    assert len(found) == 1025
    left_out = [after[0] - before[1] for before, after in pairwise(found)]
    assert min(left_out) == PAGE_BYTES * sorted(gap_pages[1:].tolist())[-1024]
    assert all(any(low <= a and b <= high for low, high in found) for a, b in ranges[::100])


def test_a_vm_is_crowded_beyond_its_headroom_and_some_slack_once_it_was_looked_at() -> None:
    vm: Any = SimpleNamespace(scan=SimpleNamespace(state=None))
    assert not is_crowded(vm, 0, 0)
    vm.scan.state = SimpleNamespace(process_vmas=760)
    assert not is_crowded(vm, 1000, 256)
    vm.scan.state.process_vmas = 761
    assert is_crowded(vm, 1000, 256)
