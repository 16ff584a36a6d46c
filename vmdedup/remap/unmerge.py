"""Unmerge: move every page of a VM back onto memory of its own, on its own backend.

Owns the same *arm, drain, gate* in the other direction. A page's content at the gate may be
the store's or the guest's own. It is put where the backend keeps it, and the address is
mapped back:

    share=on          content into the RAM file, mapped MAP_SHARED at its own offset
    share=off, file   a private mapping of the VM's own file plus the content
    ram               anonymous memory plus the content

For the private kinds the new memory is filled at a scratch address and moved
into place by one mremap. So no reader ever sees it half filled. Scratch memory
lies in a mapping that carries our name (`RemoteThread.room`), and is filled for a
*stretch*, that is several gates, at once. Pages that no guest has written are filled straight
from the store's file. A gate maps back those pages that, by the kernel's word, have not
changed since they were filled; if only a pause keeps pages from changing, the gate fills
written pages again. Zero pages become untouched memory, which reads as zero and costs
nothing until written, unless a filesystem could be full by then (`takes_blocks`).

A page of a RAM file is mapped back only once the filesystem has a block for it, and spare
blocks for sparse RAM files: QEMU would die of SIGBUS at a page without a block. Pages for
which there is no room stay merged, and `VmUnmerger.shortage` says why.

Pages that the guest has given up (`GivenUp`) come back as untouched memory, whatever they show.

Whole blocks (`whole`) come back as one mapping each: their zero pages are filled too, and pages
that were the VM's own before move like pages that a guest has written.

Promises: at each instant every address shows the guest's bytes. Killed
anywhere, each page is either still merged or wholly its own. Memory that was filled but
not moved yet, at most one stretch, is unmapped with the scratch mapping.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.attach.ranges import Region
from vmdedup.core import plan
from vmdedup.core.gate_size import BatchSize
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import OWN, ZERO
from vmdedup.core.sorting import page_runs
from vmdedup.errors import MergeError
from vmdedup.guest.mapping_state import MappingState, open_ram_file
from vmdedup.guest.page_space import PageSpace
from vmdedup.guest.vm_readv import (
    PageVanishedError,
    address_runs,
    page_buffer,
    read_runs,
    write_runs,
)
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux import mman
from vmdedup.linux.borders import require_lengths
from vmdedup.linux.filesystems import UNLIMITED
from vmdedup.linux.mapping_room import limit_met
from vmdedup.linux.maps import read_maps
from vmdedup.linux.pagemap import FILE, PFNZERO, PRESENT, SWAPPED, categories_of
from vmdedup.linux.sparse_file import allocated
from vmdedup.linux.syscall_batch import call_columns, run_calls
from vmdedup.linux.syscalls import NR
from vmdedup.remap.advice import Reapply
from vmdedup.remap.batches import batches, cut, split_batches
from vmdedup.remap.burst import Prepared
from vmdedup.remap.gate import Gate, GateMissedError, Session
from vmdedup.store.stable_store import PublishedPages
from vmdedup.units import MIB, PAGE_BYTES
from vmdedup.vm.ram_files import RamFiles, is_ample

_MOVE_WITHOUT_UNMAPPING = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED | mman.MREMAP_DONTUNMAP
_NO_FD = 2**64 - 1
_SCRATCH_TIMEOUT_S = 5.0
_STRETCH_PAGES = 4096
"""Most pages of a stretch. Its runs are limited to the calls of one batch, since each run may
take a VMA meanwhile."""
_FILLED_PAGES = 512
"""Pages copied at once: more would not stay in the L2 cache."""

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]


GivenUp = Callable[[], npt.NDArray[np.bool_]]
"""Asked once the pages are armed: which pages of the page space the guest does not have now,
whole regions each.

What it writes there later is seen by the gates. What it has not written is undefined to it.
"""


@dataclass(frozen=True)
class HomeRegion:
    """A region, and what is needed to map it back."""

    region: Region
    index: int
    qemu_fd: int | None
    """Descriptor number of the RAM file inside QEMU; `None` for anonymous memory."""
    reapply: Reapply
    """Flags and NUMA policy that QEMU had set on the region."""

    @property
    def is_shared(self) -> bool:
        """Whether content goes into the RAM file."""
        return self.region.share


def takes_blocks(region: Region) -> bool:
    """Whether a filesystem must have room for its pages, else touching one is fatal.

    On tmpfs this applies to private mappings too: the first fault makes the file's page
    (mm/shmem.c: shmem_fault). Memfds lie on a mount without a limit.
    """
    if region.filesystem in UNLIMITED:
        return False
    return region.share or region.filesystem == "tmpfs"


def join_mappings(vm: str, remote: RemoteThread, home: HomeRegion) -> None:
    """Map a fully unmerged share=on region again, as the one mapping that it was.

    The kernel joins only mappings of the same open file, and QEMU keeps no descriptor
    of this one. Raises MergeError, also if the region no longer exists.
    """
    region = home.region
    assert home.is_shared, "private memory is not the file's"
    assert home.qemu_fd is not None, "it was lent"
    flags = mman.MAP_SHARED | mman.MAP_FIXED
    where = (NR.MMAP, region.start, region.size_bytes)
    call = (*where, mman.PROT_READ_WRITE, flags, home.qemu_fd, region.ram_offset_bytes)
    calls = np.array([call], dtype=np.uint64)
    start, end = np.array([region.start]), np.array([region.end])
    again = home.reapply.calls(start, end, 1, remote.row_address)
    remote.hold()
    # SAFETY: before and after, each address shows the same page of the same file, so writes
    # in between do no harm. While QEMU's RCU thread stands still no RAM block is unmapped. A
    # block that was removed before is not mapped again, nor over a new one in its place.
    # Killed here: the region is mapped in one piece or still in several.
    if not _shows_its_file(vm, remote.pid, region):
        remote.release()
        raise MergeError(vm, "unmerge", f"backend {region.backend} is not there any more")
    remote.launch(np.concatenate([calls, again]))
    if (result := int(remote.wait(_SCRATCH_TIMEOUT_S)[0])) != region.start:
        raise MergeError(vm, "unmerge", f"mapping the whole region: {os.strerror(-result)}")


def _shows_its_file(vm: str, pid: int, region: Region) -> bool:
    """Whether all of the region is mapped from its RAM file, at the offsets that are its own."""
    part = read_maps(vm, pid).within(region.start, region.end)
    if region.ram_file is None or not part.covers(region.start, region.end):
        return False
    device, inode = region.ram_file
    offset = part.start.astype(np.int64) - region.start + region.ram_offset_bytes
    is_its = (part.inode == inode) & (part.device == device)
    return bool((is_its & (part.offset_bytes.astype(np.int64) == offset)).all())


@dataclass(frozen=True)
class _Stretch:
    """Runs of one region, for one gate or several; the other columns have a row for each run."""

    home: HomeRegion
    runs: Runs
    start: Int64s
    """Addresses of the runs."""
    scratch: Int64s
    """Address where each run's new memory is filled, `0` for none."""
    seen: Uint64s | None
    """Witnessed state of the runs' pages from before they were filled."""
    calls: Uint64s = field(default_factory=lambda: np.empty((0, 7), dtype=np.uint64))
    """Calls that map the runs back, once they are known."""

    def part(self, rows: slice) -> _Stretch:
        """The stretch of some successive runs."""
        runs = self.runs.take(rows)
        seen = self.seen
        if seen is not None:
            first = int(self.runs.length[: rows.start].sum())
            seen = seen[first : first + runs.pages]
        return _Stretch(
            self.home, runs, self.start[rows], self.scratch[rows], seen, self.calls[rows]
        )


class VmUnmerger:
    """Unmerges pages of one VM within a session.

    `mapped`: the slot of every page when the session begins, including pages that stay merged.
    `whole`: a mask over the page space; these pages are moved, merged or not, instead of all
    merged ones. They lie in private anonymous memory.
    """

    def __init__(
        self,
        vm: str,
        pid: int,
        *,
        space: PageSpace,
        homes: Sequence[HomeRegion],
        remote: RemoteThread,
        published: PublishedPages | None,
        mapped: npt.NDArray[np.int32],
        given_up: GivenUp | None = None,
        whole: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.vm = vm
        self.pid = pid
        self._space = space
        self._homes = homes
        self._remote = remote
        self._published = published
        self._content = page_buffer(_FILLED_PAGES)
        self._room: int | None = None
        self._slot = np.empty(0, dtype=np.int32)
        self._merged_before = np.zeros(space.pages + 1, dtype=np.int32)
        """Number of merged pages before each page, and before the end; shape (pages + 1,)."""
        np.cumsum(mapped != OWN, out=self._merged_before[1:])
        self._shows_store = np.empty(0, dtype=np.bool_)
        self._given_up = given_up
        self._whole = whole
        self._beside: dict[int, RamFiles] = {}
        """RAM files on the same filesystem as a region's, by the region's index."""
        self._unpromised: set[int] = set()
        """Regions whose filesystem cannot allocate blocks on request: it is synced at once."""
        self.shortage: str | None = None
        """Why pages got no room in their RAM file, `None` if all did."""

    def unmerge(
        self, session: Session, state: MappingState, most_pages: int, longest_run: int
    ) -> int:
        """Try once to unmerge all merged pages; returns how many were unmerged.

        `most_pages`: how many pages of new memory may be taken. A run stays for another
        round if the guest wrote one of its pages at the wrong moment. So the shorter the
        runs (at most `longest_run` pages), the more pages are unmerged.
        """
        with ExitStack() as files:
            ram_fds = {
                home.index: files.enter_context(_RamFile(self.pid, home.region))
                for home in self._homes
                if home.region.ram_file is not None
            }
            untouched = self._comes_back_untouched(state, ram_fds)
            page = np.flatnonzero(state.slot != OWN if self._whole is None else self._whole)
            needs_memory = ~untouched[page]
            page = page[~needs_memory | (np.cumsum(needs_memory) <= most_pages)]
            wanted = cut(self._as_runs(page, untouched), longest_run)
            if not session.protects_absent:
                self._touch_zeroes(state, wanted)
            session.arm(self._space.hva(wanted.start_page), wanted.length)
            if self._given_up is not None:
                # SAFETY: asked after arming. From now on the gates see whatever is written.
                session.rest()
                wanted = wanted.take(self._given_up()[wanted.start_page])
                if not len(wanted):
                    return 0
            self._slot, self._shows_store = state.slot, self._merged_there(state)
            done = 0
            size = BatchSize(self._remote.max_calls, _STRETCH_PAGES)
            for stretch in split_batches(wanted, self._space, size):
                try:
                    done += self._unmerge_stretch(session, stretch, ram_fds)
                except PageVanishedError:  # uncovered: discarded within microseconds of a read
                    continue
                except _RamFileError as error:
                    self.shortage = str(error)
            return done

    def _touch_zeroes(self, state: MappingState, wanted: Runs) -> None:
        """Read zero pages that no page table has, so that they can be protected.

        SAFETY: such a page of /dev/zero is anonymous memory. Unprotected, a write between the
        gate's look and the remap would be lost; so an absent page is never held.
        """
        page = wanted.page()
        is_there = (state.categories[page] & (PRESENT | SWAPPED)) != 0
        address = self._space.hva(page[state.zero[page] & ~is_there])
        for first in range(0, len(address), _FILLED_PAGES):
            part = address_runs(address[first : first + _FILLED_PAGES])
            with suppress(PageVanishedError):
                read_runs(self.vm, self.pid, *part, self._content)

    def _merged_there(self, state: MappingState) -> npt.NDArray[np.bool_]:
        """Which pages show the store that is mapped here."""
        for number, store in enumerate(state.stores):
            if self._published is not None and self._published.is_of(store.device, store.inode):
                return np.asarray(state.merged & (state.store == number))
        return np.zeros(len(state.slot), dtype=np.bool_)

    def _comes_back_untouched(
        self, state: MappingState, ram_fds: dict[int, int]
    ) -> npt.NDArray[np.bool_]:
        """Pages that need no content: given up, or zero where the backend reads as zero."""
        if self._given_up is not None:
            return np.ones(len(state.slot), dtype=np.bool_)
        if self._whole is not None:
            return np.zeros(len(state.slot), dtype=np.bool_)
        untouched = state.zero.copy()
        for home in self._homes:
            where = self._space.slice_of(home.index)
            if takes_blocks(home.region):
                untouched[where] = False
            if home.index not in ram_fds or takes_blocks(home.region):
                continue
            fd, region = ram_fds[home.index], home.region
            untouched[where] &= ~allocated(fd, region.ram_offset_bytes, region.pages)
        return untouched

    def _as_runs(self, page: Int64s, untouched: npt.NDArray[np.bool_]) -> Runs:
        """The pages as runs of one kind each: `slot` is ZERO for untouched memory, else OWN."""
        parts = []
        for kind, chosen in ((ZERO, page[untouched[page]]), (OWN, page[~untouched[page]])):
            start, length = page_runs(chosen, self._space.first_page)
            parts.append((start, length, np.full(len(start), kind, dtype=np.int32)))
        start, length, slot = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(start)
        return Runs(start[order], length[order], slot[order])

    def _unmerge_stretch(self, session: Session, runs: Runs, ram_fds: dict[int, int]) -> int:
        """Fill the new memory of all the runs, then map it back gate by gate."""
        home = self._homes[int(self._space.region_of(runs.start_page[:1])[0])]
        if takes_blocks(home.region) and self._given_up is None:
            runs = self._with_blocks(home, runs, ram_fds[home.index])
            if not len(runs):
                return 0
        start = self._space.hva(runs.start_page)
        scratch = self._scratch(home, runs)
        faults.reached("scratch-mapped")
        stretch = _Stretch(home, runs, start, scratch, session.witness(start, runs.length))
        published = self._is_published(stretch)
        self._fill(stretch, ~published, ram_fds)
        if not self._copy_published(session, stretch, published, ram_fds):
            self._fill(stretch, published, ram_fds)
        if home.index in self._unpromised:
            _sync(ram_fds[home.index])
        faults.reached("scratch-filled")
        left = replace(stretch, calls=self._home_calls(stretch))
        most_runs = (self._remote.max_calls - 1) // (1 + home.reapply.calls_a_range)
        done = 0
        while len(left.runs):
            size = BatchSize(min(session.size.runs, most_runs), session.size.pages)
            sizes = batches(left.runs.length, size)
            several = [left.part(rows) for rows in islice(sizes, max(1, session.most_gates))]
            moved = self._unmerge_several(session, several)
            done += sum(moved)
            if not moved:
                with suppress(GateMissedError, PageVanishedError):
                    done += self._unmerge_batch(session, several[0], ram_fds)
            tried = several[: max(1, len(moved))]
            left = left.part(slice(sum(len(batch.runs) for batch in tried), None))
        return done

    def _with_blocks(self, home: HomeRegion, runs: Runs, ram_fd: int) -> Runs:
        """The runs for which the filesystem has blocks; these are allocated here.

        A reserve is left for blocks that the RAM files there, including this one, have not
        allocated yet.
        """
        # Behind private pages the file mostly has its blocks.
        if home.is_shared and not is_ample(ram_fd, runs.pages * PAGE_BYTES):
            room = self._beside.setdefault(home.index, RamFiles(ram_fd)).room()
            kept_bytes = min(room.promised_bytes, room.reserve_bytes)
            fits = np.cumsum(runs.length) * PAGE_BYTES <= room.free_bytes - kept_bytes
            if not fits.all():
                self.shortage = _told(ram_fd, errno.ENOSPC)
                runs = runs.take(fits)
        offset = self._space.backend_offset(runs.start_page) + home.region.ram_offset_bytes
        # SAFETY: no content changes. Killed here: at most one stretch of blocks stays allocated
        # behind merged pages; the next engine frees them (`mapping_state.unfreed_pages`).
        results = run_calls(call_columns(NR.FALLOCATE, ram_fd, 0, offset, runs.length * PAGE_BYTES))
        faults.reached("blocks-allocated")
        can_not_ask = np.isin(results, (-errno.EOPNOTSUPP, -errno.EBADF))
        if home.is_shared and can_not_ask.any():
            self._unpromised.add(home.index)
        refused = (results < 0) & ~can_not_ask & (results != -errno.EINTR)
        if refused.any():
            self.shortage = _told(ram_fd, -int(results[refused][0]))
        return runs.take((results >= 0) | can_not_ask)

    def _unmerge_several(self, session: Session, several: Sequence[_Stretch]) -> list[int]:
        """Map these batches back up to the first unusual one; returns the pages of each."""
        prepared = []
        for batch in several if session.most_gates else ():
            if batch.seen is None or _has_broken_zeroes(batch):
                break
            calls = np.concatenate([batch.calls, self._again(batch.home, batch.runs)])
            prepared.append(Prepared(batch.start, batch.runs.length, batch.seen, calls))
        results = session.gates(prepared)
        return [
            self._came_home(batch.runs, batch.start, found[: len(batch.runs)])
            for batch, found in zip(several, results, strict=False)
        ]

    def _is_published(self, stretch: _Stretch) -> npt.NDArray[np.bool_]:
        """Which pages of filled runs show the store that is mapped here, as far as known."""
        runs = stretch.runs
        shown = np.repeat(runs.slot != ZERO, runs.length) & self._shows_store[runs.page()]
        return shown if stretch.seen is None else shown & ~_broken(stretch.seen)

    def _copy_published(
        self,
        session: Session,
        stretch: _Stretch,
        which: npt.NDArray[np.bool_],
        ram_fds: dict[int, int],
    ) -> bool:
        """Copy from the store's file to the pages' new memory; whether that was possible."""
        if self._published is None or not which.any():
            return not which.any()
        home, scratch = stretch.home, stretch.scratch
        start, length = stretch.runs.start_page, stretch.runs.length
        page = stretch.runs.page()[which]
        part = plan.runs(page, self._slot[page], start)
        source = self._published.address(part.slot)
        if home.is_shared:
            offset = self._space.backend_offset(part.start_page) + home.region.ram_offset_bytes
            _write_file(ram_fds[home.index], offset, source, part.length)
            return True
        move = scratch - stretch.start
        target = self._space.hva(part.start_page)
        target += move[np.searchsorted(start, part.start_page, side="right") - 1]
        is_filled = scratch != 0
        span = int(scratch[is_filled].min()), int((scratch + length * PAGE_BYTES)[is_filled].max())
        return session.fill(span, target, source, part.length * PAGE_BYTES)

    def _unmerge_batch(self, session: Session, batch: _Stretch, ram_fds: dict[int, int]) -> int:
        """Map back the runs that are unchanged since they were filled; returns their pages."""
        runs, start = batch.runs, batch.start
        with session.gate(start, runs.length) as gate:
            entries = gate.entries(start, runs.length)
            usable = _usable(gate, entries, batch)
            if not usable.any():
                return 0
            if batch.seen is None:
                self._fill(batch, _broken(entries), ram_fds)
            faults.reached("checked")
            used = runs.take(usable)
            calls = np.concatenate([batch.calls[usable], self._again(batch.home, used)])
            results = gate.run(calls)[: len(used)]
        return self._came_home(used, start[usable], results)

    def _came_home(self, runs: Runs, start: Int64s, results: Int64s) -> int:
        """How many pages of these runs were mapped back, by the results of their calls."""
        faults.reached("came-home")
        moved = results != -errno.ECANCELED
        failed = moved & (results != start)
        if failed.any():
            reason = f"mapping back failed: {_refused(self.pid, int(results[failed][0]))}"
            raise MergeError(self.vm, "unmerge", reason, pid=self.pid)
        return runs.take(moved).pages

    def _scratch(self, home: HomeRegion, stretch: Runs) -> Int64s:
        """Map scratch memory inside QEMU for the filled runs of a private region.

        Returns its address for each run, `0` for a run that needs none.
        """
        addresses = np.zeros(len(stretch), dtype=np.int64)
        is_filled = stretch.slot != ZERO
        if home.is_shared or not is_filled.any():
            return addresses
        if self._room is None:
            try:
                self._room = self._remote.room(_STRETCH_PAGES)
            except OSError as error:
                reason = f"no scratch memory: {_refused(self.pid, -(error.errno or 0))}"
                raise MergeError(self.vm, "unmerge", reason, pid=self.pid) from error
        filled = stretch.take(is_filled)
        addresses[is_filled] = self._room + (np.cumsum(filled.length) - filled.length) * PAGE_BYTES
        # Anonymous memory is one mapping, and neighbouring pieces join again when mapped back.
        mapped = filled if home.qemu_fd is not None else _as_one(filled)
        calls = np.zeros((len(mapped), 7), dtype=np.uint64)
        calls[:, 0] = NR.MMAP
        calls[:, 1] = self._room + (np.cumsum(mapped.length) - mapped.length) * PAGE_BYTES
        calls[:, 2] = mapped.length * PAGE_BYTES
        calls[:, 3] = mman.PROT_READ_WRITE
        self._private_mapping(home, calls, mapped)
        calls[:, 4] |= np.uint64(mman.MAP_FIXED)
        # SAFETY: this maps over our own room and what the last stretch left there. A kill
        # leaves at most one stretch's pages, which the next session unmaps with the room.
        found = self._run(calls)
        failed = found != calls[:, 1].view(np.int64)
        if failed.any():  # uncovered: takes a limit that is met just after the room was made
            reason = _refused(self.pid, int(found[failed][0]))
            raise MergeError(self.vm, "unmerge", f"no scratch memory: {reason}", pid=self.pid)
        return addresses

    def _private_mapping(
        self, home: HomeRegion, calls: npt.NDArray[np.uint64], mapped: Runs
    ) -> None:
        """Set flags, descriptor and offset of mmap rows as QEMU maps a private region."""
        if home.qemu_fd is None:
            calls[:, 4] = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
            calls[:, 5] = _NO_FD
            return
        calls[:, 4] = mman.MAP_SHARED if home.is_shared else mman.MAP_PRIVATE
        calls[:, 5] = home.qemu_fd
        offset = self._space.backend_offset(mapped.start_page)
        calls[:, 6] = offset + home.region.ram_offset_bytes

    def _run(self, calls: npt.NDArray[np.uint64]) -> Int64s:
        """Run calls inside QEMU outside of any gate."""
        self._remote.hold()
        self._remote.launch(calls)
        return self._remote.wait(_SCRATCH_TIMEOUT_S)

    def _fill(self, batch: _Stretch, which: npt.NDArray[np.bool_], ram_fds: dict[int, int]) -> None:
        """Copy pages as the VM sees them now to their new memory; zero runs need no copy."""
        runs = batch.runs
        which = which & np.repeat(runs.slot != ZERO, runs.length)
        if not which.any():
            return
        page = runs.page()[which]
        moves = np.repeat(batch.scratch - batch.start, runs.length)[which]
        for first in range(0, len(page), _FILLED_PAGES):
            part = slice(first, first + _FILLED_PAGES)
            self._fill_part(batch.home, page[part], moves[part], ram_fds)

    def _fill_part(
        self, home: HomeRegion, page: Int64s, moves: Int64s, ram_fds: dict[int, int]
    ) -> None:
        """Copy these pages into the RAM file, or to the address `moves` bytes further on."""
        seen = address_runs(self._space.hva(page))
        content = read_runs(self.vm, self.pid, *seen, self._content)
        if home.is_shared:
            offset = self._space.backend_offset(page) + home.region.ram_offset_bytes
            begin, pages = address_runs(offset)
            require_lengths(pages, len(content))
            source = content.ctypes.data + (np.cumsum(pages) - pages) * PAGE_BYTES
            _write_file(ram_fds[home.index], begin, source, pages)
            return
        target = self._space.hva(page) + moves
        write_runs(self.vm, self.pid, *address_runs(target), content)

    def _home_calls(self, stretch: _Stretch) -> Uint64s:
        """For each run, the call that maps it back."""
        home, runs = stretch.home, stretch.runs
        length = runs.length * PAGE_BYTES
        back = np.zeros((len(runs), 7), dtype=np.uint64)
        back[:, 0] = NR.MMAP
        back[:, 1] = stretch.start
        back[:, 2] = length
        back[:, 3] = mman.PROT_READ_WRITE
        self._private_mapping(home, back, runs)
        back[:, 4] |= np.uint64(mman.MAP_FIXED)
        if home.is_shared:
            # Fill QEMU's page tables at once: a page that is only in the RAM file
            # would look absent to the next pass.
            back[runs.slot != ZERO, 4] |= np.uint64(mman.MAP_POPULATE)
        else:
            moved = np.flatnonzero(runs.slot != ZERO)
            back[moved, 0] = NR.MREMAP
            back[moved, 1] = stretch.scratch[moved]
            back[moved, 2] = back[moved, 3] = length[moved]
            back[moved, 4] = _MOVE_WITHOUT_UNMAPPING
            back[moved, 5] = stretch.start[moved]
        return back

    def _again(self, home: HomeRegion, runs: Runs) -> Uint64s:
        """Calls that set QEMU's flags and policy again over the runs, after one call for each.

        They also cover the guest's own pages in between, which have these settings already,
        but no page that stays merged.
        """
        first, behind = runs.start_page, runs.start_page + runs.length
        is_apart = self._merged_before[first[1:]] != self._merged_before[behind[:-1]]
        start = self._space.hva(first[np.append(True, is_apart)])
        end = self._space.hva(behind[np.append(is_apart, True)] - 1) + PAGE_BYTES
        return home.reapply.calls(start, end, len(runs), self._remote.row_address)


def _usable(gate: Gate, entries: Uint64s, batch: _Stretch) -> npt.NDArray[np.bool_]:
    """Which runs may be mapped back: unchanged since they were filled, zero runs still zero."""
    runs = batch.runs
    good = gate.held(entries, batch.seen)
    if batch.seen is not None and not good.all():
        # The page was only read, perhaps by us: it still shows the store, or zeroes.
        good |= gate.held(entries) & ~_broken(entries) & ~_broken(batch.seen)
    is_zero = runs.slot == ZERO
    if is_zero.any():
        good &= ~(np.repeat(is_zero, runs.length) & _broken(entries))
    return np.asarray(np.logical_and.reduceat(good, np.cumsum(runs.length) - runs.length))


def _has_broken_zeroes(batch: _Stretch) -> bool:
    """Whether the guest had already written a page of a zero run when it was witnessed."""
    assert batch.seen is not None
    is_zero = np.repeat(batch.runs.slot == ZERO, batch.runs.length)
    return bool(_broken(batch.seen[is_zero]).any())


def _as_one(runs: Runs) -> Runs:
    """One run, as long as all of them together, that starts with the first."""
    return Runs(runs.start_page[:1], np.array([runs.pages]), runs.slot[:1])


def _broken(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which pages hold the guest's own writes, by their page table entries."""
    found = categories_of(entries)
    anonymous = (found & (PRESENT | FILE | PFNZERO)) == PRESENT
    return np.asarray(anonymous | ((found & SWAPPED) != 0))


def _write_file(fd: int, offset: Int64s, source: Int64s, pages: Int64s) -> None:
    """Write runs of pages, from these addresses of our own memory, into a RAM file."""
    # SAFETY: nobody maps these parts of the RAM file while the pages are merged.
    results = run_calls(call_columns(NR.PWRITE64, fd, source, pages * PAGE_BYTES, offset))
    if (results != pages * PAGE_BYTES).any():
        raise _RamFileError(_told(fd, max(-int(results.min()), 0) or errno.ENOSPC))


def _sync(fd: int) -> None:
    """Make the filesystem allocate room now for what was written."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise _RamFileError(_told(fd, error.errno or errno.EIO)) from error


def _told(fd: int, error: int) -> str:
    """Why a RAM file cannot take more content, and what to do."""
    path = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    if error == errno.EFBIG:
        return f"its RAM file {path} is beyond our file size limit; raise it (ulimit -f)"
    if error not in (errno.ENOSPC, errno.EDQUOT):
        return f"its RAM file {path} cannot be written ({os.strerror(error)}); mend that"
    found = os.fstatvfs(fd)
    left_bytes = found.f_bavail * found.f_frsize
    return (
        f"the filesystem of its RAM file {path} has {left_bytes // MIB} MiB left;"
        " make room there or enlarge it"
    )


class _RamFileError(OSError):
    """A RAM file cannot take more content; the pages in question stay merged."""


class _RamFile:
    """A region's RAM file, opened; a context manager that gives its descriptor."""

    def __init__(self, pid: int, region: Region) -> None:
        self._pid = pid
        self._region = region
        self._fd = -1

    def __enter__(self) -> int:
        flags = os.O_RDWR if self._region.share else os.O_RDONLY
        self._fd = open_ram_file(self._pid, self._region, flags)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _refused(pid: int, result: int) -> str:
    """Why a mapping failed in the process, with the limit that it met."""
    said = os.strerror(-result)
    return f"{said} ({limit_met(pid)})" if result == -errno.ENOMEM else said
