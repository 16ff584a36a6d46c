"""Merging: the equal pages of one VM onto the store and the zero page.

Owns the order *verify, close the gate, remap*. The content already stands in the
store. A page is remapped only if its bytes are equal to what it will show then, and
if inside the gate the kernel says that it is held and has not changed since they
were compared: digests nominate, bytes decide. They are compared before the gate is
closed, so that nobody waits for it; where only a pause keeps pages from changing, in
the gate.

Refuses nothing by itself; what may be merged was decided before.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmdedup import faults, syscalls
from vmdedup.core.gate_size import BatchSize, GateSize
from vmdedup.core.plan import Runs, runs
from vmdedup.core.rmap import ZERO
from vmdedup.core.sorting import ranges
from vmdedup.errors import VmError
from vmdedup.gate import GateMissedError, Session
from vmdedup.memory.reader import PageVanishedError, page_buffer, read_runs
from vmdedup.memory.space import PageSpace
from vmdedup.memory.store import PublishedPages
from vmdedup.reapply import Reapply
from vmdedup.syscalls import NR
from vmdedup.units import PAGE_BYTES, PAGE_SHIFT

_PROT_READ_WRITE = 0x3
_MAP_PRIVATE = 0x02
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000

_COMPARED_PAGES = 512
"""At once: fewer would cost more calls, more would not stay in the L2 cache."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MappedFds:
    """Descriptor numbers inside QEMU: the store (read-only) and /dev/zero."""

    store: int
    zero: int


@dataclass
class MergeOutcome:
    """What became of one VM's runs. `merged` was confirmed by the kernel, run by run."""

    merged: list[Runs] = field(default_factory=list)
    rejected: list[Int64s] = field(default_factory=list)
    """Pages written, discarded or different at the gate; they stay as they are."""
    missed_pages: int = 0
    """In gates that were opened at their deadline; they wait for the next pass."""
    failure: str | None = None
    """Why merging ended early, None when all runs were tried."""

    @property
    def merged_pages(self) -> int:
        """Pages that now stand on the store or the zero page."""
        return sum(part.pages for part in self.merged)


class VmMerger:
    """Merges runs of one VM within a session.

    `reapply` says, per region, what its new mappings need; `row_address` where a
    row of the next batch will stand inside QEMU.
    """

    def __init__(
        self,
        vm: str,
        pid: int,
        *,
        space: PageSpace,
        published: PublishedPages | None,
        fds: MappedFds,
        reapply: Sequence[Reapply],
        row_address: Callable[[int], int],
        stop: threading.Event,
    ) -> None:
        self._stop = stop
        self.vm = vm
        self.pid = pid
        self._space = space
        self._published = published
        self._fds = fds
        self._reapply = reapply
        self._row_address = row_address
        self._actual = page_buffer(_COMPARED_PAGES)
        self._zeroes = np.zeros_like(self._actual)

    def merge(self, session: Session, wanted: Runs) -> MergeOutcome:
        """Arm all runs, then merge them batch by batch. Raises VmError when the VM is lost."""
        outcome = MergeOutcome()
        if not len(wanted):
            return outcome
        wanted = wanted.take(np.argsort(wanted.start_page))
        session.arm(self._space.hva(wanted.start_page), wanted.length)
        for batch in split_batches(wanted, self._space, session.size):
            try:
                self._merge_batch(session, batch, outcome)
            except (GateMissedError, PageVanishedError):
                outcome.missed_pages += batch.pages
            if outcome.failure is not None or self._stop.is_set():
                break
        return outcome

    def _merge_batch(self, session: Session, batch: Runs, outcome: MergeOutcome) -> None:
        seen = session.witness(self._space.hva(batch.start_page), batch.length)
        if seen is not None:
            equal = self._reduced(batch, self._equal(batch), outcome)
            if equal is not batch:
                batch, seen = equal, seen[np.isin(batch.page(), equal.page())]
            faults.reached("compared")
            if not len(batch):
                return
        start = self._space.hva(batch.start_page)
        calls = self._remap_calls(batch)
        with session.gate(start, batch.length) as gate:
            good = gate.held(gate.entries(start, batch.length), seen)
            if seen is None:
                good &= self._equal(batch)
            left = self._reduced(batch, good, outcome)
            if not len(left):
                return
            if left is not batch:
                batch, calls = left, self._remap_calls(left)
            faults.reached("verified")
            results = gate.run(calls)
        self._confirm(batch, results[: len(batch)], outcome)
        if outcome.failure is None and (results[len(batch) :] < 0).any():
            error = -int(results[len(batch) :].min())
            outcome.failure = f"re-applying madvise or NUMA policy: {os.strerror(error)}"

    def _reduced(self, batch: Runs, good: npt.NDArray[np.bool_], outcome: MergeOutcome) -> Runs:
        """The good pages of a batch as runs, no more than it had: the longest.

        Each run costs VMAs, and the budget was reckoned with whole runs.
        """
        if good.all():
            return batch
        page, slot = batch.page_slots()
        outcome.rejected.append(page[~good])
        left = runs(page[good], slot[good], self._space.first_page)
        longest = np.argsort(-left.length, kind="stable")[: len(batch)]
        kept = left.take(np.sort(longest))
        outcome.missed_pages += left.pages - kept.pages
        return kept

    def _equal(self, batch: Runs) -> npt.NDArray[np.bool_]:
        """Which pages hold exactly the bytes that they would show."""
        pieces = split_batches(batch, self._space, BatchSize(len(batch), _COMPARED_PAGES))
        return np.concatenate([self._equal_piece(piece) for piece in pieces])

    def _equal_piece(self, piece: Runs) -> npt.NDArray[np.bool_]:
        start = self._space.hva(piece.start_page)
        actual = read_runs(self.vm, self.pid, start, piece.length, self._actual)
        at = actual.ctypes.data + (np.cumsum(piece.length) - piece.length) * PAGE_BYTES
        same = syscalls.same_ranges(at, self._shown(piece.slot), piece.length * PAGE_BYTES)
        if same.all():
            return np.ones(len(actual), dtype=np.bool_)
        at = actual.ctypes.data + np.arange(len(actual)) * PAGE_BYTES
        return syscalls.same_ranges(
            at, self._shown(piece.page_slots()[1]), np.full(len(actual), PAGE_BYTES)
        )

    def _shown(self, slot: npt.NDArray[np.int32]) -> Int64s:
        """Where in our own memory the bytes stand that pages on these slots will show."""
        zeroes = self._zeroes.ctypes.data
        if self._published is None:
            return np.full(len(slot), zeroes)
        return np.where(slot == ZERO, zeroes, self._published.address(slot))

    def _remap_calls(self, batch: Runs) -> npt.NDArray[np.uint64]:
        """One mmap a run, then what QEMU had set, over them all: they lie in one region."""
        start = self._space.hva(batch.start_page)
        is_zero = batch.slot == ZERO
        remap = np.zeros((len(batch), 7), dtype=np.uint64)
        remap[:, 0] = NR.MMAP
        remap[:, 1] = start
        remap[:, 2] = batch.length * PAGE_BYTES
        remap[:, 3] = _PROT_READ_WRITE
        remap[:, 4] = _MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
        remap[:, 5] = np.where(is_zero, self._fds.zero, self._fds.store)
        remap[:, 6] = np.where(
            is_zero,
            self._space.backend_offset(batch.start_page),
            batch.slot.astype(np.int64) << PAGE_SHIFT,
        )
        end = int(start[-1] + batch.length[-1] * PAGE_BYTES)
        reapply = self._reapply[int(self._space.region_of(batch.start_page[:1])[0])]
        again = reapply.calls(int(start[0]), end, len(batch), self._row_address)
        return np.concatenate([remap, again])

    def _confirm(self, batch: Runs, results: Int64s, outcome: MergeOutcome) -> None:
        """Believe only runs whose mmap returned the address that was asked for."""
        done = results == self._space.hva(batch.start_page)
        outcome.merged.append(batch.take(done))
        if done.all():
            return
        error = -int(results[~done][0])
        if error == errno.ECANCELED:
            outcome.missed_pages += int(batch.length[~done].sum())
        elif error in errno.errorcode:
            outcome.failure = f"mmap inside QEMU: {os.strerror(error)}"
            if error == errno.ENOMEM:
                outcome.failure += " (no VMA left; raise vm.max_map_count or set vma_budget)"
        else:
            raise VmError(self.vm, "mmap inside QEMU gave another address", pid=self.pid)


def split_batches(wanted: Runs, space: PageSpace, size: BatchSize | GateSize) -> Iterator[Runs]:
    """Runs in address order as batches of bounded size, each within one region.

    `size` is asked anew for each. A run longer than a batch is cut; its pieces grow
    together again in the kernel, since they are neighbours in the guest and in the store.
    """
    wanted = cut(wanted, size.piece_pages)
    region = space.region_of(wanted.start_page)
    pages_until = np.cumsum(wanted.length)
    first = 0
    while first < len(wanted):
        before = int(pages_until[first - 1]) if first else 0
        last = int(np.searchsorted(pages_until, before + size.pages, side="right"))
        last = min(last, first + size.runs, int(np.searchsorted(region, region[first], "right")))
        last = max(last, first + 1)
        yield wanted.take(slice(first, last))
        first = last


def cut(wanted: Runs, most_pages: int) -> Runs:
    """The same pages in runs of at most `most_pages`."""
    pieces = -(-wanted.length // most_pages)
    index = np.repeat(np.arange(len(wanted)), pieces)
    offset = ranges(np.zeros_like(pieces), pieces) * most_pages
    slot = wanted.slot[index]
    return Runs(
        wanted.start_page[index] + offset,
        np.minimum(wanted.length[index] - offset, most_pages),
        np.where(slot == ZERO, slot, slot + offset).astype(np.int32),
    )
