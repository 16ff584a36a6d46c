"""Made-up VMs with sketches, for hosts that do not exist: a tree of images.

Every VM has the contents of its base, those of its image, and some of its own. So what any two
have in common is known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.core.sketch import keys_of, sketch_of
from vmdedup.hosts.ask import SketchedVm

KEYS = keys_of(b"a secret of the fleet", "ci")


@dataclass(frozen=True)
class Tree:
    """Contents of each VM from its base, its image, and its own; images per base."""

    base_pages: int = 20_000
    image_pages: int = 30_000
    own_pages: int = 10_000
    images: int = 3

    def digests(self, image: int, number: int) -> npt.NDArray[np.uint64]:
        """The contents of VM `number` of an image."""
        parts = (
            _numbers(1, image // self.images, self.base_pages),
            _numbers(2, image, self.image_pages),
            _numbers(3, number, self.own_pages),
        )
        return np.concatenate(parts)

    def shared_pages(self, one: int, other: int) -> int:
        """Contents that two VMs of these images have in common."""
        same_base = one // self.images == other // self.images
        return self.base_pages * same_base + self.image_pages * (one == other)

    def vm(self, host: str, image: int, number: int, rate: int, name: str = "") -> SketchedVm:
        """A VM of 1 GiB on a host."""
        return SketchedVm(
            host=host,
            name=name or f"image{image}-vm{number}",
            trust_domain="ci",
            uuid=None,
            present_bytes=(self.base_pages + self.image_pages + self.own_pages) * 4096,
            ram_bytes=1 << 30,
            sketch=sketch_of(self.digests(image, number), rate, KEYS),
            only_here=None,
        )


def _numbers(kind: int, number: int, size: int) -> npt.NDArray[np.uint64]:
    return np.random.default_rng([kind, number]).integers(0, 1 << 64, size, dtype=np.uint64)
