"""Gates: the moments in which a guest's memory may be changed.

Owns what merging and unmerging need of them (`Session`, `Gate`), whichever of the two ways
there is to be sure that a page can not change between being compared and being remapped:
`live.LiveSession` where no VM is stopped, `pause.StoppedSession` between `stop` and `cont`.

Promises for both: no call of a batch runs any more once its gate is opened, however it is
left. In a gate nothing waits for the monitor or for a thread of QEMU that may touch guest
memory: calls run on QEMU's RCU thread, which never does, and which is also the only one
that unmaps RAM blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.burst import Prepared
from vmdedup.core.gate_size import BatchSize, GateSize
from vmdedup.errors import InjectionError, MergeError
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import RemoteThread
from vmdedup.procfs.pagemap import Pagemap

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]


@dataclass
class Timings:
    """What a session cost the guest; times in milliseconds."""

    gate_ms: list[float] = field(default_factory=list)
    drain_ms: list[float] = field(default_factory=list)
    stopped_ms: list[float] = field(default_factory=list)
    lifted_pages: int = 0


class DrainsAndStops(Protocol):
    """What a session needs of a monitor."""

    def require_drainable(self) -> None: ...
    def drain(self, *, timeout_s: float) -> float: ...
    def stop(self) -> None: ...
    def cont(self) -> None: ...
    def status(self) -> str: ...


class GateMissedError(MergeError):
    """The gate was not done by its deadline and was opened again; retry later."""


class Gate(Protocol):
    """One batch, while nothing can change it."""

    def entries(self, start: Int64s, pages: Int64s) -> Uint64s:
        """The page table entries of these runs now: uint64, shape (pages.sum(),)."""

    def held(self, entries: Uint64s, since: Uint64s | None = None) -> npt.NDArray[np.bool_]:
        """Which pages certainly can not change now, by their `entries`.

        With `since`, what `Session.witness` gave for them: and have not changed since then.
        """

    def run(self, calls: Uint64s) -> npt.NDArray[np.int64]:
        """Run system calls inside QEMU; at most once per gate. Results are -errno on failure."""


class Session(Protocol):
    """A stretch of time in which batches of one VM may be changed."""

    timings: Timings

    @property
    def size(self) -> BatchSize | GateSize:
        """Of the next gate's batch."""

    def arm(self, start: Int64s, pages: Int64s) -> None:
        """Prepare these runs; before the first gate, and once."""

    def witness(self, start: Int64s, pages: Int64s) -> Uint64s | None:
        """What the kernel says of these armed runs: uint64, shape (pages.sum(),).

        For `Gate.held`. None where nothing vouches for the time before a gate.
        """

    def fill(
        self, span: tuple[int, int], target: Int64s, source: Int64s, length_bytes: Int64s
    ) -> bool:
        """Fill scratch memory in `span` with ours, as `Userfault.fill`; whether it could be."""

    def gate(self, start: Int64s, pages: Int64s) -> GateContext:
        """Hold these runs; they were armed."""

    @property
    def reading(self) -> Callable[[Uint64s, Int64s], Int64s] | None:
        """Runs rows that only read on QEMU's borrowed thread, with no gate closed.

        None where there is nothing to read outside of gates.
        """

    @property
    def most_gates(self) -> int:
        """How many batches `gates` would take now; 0: none, each needs a `gate`."""

    def gates(self, batches: Sequence[Prepared]) -> list[Int64s]:
        """Run the calls of armed and witnessed batches, each in a gate of its own.

        Returns the results of the first ones, up to all. The next one needs a `gate`, where
        it is looked at page by page.
        """


class GateContext(Protocol):
    """A gate around a block."""

    def __enter__(self) -> Gate: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None: ...


class Batch:
    """Calls on the held thread, and the certainty that they have ended."""

    def __init__(self, remote: RemoteThread, pagemap: Pagemap, guard: Guard | None = None) -> None:
        self._remote = remote
        self._pagemap = pagemap
        self._guard = guard
        self._settled = False
        self.launched = False

    def entries(self, start: Int64s, pages: Int64s) -> Uint64s:
        """The page table entries of these runs now."""
        return self._pagemap.entries_of(start, pages)

    def _run(self, calls: Uint64s, timeout_s: float) -> Int64s:
        self.launched = True
        self._remote.launch(calls, guard=self._guard, keep=self._guard is not None)
        faults.reached("launched")
        return self._ended(timeout_s)

    def _ended(self, timeout_s: float) -> Int64s:
        results = _wait_out(self._remote, timeout_s)
        self._settled = True
        return results

    def settle(self) -> None:
        """After an exception (Ctrl-C) in the middle of `run`: wait until nothing runs."""
        while self.launched and not self._settled:
            with suppress(KeyboardInterrupt, InjectionError):
                self._remote.cancel()
                if self._remote.is_running:
                    self._remote.wait(math.inf)
                self._settled = True


def _wait_out(remote: RemoteThread, timeout_s: float) -> Int64s:
    """Results of the launched calls; past the timeout no further call is begun.

    Calls that were not begun give -ECANCELED.
    """
    try:
        return remote.wait(timeout_s)
    except InjectionError as error:
        if not error.started:
            raise
        # SAFETY: a launched call must never run after the gate was opened: its page
        # could have been written in between. So wait for the one that runs, for as
        # long as it takes; the guardian ends us if that is too long.
        remote.cancel()
        return remote.wait(math.inf)
