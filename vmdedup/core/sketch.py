"""Sketches: what VMs on different hosts would share, from a sample of their contents.

Owns the sample (FracMinHash: every content whose digest is below a threshold, so the same
contents on every host), the marks that stand for contents outside of a host, and the
estimators. Promises unbiased estimates of counts, each with its standard error; that a sketch
at a finer rate can be made into exactly the one at a coarser rate; and that who has marks and
not the key learns of a content only whether others have it, and how often. Refuses to compare
sketches under different keys: their marks have nothing to do with each other.

    Irber et al., "Lightweight compositional analysis of metagenomes with FracMinHash" (2022);
    Hera et al., "Deriving confidence intervals for mutation rates ... FracMinHash" (2023)

Zero pages are no part of the sample: every VM has them, and they share without a partner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmdedup.units import FINEST_RATE

MAX_MARKS: Final = 1 << 16
"""Most contents in one sketch: 768 KiB. What has more is sampled at a coarser rate."""

_DEEPEST: Final = 15
_DEPTH_SHIFT: Final = np.uint64(60)
_FINEST_BITS: Final = FINEST_RATE.bit_length() - 1


@dataclass(frozen=True, slots=True)
class Sketch:
    """The sampled contents of one VM's pages that hold still, or of several VMs.

    `mark`: uint64, ascending, one for each content; `pages`: uint32, how many pages have it.
    A mark is 60 bits of a keyed hash below 4 bits that say how coarse a sample it is still in.
    """

    key_id: str
    rate: int
    mark: NDArray[np.uint64]
    pages: NDArray[np.uint32]

    def __len__(self) -> int:
        """Contents in the sample."""
        return len(self.mark)

    def at(self, rate: int) -> Sketch:
        """The sketch at a coarser rate, as if it had been made so."""
        return self if rate <= self.rate else self.only_at(rate)

    def only_at(self, rate: int) -> Sketch:
        """What of the sketch is in a sample at this rate."""
        keep = self.mark >> _DEPTH_SHIFT >= np.uint64(rate.bit_length() - 1 - _FINEST_BITS)
        return Sketch(self.key_id, rate, self.mark[keep], self.pages[keep])


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that was counted in a sample only."""

    value: float
    error: float
    """Standard error: the value is off by at most twice this in 95 of 100 samples."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What a secret becomes for one trust domain."""

    seed: int
    """Seed of the digests, so that hosts with the secret give a content one digest."""
    mark_key: bytes
    key_id: str
    """Says whether two sketches have the same key, and nothing about it."""


def keys_of(secret: bytes, domain: str) -> Keys:
    """The keys of a trust domain under a secret of any length."""
    root = blake2b(secret, digest_size=64, person=b"vmdedup-sketch").digest()
    name = domain.encode()

    def derived(purpose: bytes, size: int) -> bytes:
        return blake2b(name, digest_size=size, key=root, person=purpose).digest()

    seed = int.from_bytes(derived(b"seed", 8), "little")
    return Keys(seed, derived(b"mark", 32), derived(b"name", 8).hex())


def is_sampled(digest: NDArray[np.uint64], rate: int) -> NDArray[np.bool_]:
    """Whether each content is in the sample: bool, same shape."""
    return np.asarray(digest < np.uint64((1 << 64) // rate))


def sketch_of(digest: NDArray[np.uint64], rate: int, keys: Keys) -> Sketch:
    """The sketch of pages with these digests, of which all that are sampled must be given.

    Its rate is the next coarser one with at most MAX_MARKS contents.
    """
    content, pages = np.unique(digest[is_sampled(digest, rate)], return_counts=True)
    while len(content) > MAX_MARKS:
        rate *= 2
        keep = is_sampled(content, rate)
        content, pages = content[keep], pages[keep]
    mark = _marks(content, keys.mark_key)
    order = np.argsort(mark)
    return Sketch(keys.key_id, rate, mark[order], pages[order].astype(np.uint32))


def _marks(content: NDArray[np.uint64], key: bytes) -> NDArray[np.uint64]:
    """The marks of sampled digests: a keyed hash, since a digest can be guessed from a page."""
    raw = content.astype("<u8").tobytes()
    hashed = b"".join(
        [blake2b(raw[at : at + 8], digest_size=8, key=key).digest() for at in range(0, len(raw), 8)]
    )
    # Digits of the digest in base 2: `frexp` of 2^k has the exponent k + 1. A float has 53 of
    # them exactly, and those below do not matter.
    width = np.frexp((content >> np.uint64(11)).astype(np.float64))[1] + 11
    depth = np.clip(64 - width - _FINEST_BITS, 0, _DEEPEST).astype(np.uint64)
    below = np.frombuffer(hashed, dtype="<u8").astype(np.uint64) >> np.uint64(4)
    return np.asarray(below | depth << _DEPTH_SHIFT)


def comparable(*sketches: Sketch) -> list[Sketch]:
    """The sketches at the coarsest rate among them. Raises ValueError for different keys."""
    if len({sketch.key_id for sketch in sketches}) > 1:
        raise ValueError("sketches under different keys have nothing in common to compare")
    rate = max(sketch.rate for sketch in sketches)
    return [sketch.at(rate) for sketch in sketches]


def contents(sketch: Sketch) -> Estimate:
    """Distinct contents of the VM."""
    return counted(len(sketch), sketch.rate)


def shared_contents(one: Sketch, other: Sketch) -> Estimate:
    """Distinct contents that both have: the pages saved more if both are on one host."""
    one, other = comparable(one, other)
    return counted(_in_both(one, other), one.rate)


def containment(one: Sketch, other: Sketch) -> Estimate:
    """The share of `one`'s contents that `other` has as well; 0 with error 1 if none is known."""
    one, other = comparable(one, other)
    if not len(one):
        return Estimate(0.0, 1.0)
    share = _in_both(one, other) / len(one)
    # By Wilson's midpoint: a share of 0 or 1 in a small sample is not certain.
    middle = (_in_both(one, other) + 1) / (len(one) + 2)
    return Estimate(share, math.sqrt(middle * (1 - middle) / len(one)))


def counted(found: float, rate: int, squares: float | None = None) -> Estimate:
    """The estimate of a sum over contents from the sum over those sampled.

    `squares`: the sum of squares of what is summed, without: `found`, as each counts 1. Each
    content is in the sample by itself with probability 1/rate (Horvitz and Thompson). One content
    is added for the error: where few were found, chance may have left out the others.
    """
    squares = abs(found) if squares is None else squares
    return Estimate(found * rate, math.sqrt((squares + 1) * rate * (rate - 1)))


def _in_both(one: Sketch, other: Sketch) -> int:
    return len(np.intersect1d(one.mark, other.mark, assume_unique=True))
