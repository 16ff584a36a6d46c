"""Both trees, and the sort below them, against dicts."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core import unstable_tree
from vmdedup.core.rmap import FIRST_SLOT
from vmdedup.core.sorting import stable_order
from vmdedup.core.stable_tree import NOT_FOUND, StableTree
from vmdedup.core.unstable_tree import group

from .strategies import DIGESTS

pytestmark = pytest.mark.property


@given(st.lists(DIGESTS, max_size=60))
def test_stable_order_is_numpys_stable_argsort(values: list[int]) -> None:
    column = np.array(values, dtype=np.uint64)
    assert stable_order(column).tolist() == np.argsort(column, kind="stable").tolist()


@given(
    st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 40)), DIGESTS, max_size=60),
    st.randoms(use_true_random=False),
    st.sampled_from([3, 1 << 17]),
)
def test_groups_are_the_contents_with_two_sites(
    sites: dict[tuple[int, int], int], random: Random, piece_sites: int
) -> None:
    shuffled = list(sites.items())
    random.shuffle(shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unstable_tree, "_PIECE_SITES", piece_sites)
        patch.setattr(unstable_tree, "_SPLIT_SITES", 7)
        groups = group(
            np.array([digest for _, digest in shuffled], dtype=np.uint64),
            np.array([vm for (vm, _), _ in shuffled], dtype=np.int32),
            np.array([page for (_, page), _ in shuffled], dtype=np.int64),
        )

    naive: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for site in sorted(sites):
        naive[sites[site]].append(site)
    repeated = {digest: where for digest, where in naive.items() if len(where) >= 2}

    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for vm, page, number in zip(
        groups.vm.tolist(), groups.page.tolist(), groups.group.tolist(), strict=True
    ):
        found[int(groups.digest[number])].append((vm, page))
    assert dict(found) == repeated
    assert len(groups) == len(repeated)
    assert groups.sites.tolist() == [len(repeated[int(d)]) for d in groups.digest]

    firsts = [(int(groups.vm[at]), int(groups.page[at])) for at in groups.first]
    assert firsts == sorted(where[0] for where in repeated.values())
    assert firsts == [repeated[int(digest)][0] for digest in groups.digest]
    for vm in range(5):
        assert set(groups.vm[groups.of_vm(vm)].tolist()) <= {vm}
    assert sum(len(groups.page[groups.of_vm(vm)]) for vm in range(5)) == len(groups.page)


TREE_STEP = st.one_of(
    st.tuples(st.just("insert"), st.lists(DIGESTS, max_size=6)),
    st.tuples(st.just("remove"), st.lists(st.integers(0, 30), max_size=4)),
)


@given(st.lists(TREE_STEP, max_size=12), st.lists(DIGESTS, max_size=10))
def test_stable_tree_is_a_dict_of_lists(
    steps: list[tuple[str, list[int]]], others: list[int]
) -> None:
    tree = StableTree()
    naive: dict[int, int] = {}  # slot to digest, in order of insertion
    next_slot = FIRST_SLOT
    for verb, values in steps:
        column = np.array(values, dtype=np.uint64)
        if verb == "insert":
            new = range(next_slot, next_slot + len(values))
            tree.insert(column, np.array(new, dtype=np.int32))
            naive.update(zip(new, values, strict=True))
            next_slot += len(values)
        else:
            tree.remove(column.astype(np.int32))
            naive = {slot: digest for slot, digest in naive.items() if slot not in values}
        needles = [*naive.values(), *others]
        holding = [[s for s, d in naive.items() if d == needle] for needle in needles]
        expected = [slots[0] if slots else NOT_FOUND for slots in holding]
        asked = np.array(needles, dtype=np.uint64)
        assert tree.search(asked).tolist() == expected
        page = np.arange(3, 3 + len(needles))
        of_page = [
            slots[at % len(slots)] if slots else NOT_FOUND
            for slots, at in zip(holding, page.tolist(), strict=True)
        ]
        assert tree.search(asked, page).tolist() == of_page
        assert len(tree) == len(naive)
