"""Several gates one after the other, in one call of compiled code.

Owns the arguments and answers of `_gates.c`. During a burst the caller holds the resolver's
lock and keeps a thread of QEMU; if the burst ends early, the caller does the rest. Promises
the same steps in the same order as a gate in Python, without the time that Python takes in
each. Refuses nothing: if the compiled code was not built there are no bursts (`is_available`),
and every gate is closed in Python.

JUSTIFICATION beside gates in Python (`live`): a guest's writer waits half as long. The median
gate takes 0.44 ms instead of 0.90 on running guests, and a merge a tenth less CPU
(`python -m tests.benchmark.ways --running`, four Debian guests, medians of 7 turns). Guests
that write what is being merged lose without it.
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
"""Most gates in a burst; their durations determine the batch sizes of the next burst."""
_MOST_NS = 10_000_000
"""After this time a burst begins no further gate, so that the resolver can run and release a
thread that has been kept for long."""

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Prepared:
    """The batch of one gate, with everything that can be known of it before.

    `start`, `pages`: its runs, shape (n,). `seen`: the witnessed state of their pages.
    `calls`: shape (m, 7); each of the first n maps the run of the same row. The others must
    return a result that is not negative.
    """

    start: Int64s
    pages: Int64s
    seen: Uint64s
    calls: Uint64s


class BurstState(IntEnum):
    """Why a burst ended, as in `_gates.c`."""

    GO_ON = 0
    """All gates were done, or time was up."""
    CAREFUL = 1
    """The next gate was closed and opened again unused: a page is not as it was witnessed."""
    LAUNCHED = 2
    """The next gate is closed; its batch was launched and has not ended as it should."""
    NOT_GIVEN = 3
    """As LAUNCHED, but the batch did not get its guard."""


@dataclass(frozen=True)
class Burst:
    """The outcome of some gates, from the first on."""

    state: BurstState
    results: list[Int64s]
    """Results of the calls of each finished gate."""
    closed_ms: list[float]
    """How long each finished gate was closed, and the next one so far."""
    lifted_pages: int


@dataclass(frozen=True)
class Means:
    """Our descriptors and addresses for closing gates; `_here`: in our own address space."""

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
    """Close a gate over each batch, up to the first one that is left to the caller.

    Raises OSError if the userfaultfd cannot be used any more. Raises BorderError, without
    closing any gate, if the columns of a batch do not fit each other.
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
        BurstState(state),
        np.split(results, ends[:-1])[:done],
        (closed_ns / 1e6).tolist()[: done + 1],
        lifted_pages,
    )
