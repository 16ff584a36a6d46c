"""Merging: the equal pages of one VM onto the store and the zero page.

Owns the order *publish, verify, close the gate, remap*. A page is remapped only if two
conditions hold. Its bytes are equal to those it will show; digests nominate, bytes decide.
And inside the gate the kernel says that the page is held and unchanged since its bytes were
compared, or copied to the store. Pages are compared before the gate is closed, so that nobody
waits for it; if only a pause keeps pages from changing, they are compared in the gate. All
earlier steps are done for a *stretch* of several gates at once.

Refuses nothing by itself; which pages may be merged was decided before.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.gate_size import BatchSize
from vmdedup.core.plan import Runs, runs
from vmdedup.core.rmap import ZERO
from vmdedup.errors import VmError
from vmdedup.guest.page_space import PageSpace
from vmdedup.guest.vm_readv import PageVanishedError, address_runs, page_buffer, read_runs
from vmdedup.linux import mman
from vmdedup.linux.mapping_room import limit_met
from vmdedup.linux.pagemap import ENTRY_PRESENT, ENTRY_UFFD_WP
from vmdedup.linux.syscall_batch import call_columns
from vmdedup.linux.syscalls import NR
from vmdedup.remap.advice import Reapply
from vmdedup.remap.batches import batches, cut, split_batches, split_stretches
from vmdedup.remap.burst import Prepared
from vmdedup.remap.compare import Comparer
from vmdedup.remap.gate import GateMissedError, Session
from vmdedup.remap.small_pages import SmallPages
from vmdedup.units import PAGE_BYTES, PAGE_SHIFT
from vmdedup.vm.timings import Totals

_STORE_MAPPING = mman.MAP_PRIVATE | mman.MAP_FIXED | mman.MAP_NORESERVE
_STRETCH = BatchSize(runs=4096, pages=4096)
"""Most pages that wait for their gates at a time; the guest may write some meanwhile."""

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.int32]


@dataclass(frozen=True)
class MappedFds:
    """Descriptor numbers inside QEMU: the store (read-only) and /dev/zero."""

    store: int
    zero: int
    ram: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """For each share=on region, by index: its RAM file's descriptor and its offset there."""


@dataclass
class MergeOutcome:
    """The result of merging one VM's runs. `merged` was confirmed by the kernel, run by run."""

    merged: list[Runs] = field(default_factory=list)
    rejected: list[Int64s] = field(default_factory=list)
    """Pages written, discarded or different at the gate; they stay as they are."""
    missed_pages: int = 0
    """Pages of gates that were opened at their deadline; they wait for the next pass."""
    failure: str | None = None
    """Why merging ended early, `None` if all runs were tried."""

    @property
    def merged_pages(self) -> int:
        """How many pages now show the store or the zero page."""
        return sum(part.pages for part in self.merged)


@dataclass(frozen=True)
class _Batch:
    """Runs, the calls that remap them, and the witnessed state of their pages."""

    runs: Runs
    calls: Uint64s
    seen: Uint64s | None

    def part(self, rows: slice) -> _Batch:
        """The batch of some successive runs."""
        runs, seen = self.runs.take(rows), self.seen
        if seen is not None:
            seen = seen[int(self.runs.length[: rows.start].sum()) :][: runs.pages]
        return _Batch(runs, self.calls[rows], seen)


class Contents(Protocol):
    """The contents that the runs are to show, see `publish.PublishedContents`."""

    def publish_for(self, wanted: Runs, first_page: Int64s) -> Runs: ...
    def is_source(self, page: Int64s, slot: Slots) -> npt.NDArray[np.bool_]: ...
    def is_as_nominated(self, slot: Slots) -> npt.NDArray[np.bool_]: ...
    def address(self, slot: Slots) -> Int64s: ...
    @property
    def slots(self) -> int: ...


class VmMerger:
    """Merges runs of one VM within a session.

    `comparer` says which pages are equal to the content they would show. `reapply` gives, per
    region, what its new mappings need, and `small_pages` what all need. `row_address` gives
    the address of a row of the next batch inside QEMU. `totals` counts what is merged as it is.
    """

    def __init__(
        self,
        vm: str,
        pid: int,
        *,
        space: PageSpace,
        contents: Contents,
        comparer: Comparer,
        fds: MappedFds,
        reapply: Sequence[Reapply],
        small_pages: SmallPages,
        row_address: Callable[[int], int],
        stop: threading.Event,
        totals: Totals,
    ) -> None:
        self._stop = stop
        self.vm = vm
        self.pid = pid
        self._space = space
        self._contents = contents
        self._comparer = comparer
        self._fds = fds
        self._reapply = reapply
        self._small_pages = small_pages
        self._row_address = row_address
        self._totals = totals

    def merge(
        self,
        session: Session,
        wanted: Runs,
        outcome: MergeOutcome,
        *,
        in_any_order: bool = False,
    ) -> None:
        """Arm all runs, then merge them batch by batch, and note the results in `outcome`.

        Unless `in_any_order`, runs are merged in address order, which takes the fewest VMAs.
        Raises VmError if the VM is lost, or cannot be served any further now.
        """
        wanted = wanted.take(np.argsort(wanted.start_page))
        session.way_back = self._way_back
        session.arm(self._space.hva(wanted.start_page), wanted.length)
        wanted = cut(wanted, session.size.piece_pages)
        split = split_stretches if in_any_order else split_batches
        for stretch in split(wanted, self._space, _STRETCH):
            self._merge_stretch(session, stretch, outcome)
            if self._ends(outcome):
                break

    def _ends(self, outcome: MergeOutcome) -> bool:
        return outcome.failure is not None or self._stop.is_set()

    def _merge_stretch(self, session: Session, stretch: Runs, outcome: MergeOutcome) -> None:
        """Publish the contents for its pages, compare them, then remap them gate by gate."""
        session.rest()
        seen = self._witnessed(session, stretch)
        wanted = stretch
        stretch = self._contents.publish_for(wanted, self._space.first_page)
        if seen is not None:
            there = stretch
            if there is not wanted:
                seen = seen[np.isin(wanted.page(), there.page())]
            stretch = self._reduced(there, self._equal(there, seen), outcome)
            if stretch is not there:
                seen = seen[np.isin(there.page(), stretch.page())]
            faults.reached("compared")
        if not len(stretch):
            return
        left = _Batch(stretch, self._remap_calls(stretch), seen)
        while len(left.runs) and not self._ends(outcome):
            sizes = batches(left.runs.length, session.size)
            several = [left.part(rows) for rows in islice(sizes, max(1, session.most_gates))]
            tried = self._merge_several(session, several, outcome)
            if not tried:
                tried = self._merge_one(session, several[0], outcome)
            left = left.part(slice(tried, None))

    def _witnessed(self, session: Session, stretch: Runs) -> Uint64s | None:
        """The kernel's state of these armed pages, which were present when they were armed.

        Arming a part of a huge page of a RAM file removes the whole huge page from the page
        table (mm/huge_memory.c: __split_huge_pmd_locked). Reading a page brings it back,
        still armed.
        """
        start = self._space.hva(stretch.start_page)
        seen = session.witness(start, stretch.length)
        if seen is None:
            return None
        is_gone = (seen & (ENTRY_PRESENT | ENTRY_UFFD_WP)) == ENTRY_UFFD_WP
        if not is_gone.any():
            return seen
        page = stretch.page()
        # In private memory such a page is swapped out, and stays so.
        is_gone &= np.isin(self._space.region_of(page), list(self._fds.ram))
        gone = self._space.hva(page[is_gone])
        with suppress(PageVanishedError):
            read_runs(self.vm, self.pid, *address_runs(gone), page_buffer(len(gone)))
        return session.witness(start, stretch.length)

    def _merge_several(
        self, session: Session, several: Sequence[_Batch], outcome: MergeOutcome
    ) -> int:
        """Merge these batches up to the first unusual one; returns how many runs."""
        prepared = []
        for batch in several if session.most_gates else ():
            assert batch.seen is not None, "it was witnessed before it was compared"
            start = batch.calls[:, 1].view(np.int64)
            calls = np.concatenate([batch.calls, self._again(batch.runs, batch.calls)])
            prepared.append(Prepared(start, batch.runs.length, batch.seen, calls))
        done = session.gates(prepared)
        for batch, results in zip(several, done, strict=False):
            self._conclude(batch.runs, results, outcome)
        return sum(len(batch.runs) for batch in several[: len(done)])

    def _merge_one(self, session: Session, batch: _Batch, outcome: MergeOutcome) -> int:
        """Merge all pages of a batch that can be; returns how many runs were tried: all."""
        try:
            self._merge_batch(session, batch, outcome)
        except GateMissedError:
            outcome.missed_pages += batch.runs.pages
        return len(batch.runs)

    def _merge_batch(self, session: Session, batch: _Batch, outcome: MergeOutcome) -> None:
        wanted, calls = batch.runs, batch.calls
        start = calls[:, 1].view(np.int64)
        with session.gate(start, wanted.length) as gate:
            good = gate.held(gate.entries(start, wanted.length), batch.seen)
            if batch.seen is None:
                good &= self._equal(wanted)
            left = self._reduced(wanted, good, outcome)
            if not len(left):
                return
            if left is not wanted:
                calls = self._remap_calls(left)
            faults.reached("verified")
            results = gate.run(np.concatenate([calls, self._again(left, calls)]))
        self._conclude(left, results, outcome)

    def _conclude(self, batch: Runs, results: Int64s, outcome: MergeOutcome) -> None:
        """Note the outcome of a batch by the results of its calls."""
        self._confirm(batch, results[: len(batch)], outcome)
        failed = (results[len(batch) :] < 0).any()
        if outcome.failure is None and failed:  # uncovered: takes a limit that only these meet
            error = -int(results[len(batch) :].min())
            outcome.failure = f"re-applying madvise or NUMA policy: {os.strerror(error)}"

    def _reduced(self, batch: Runs, good: npt.NDArray[np.bool_], outcome: MergeOutcome) -> Runs:
        """The good pages of a batch as runs: the longest, and no more runs than it had.

        Each run costs VMAs, and the budget was computed for whole runs.
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

    def _equal(self, some: Runs, seen: Uint64s | None = None) -> npt.NDArray[np.bool_]:
        """Which pages hold exactly the bytes of their slots, if these are as nominated.

        `seen`: the witnessed state of these pages. A page that was copied into its slot was
        copied after that. So the copy is equal as long as the page has not changed since.
        """
        page, slot = some.page_slots()
        equal = np.zeros(len(page), dtype=np.bool_)
        asked = self._contents.is_as_nominated(slot)
        if seen is not None:
            equal = asked & self._contents.is_source(page, slot)
            asked &= ~equal & (seen & ENTRY_PRESENT != 0)
        if asked.any():
            equal[asked] = self._comparer.equal(page[asked], slot[asked])
        return equal

    def _remap_calls(self, some: Runs) -> Uint64s:
        """One mmap for each run."""
        is_zero = some.slot == ZERO
        remap = np.zeros((len(some), 7), dtype=np.uint64)
        remap[:, 0] = NR.MMAP
        remap[:, 1] = self._space.hva(some.start_page)
        remap[:, 2] = some.length * PAGE_BYTES
        remap[:, 3] = mman.PROT_READ_WRITE
        remap[:, 4] = _STORE_MAPPING | self._small_pages.map_flag
        remap[:, 5] = np.where(is_zero, self._fds.zero, self._fds.store)
        remap[:, 6] = np.where(
            is_zero,
            self._space.backend_offset(some.start_page),
            some.slot.astype(np.int64) << PAGE_SHIFT,
        )
        return remap

    def _again(self, batch: Runs, remap: Uint64s) -> Uint64s:
        """Calls that set QEMU's flags and policy again over the whole batch, within one region.

        The guest's own pages in between have these settings already. MADV_NOHUGEPAGE, which is
        ours alone, goes to the runs of zeroes only.
        """
        region = int(self._space.region_of(batch.start_page[:1])[0])
        start, end = remap[:1, 1], remap[-1:, 1] + remap[-1:, 2]
        again = self._reapply[region].calls(start, end, len(batch), self._row_address)
        if not self._small_pages.by_advice:
            return again
        zero = remap[batch.slot == ZERO]
        small = call_columns(NR.MADVISE, zero[:, 1], zero[:, 2], mman.MADV_NOHUGEPAGE)
        return np.concatenate([again, small])

    def _way_back(self, calls: Uint64s) -> Uint64s:
        """Map RAM file pages again for share=on regions, else the equal store or zero pages."""
        back = calls.copy()
        address = calls[:, 1].view(np.int64)
        for index, (fd, begin_bytes) in self._fds.ram.items():
            start, end = self._space.span(index)
            where = (address >= start) & (address < end)
            back[where, 4] = mman.MAP_SHARED | mman.MAP_FIXED
            back[where, 5] = fd
            back[where, 6] = address[where] - start + begin_bytes
        return back

    def _confirm(self, batch: Runs, results: Int64s, outcome: MergeOutcome) -> None:
        """Believe only runs whose mmap returned the address that was asked for."""
        done = results == self._space.hva(batch.start_page)
        merged = batch.take(done)
        outcome.merged.append(merged)
        self._totals.merged_pages += merged.pages
        if done.all():
            return
        error = -int(results[~done][0])
        if error == errno.ECANCELED:
            outcome.missed_pages += int(batch.length[~done].sum())
        elif error in errno.errorcode:
            outcome.failure = f"mmap inside QEMU: {os.strerror(error)}"
            if error == errno.ENOMEM:
                outcome.failure += f" ({limit_met(self.pid)})"
        else:  # uncovered: MAP_FIXED gives the address, or an error
            raise VmError(self.vm, "mmap inside QEMU gave another address", pid=self.pid)
