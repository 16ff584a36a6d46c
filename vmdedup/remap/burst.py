"""Several gates one after the other, in one call of compiled code.

Owns what `_gates.c` is told and what it answers. A burst runs with the resolver's lock in
hand and a thread of QEMU that is kept, both by its caller, who also does what is left when
it ends early. Promises the same steps in the same order as a gate in Python, without the
time that Python takes in each; refuses nothing: where the compiled code was not built
there are no bursts (`is_available`), and every gate is closed in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib import import_module

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.errors import BorderError

MOST_GATES = 8
"""In a burst; what is learnt from how long they took is used for the next."""
_MOST_NS = 10_000_000
"""After so long no further gate is begun: the resolver has its turn, and lets a thread go that
has been kept for long."""

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Prepared:
    """The batch of one gate with all that can be known of it before.

    `start`, `pages`: its runs, shape (n,). `seen`: what was witnessed of their pages.
    `calls`: shape (m, 7); the first n each map the run of the same row, all others return
    something that is not negative.
    """

    start: Int64s
    pages: Int64s
    seen: Uint64s
    calls: Uint64s


class State(IntEnum):
    """Why a burst ended, as in `_gates.c`."""

    GO_ON = 0
    """All were done, or time was up."""
    CAREFUL = 1
    """The next one was closed and opened again unused: a page is not as it was witnessed."""
    LAUNCHED = 2
    """The next one is closed, its batch was launched and has not ended as it should."""
    NOT_GIVEN = 3
    """As LAUNCHED, but the batch was not given its guard."""


@dataclass(frozen=True)
class Burst:
    """What became of some gates, from the first on."""

    state: State
    results: list[Int64s]
    """Of the calls of each that was done."""
    closed_ms: list[float]
    """Of each that was done, and of the next one as far as it came."""
    lifted_pages: int


@dataclass(frozen=True)
class Means:
    """What gates are closed with: descriptors of ours, and addresses (here: of ours)."""

    pagemap_fd: int
    userfault_fd: int
    guard_fd: int
    pidfd: int
    table_here: int
    table_there: int
    beat_here: int
    most_calls: int


@cache
def is_available() -> bool:
    """Whether the compiled code was built."""
    try:
        import_module("vmdedup.remap._gates")
    except ImportError:
        return False
    return True


def run_burst(means: Means, batches: Sequence[Prepared], *, deadline_s: float) -> Burst:
    """Close a gate over each batch, until one is not to be closed here.

    Raises OSError when the userfaultfd can not be used any more, and BorderError, without
    closing any, where the columns of a batch do not fit each other.
    """
    from vmdedup.remap import _gates

    counts = [(len(one.start), int(one.pages.sum()), len(one.calls)) for one in batches]
    results = np.empty(sum(calls for _, _, calls in counts), dtype=np.int64)
    closed_ns = np.zeros(len(batches), dtype=np.int64)
    try:
        done, state, lifted_pages = _gates.run(
            (means.pagemap_fd, means.userfault_fd, means.guard_fd, means.pidfd),
            (means.table_here, means.table_there, means.beat_here),
            (int(deadline_s * 1e9), _MOST_NS, means.most_calls),
            np.array(counts, dtype=np.int64),
            np.concatenate([one.start for one in batches]),
            np.concatenate([one.pages for one in batches]),
            np.concatenate([one.seen for one in batches]),
            np.concatenate([one.calls for one in batches]),
            results,
            closed_ns,
            faults.hook,
        )
    except ValueError as error:
        raise BorderError(str(error)) from error
    ends = np.cumsum([calls for _, _, calls in counts])
    return Burst(
        State(state),
        np.split(results, ends[:-1])[:done],
        (closed_ns / 1e6).tolist()[: done + 1],
        lifted_pages,
    )
