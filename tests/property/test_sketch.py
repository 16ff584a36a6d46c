"""Sketches against the sets that they are a sample of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmdedup.core import sketch
from vmdedup.core.sketch import (
    Estimate,
    Sketch,
    containment,
    contents,
    counted,
    is_sampled,
    keys_of,
    shared_contents,
    sketch_of,
)
from vmdedup.units import COARSEST_RATE, FINEST_RATE, require_rate

pytestmark = pytest.mark.property

KEYS = keys_of(b"a secret of the fleet", "ci")
RATES = [16 << step for step in range(9)]
rates = st.sampled_from(RATES)
digests = st.lists(
    # All of the range, and often what a sketch at the coarsest rate still has.
    st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**60 - 1), st.integers(0, 2**52 + 2)),
    max_size=60,
).map(lambda values: np.array(values, dtype=np.uint64))


@given(digests, rates)
def test_a_sketch_counts_the_sampled_contents(digest: NDArray[np.uint64], rate: int) -> None:
    found = sketch_of(digest, rate, KEYS)
    naive: dict[int, int] = {}
    for value in digest.tolist():
        if value * rate < 2**64:
            naive[value] = naive.get(value, 0) + 1
    assert sorted(found.pages.tolist()) == sorted(naive.values())
    assert (np.diff(found.mark.astype(object)) > 0).all()
    assert contents(found).value == len(naive) * rate


@given(digests, rates, rates)
def test_a_coarser_rate_is_as_if_it_had_been_made_so(
    digest: NDArray[np.uint64], one: int, other: int
) -> None:
    fine, coarse = min(one, other), max(one, other)
    made, expected = sketch_of(digest, fine, KEYS).at(coarse), sketch_of(digest, coarse, KEYS)
    assert made.rate == expected.rate == coarse
    assert made.mark.tolist() == expected.mark.tolist()
    assert made.pages.tolist() == expected.pages.tolist()


@given(digests, digests, rates, rates)
def test_what_both_have_is_found_whatever_their_rates(
    one: NDArray[np.uint64], other: NDArray[np.uint64], a: int, b: int
) -> None:
    rate = max(a, b)
    both = {v for v in one.tolist() if v * rate < 2**64} & set(other.tolist())
    pair = sketch_of(one, a, KEYS), sketch_of(other, b, KEYS)
    assert shared_contents(*pair) == shared_contents(*reversed(pair))
    assert shared_contents(*pair).value == len(both) * rate
    inside = containment(*pair)
    assert 0 <= inside.value <= 1
    assert inside.error > 0


@given(digests, st.binary(min_size=1, max_size=100))
def test_another_secret_or_domain_gives_other_marks(
    digest: NDArray[np.uint64], secret: bytes
) -> None:
    for keys in (keys_of(secret, "ci"), keys_of(b"a secret of the fleet", "other")):
        if keys == KEYS:
            continue
        assert keys.seed != KEYS.seed
        ours, theirs = sketch_of(digest, 16, KEYS), sketch_of(digest, 16, keys)
        below = np.uint64(2**60 - 1)
        assert not set((ours.mark & below).tolist()) & set((theirs.mark & below).tolist())
        with pytest.raises(ValueError, match="different keys"):
            shared_contents(ours, theirs)


def test_a_sketch_is_bounded_whatever_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "MAX_MARKS", 100)
    digest = np.random.default_rng(1).integers(0, 2**64, 50_000, dtype=np.uint64)
    found = sketch_of(digest, 16, KEYS)
    assert len(found) <= 100
    assert found.rate in (512, 1024)
    assert found.mark.tolist() == sketch_of(digest, found.rate, KEYS).mark.tolist()


def draws(seed: int, rate: int, both: int, alone: int) -> tuple[Sketch, Sketch]:
    """Sketches of two VMs with so many contents in both, and in each alone."""
    random = np.random.default_rng(seed)
    digest = random.integers(0, 2**64, both + 2 * alone, dtype=np.uint64)
    one, other = digest[: both + alone], np.concatenate([digest[:both], digest[both + alone :]])
    return sketch_of(one, rate, KEYS), sketch_of(other, rate, KEYS)


@pytest.mark.parametrize("rate", [16, 64, 256])
def test_estimates_are_unbiased_and_their_errors_right(rate: int) -> None:
    """Over 300 sets: the mean is the truth, and 2 standard errors hold it about 95 times in 100."""
    both, alone, tries = 6000, 2000, 300
    for truth, estimate in ((both, shared_contents), (both / (both + alone), containment)):
        found: list[Estimate] = [estimate(*draws(seed, rate, both, alone)) for seed in range(tries)]
        off = np.array([each.value - truth for each in found])
        spread = off.std() / math.sqrt(tries)
        assert abs(off.mean()) < 4 * spread
        inside = np.mean([abs(o) <= 2 * each.error for o, each in zip(off, found, strict=True)])
        assert 0.9 < inside <= 1
        typical = float(np.mean([each.error for each in found]))
        assert typical == pytest.approx(off.std(), rel=0.2)


def test_the_error_of_a_difference_counts_what_changes_only() -> None:
    assert counted(0, 256) == counted(0, 256, 0)
    assert counted(0, 256).error == pytest.approx(256, rel=0.01)
    assert counted(100, 256).error == pytest.approx(2568, rel=0.001)
    assert counted(0, 256, 100).error == counted(100, 256).error


@pytest.mark.parametrize("rate", [0, 8, 17, 100, 8192])
def test_no_other_rates(rate: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        require_rate(rate)
    assert [require_rate(each) for each in RATES] == RATES
    assert (RATES[0], RATES[-1]) == (FINEST_RATE, COARSEST_RATE)


def test_the_sample_is_of_the_lowest_digests() -> None:
    digest = np.array([0, 2**60 - 1, 2**60, 2**64 - 1], dtype=np.uint64)
    assert is_sampled(digest, 16).tolist() == [True, True, False, False]
