"""The number of contents that each pair of VMs has in common.

Owns one count that the report and the census share. Promises an exact, symmetric
int64 matrix whose diagonal is each VM's number of contents. Refuses to define a
content: the caller numbers them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 16
"""Contents counted at once; keeps the float32 product exact (below 2^24) and
the scratch memory at 256 KiB a VM."""


def common_contents(
    vm: NDArray[np.int32], content: NDArray[np.int64], vms: int
) -> NDArray[np.int64]:
    """Matrix (vms, vms): contents that both hold, from (vm, content) pairs.

    Contents are numbered from 0 without large gaps; a pair given twice counts
    once. Each chunk is an incidence table times its transpose.
    """
    matrix = np.zeros((vms, vms), dtype=np.int64)
    if not len(content):
        return matrix
    order = np.argsort(content)
    vm, content = vm[order], content[order]
    limits = np.arange(0, int(content[-1]) + 1 + _CHUNK, _CHUNK)
    bounds = np.searchsorted(content, limits)
    for base, begin, end in zip(limits[:-1], bounds[:-1], bounds[1:], strict=True):
        holds = np.zeros((vms, _CHUNK), dtype=np.float32)
        holds[vm[begin:end], content[begin:end] - base] = 1
        matrix += (holds @ holds.T).astype(np.int64)
    return matrix
