"""Gates: the moments in which a guest's memory may be changed.

Owns the interface that merging and unmerging use (`Session`, `Gate`). Two classes keep a page
from changing between comparison and remap: `live.LiveSession` without stopping the VM,
`stopped.StoppedSession` between `stop` and `cont`.

Promises for both: no call of a batch runs any more once its gate is opened, however it is
left. In a gate nothing waits for the monitor or for a thread of QEMU that may touch guest
memory. Calls run on QEMU's RCU thread, which never touches it, and which is also the only
thread that unmaps RAM blocks.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.gate_size import BatchSize, GateSize
from vmdedup.errors import InjectionError, MergeError, VmError
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.maps import read_maps
from vmdedup.linux.pagemap import Pagemap
from vmdedup.linux.syscalls import NR
from vmdedup.remap.advice import SETTINGS, settings_within
from vmdedup.remap.burst import Prepared
from vmdedup.vm.timings import Timings

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

_MOST_TRIES = 5
"""Most attempts to map back what a failed remap has unmapped."""
_MEND_S = 1.0
"""How long each attempt may take, and that to set again what was late."""


class DrainsAndStops(Protocol):
    """The calls of a monitor that a session needs."""

    @property
    def misses_events(self) -> bool: ...
    @property
    def turn_left_s(self) -> float: ...
    def turn(self) -> AbstractContextManager[None]: ...
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
        """Which pages certainly cannot change now, by their `entries`.

        `since`: what `Session.witness` gave for them; they must not have changed since then.
        """

    def run(self, calls: Uint64s) -> npt.NDArray[np.int64]:
        """Run system calls inside QEMU; at most once per gate. Results are -errno on failure."""


class Session(Protocol):
    """A stretch of time in which batches of one VM may be changed."""

    timings: Timings
    protects_absent: bool
    """Whether absent pages are held too; if not, a page must be read first to be held."""
    way_back: WayBack
    """How a page that a failed remap has unmapped is mapped again; set before the first gate."""

    @property
    def size(self) -> BatchSize | GateSize:
        """Largest batch of the next gate."""

    def arm(self, start: Int64s, pages: Int64s) -> None:
        """Prepare these runs; call it once, before the first gate."""

    def rest(self) -> None:
        """Announce that no gate follows soon: the next step may take long."""

    def witness(self, start: Int64s, pages: Int64s) -> Uint64s | None:
        """The kernel's state of these armed runs, for `Gate.held`: uint64, (pages.sum(),).

        `None` if nothing keeps track of the time before a gate.
        """

    def fill(
        self, span: tuple[int, int], target: Int64s, source: Int64s, length_bytes: Int64s
    ) -> bool:
        """Fill scratch memory in `span` with ours, as `Userfault.fill`; whether it worked."""

    def gate(self, start: Int64s, pages: Int64s) -> GateContext:
        """Hold these runs; they were armed."""

    @property
    def reading(self) -> Callable[[Uint64s, Int64s], Int64s] | None:
        """Runs rows that only read on QEMU's borrowed thread, with no gate closed.

        `None` if there is nothing to read outside of gates.
        """

    @property
    def most_gates(self) -> int:
        """How many batches `gates` would take now; `0`: none, each needs a `gate`."""

    def gates(self, batches: Sequence[Prepared]) -> list[Int64s]:
        """Run the calls of armed and witnessed batches, each in a gate of its own.

        Returns the results of the first ones, up to all. The next one needs a `gate`, which
        checks it page by page.
        """


WayBack = Callable[[Uint64s], Uint64s]
"""Gives, for remapping calls, others that map the same addresses with the same content."""


def the_same(calls: Uint64s) -> Uint64s:
    """The way back if only the same calls can give the content: try them again."""
    return calls


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
    """Calls on the held thread; ensures that they have ended."""

    def __init__(
        self,
        remote: RemoteThread,
        pagemap: Pagemap,
        guard: Guard | None = None,
        *,
        way_back: WayBack = the_same,
    ) -> None:
        self._remote = remote
        self._pagemap = pagemap
        self._guard = guard
        self._way_back = way_back
        self._settled = False
        self.launched = False

    def entries(self, start: Int64s, pages: Int64s) -> Uint64s:
        """The page table entries of these runs now."""
        return self._pagemap.entries_of(start, pages)

    def _run(self, calls: Uint64s, timeout_s: float) -> Int64s:
        self.launched = True
        if not self._remote.stands_still:
            self._remote.hold()
        self._remote.launch(calls, guard=self._guard, keep=self._guard is not None)
        faults.reached("launched")
        return self._ended(timeout_s)

    def _ended(self, timeout_s: float) -> Int64s:
        results = _wait_out(self._remote, timeout_s)
        self._settled = True
        return results

    def _mended(self, calls: Uint64s, results: Int64s) -> Int64s:
        """The results, once no range is a hole or lacks QEMU's settings; the gate is still closed.

        A range that was mapped back keeps the result of its failed remap. Raises VmError.
        """
        moves = calls[:, 0] == NR.MREMAP
        remaps = moves | (calls[:, 0] == NR.MMAP)
        is_late = results == -errno.ECANCELED
        failed = np.flatnonzero(remaps & (results < 0) & ~is_late)
        if not len(failed) and not is_late.any():
            return results
        start = np.where(moves, calls[:, 5], calls[:, 1]).astype(np.int64)
        end = start + np.where(moves, calls[:, 3], calls[:, 2]).astype(np.int64)
        placed = remaps & (results > 0)
        filled = self._filled(calls, start, end, failed)
        placed[filled] = True
        # The settings after a failed remap met the hole, so they are made again too.
        wanted = np.isin(calls[:, 0], SETTINGS) & (is_late | bool(len(filled)))
        if not wanted.any():
            return results
        set_again = np.zeros_like(results)
        if placed.any():
            set_again = self._set_again(settings_within(calls, start[placed], end[placed]))
        return np.where(wanted, set_again, results)

    def _filled(self, calls: Uint64s, start: Int64s, end: Int64s, failed: Int64s) -> Int64s:
        """Which of these failed remaps had left holes, in which content is mapped now.

        SAFETY: up to Linux 6.11 a MAP_FIXED or mremap that fails for lack of memory may have
        unmapped what was there (mm/mmap.c: mmap_region). QEMU dies when it touches such a
        hole, so it is mapped again at once. Killed before: as if QEMU itself had met the limit.
        """
        filled = holes = failed[:0]
        if not len(failed):
            return filled
        for _ in range(_MOST_TRIES):
            maps = read_maps(self._remote.vm, self._remote.pid)
            is_hole = [not maps.covers(int(start[row]), int(end[row])) for row in failed]
            holes = failed[np.array(is_hole, dtype=np.bool_)]
            filled = np.union1d(filled, holes)
            if not len(holes):
                return filled
            self._settled = False
            self._run(self._way_back(calls[holes]), _MEND_S)
            faults.reached("mended")
        where = f"{int(start[holes[0]]):#x}"
        raise VmError(
            self._remote.vm, f"its memory at {where} could not be mapped back", pid=self._remote.pid
        )

    def _set_again(self, settings: Uint64s) -> Int64s:
        """The results of these settings of what was remapped, although time ran out.

        SAFETY: without MADV_DONTFORK a fork of QEMU would copy guest RAM. The calls change no
        content. Killed before: the pages of this gate lack these settings, which changes nothing
        for the guest. Merged pages get them when they are unmerged; pages that came home do not.
        """
        faults.reached("settings-late")
        self._settled = False
        try:
            return self._run(settings, _MEND_S)
        except InjectionError:  # uncovered: the thread was held a moment ago
            return np.full(len(settings), -errno.ECANCELED)

    def settle(self) -> None:
        """Wait until nothing runs, after an exception (Ctrl-C) in the middle of `run`."""
        while self.launched and not self._settled:
            with suppress(KeyboardInterrupt, InjectionError):
                self._remote.cancel()
                if self._remote.is_running:
                    self._remote.wait(math.inf)
                self._settled = True


def _wait_out(remote: RemoteThread, timeout_s: float) -> Int64s:
    """Results of the launched calls; after the timeout no further call is begun.

    Calls that were not begun give -ECANCELED.
    """
    try:
        return remote.wait(timeout_s)
    except InjectionError:
        # SAFETY: a launched call must never run after the gate was opened: its page
        # could have been written in between. So wait for the running call, however
        # long it takes; the guardian kills us if that is too long.
        remote.cancel()
        return remote.wait(math.inf)
