"""Our estimates beside those of `datasketch`, an independent library, on the same sets."""

from __future__ import annotations

import importlib
import importlib.util
import math

import numpy as np
import pytest

from tests.harness.skips import require
from vmdedup.core.sketch import counted, keys_of, shared_contents, sketch_of

pytestmark = pytest.mark.unit

KEYS = keys_of(b"a secret of the fleet", "ci")


@pytest.mark.parametrize(("both", "alone"), [(0, 20_000), (2_000, 18_000), (15_000, 5_000)])
def test_both_are_near_the_truth_and_so_near_each_other(both: int, alone: int) -> None:
    require(None if importlib.util.find_spec("datasketch") else "datasketch is not installed")
    datasketch = importlib.import_module("datasketch")
    random = np.random.default_rng(both)
    digest = random.integers(0, 2**64, both + 2 * alone, dtype=np.uint64)
    sets = digest[: both + alone], np.concatenate([digest[:both], digest[both + alone :]])
    permutations = 1024
    theirs = [datasketch.MinHash(num_perm=permutations, seed=7) for _ in sets]
    sizes = [datasketch.HyperLogLogPlusPlus(p=14) for _ in sets]
    for values, minhash, size in zip(sets, theirs, sizes, strict=True):
        raw = [int(value).to_bytes(8, "little") for value in values]
        minhash.update_batch(raw)
        for each in raw:
            size.update(each)
    jaccard = theirs[0].jaccard(theirs[1])
    total = sum(size.count() for size in sizes)
    oracle = total * jaccard / (1 + jaccard)
    # Jaccard's own standard error, carried to the count; 2 % for the sizes.
    error = total * math.sqrt(max(jaccard, 1 / permutations) / permutations) + 0.02 * oracle
    ours = shared_contents(*(sketch_of(values, 16, KEYS) for values in sets))
    assert abs(ours.value - both) <= 4 * ours.error
    assert abs(oracle - both) <= 4 * error
    assert abs(ours.value - oracle) <= 4 * math.hypot(ours.error, error)
    assert ours.error <= counted(both / 16 + 4 * math.sqrt(both / 16), 16).error + 16
