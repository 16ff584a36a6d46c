"""KSM's result against a simulation of its two trees, page after page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.counters import sharing_counts
from vmdedup.core.ksm_rules import ksm_sites

pytestmark = pytest.mark.property

VMS = st.lists(st.lists(st.integers(0, 4), max_size=30), max_size=4)


def simulated(vms: Sequence[Sequence[int]], most: int) -> tuple[int, int]:
    """(pages_shared, pages_sharing) once a scan changes nothing (cmp_and_merge_page)."""
    dups: dict[int, list[int]] = {}
    waiting = [content for vm in vms for content in vm]
    while True:
        unstable: set[int] = set()
        left: list[int] = []
        for content in waiting:
            chain = dups.setdefault(content, [])
            room = [at for at, users in enumerate(chain) if users < most]
            if room:
                chain[max(room, key=chain.__getitem__)] += 1
            elif content in unstable:
                unstable.remove(content)
                left.remove(content)
                chain.append(2)
            else:
                unstable.add(content)
                left.append(content)
        if left == waiting:
            break
        waiting = left
    shared = sum(map(len, dups.values()))
    return shared, sum(users for chain in dups.values() for users in chain) - shared


@given(VMS, st.integers(2, 6))
def test_it_is_what_the_trees_come_to(vms: list[list[int]], most: int) -> None:
    sites = ksm_sites([np.array(vm, dtype=np.uint64) for vm in vms], most)
    counts = sharing_counts(sites, [0] * len(vms))
    assert (counts.pages_shared, counts.pages_sharing) == simulated(vms, most)
    users = Counter(node for vm in sites for node in vm.tolist())
    assert all(2 <= number <= most for number in users.values())
    for vm, merged in zip(vms, counts.vm_merged_pages, strict=True):
        assert merged <= len(vm)
