"""The mapping state: a VM's mappings and pages, read back from the kernel.

Owns the reading of a VM's merge state from /proc/PID/maps and pagemap, and the
check that merged memory was really freed. Promises to need no memory of an
earlier process of ours. A page is merged if its mapping shows a store or
/dev/zero, and broken if the page tables show a page of the guest's own there.
Reads only.

A marker entry (left by write protection on an untouched store page) is not
content: only present anonymous pages and real swap entries count as broken.

Page tables do not tell all: they have no entry for share=on memory, or a store page, that
is swapped out. The file tells of such pages: it has them, and not in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from vmdedup.attach.ranges import Region
from vmdedup.core.rmap import FIRST_SLOT, OWN, ZERO
from vmdedup.core.sorting import ranges
from vmdedup.core.zeroes import zeroes
from vmdedup.errors import RefusedError, StoreError, VmError, VmGoneError
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.filesystems import IN_MEMORY
from vmdedup.linux.maps import (
    STORE_SUFFIX,
    ZERO_DEVICE,
    Maps,
    is_merged_onto,
    is_store_path,
    read_maps,
)
from vmdedup.linux.pagemap import FILE, HUGE, PFNZERO, PRESENT, SWAPPED, Pagemap
from vmdedup.linux.sparse_file import allocated, resident
from vmdedup.linux.syscalls import pidfd_getfd
from vmdedup.store.stable_store import (
    SUMS_SUFFIX,
    PublishedPages,
    opened_store,
    read_sums,
)
from vmdedup.units import BLOCK_BYTES, PAGE_BYTES, PAGE_SHIFT

_MOST_SLOTS = 2**31 - 1
"""Most slots of a store: they are int32."""
_MOST_STORES = 255
"""Most stores of one VM: their numbers are uint8. It has one, two while its domain changes."""

HELD = PRESENT | SWAPPED | FILE
"""Categories that mean, on a VM's own page, that it occupies memory or swap."""
_EVERY_CATEGORY = np.arange(256)
_HOLDS_OWN = ((_EVERY_CATEGORY & (PRESENT | FILE)) == PRESENT) | (_EVERY_CATEGORY & SWAPPED != 0)
"""Whether a private file mapping shows a page of the VM's own there, by category."""
_HOLDS_OWN_BUT_ZERO = _HOLDS_OWN & (_EVERY_CATEGORY & (SWAPPED | PFNZERO) != PFNZERO)
"""The same for a mapping of /dev/zero, which maps the zero page."""


@dataclass(frozen=True)
class StoreId:
    """A store file as the kernel names it in a mapping."""

    device: int
    inode: int
    path: Path | None
    """Path of the file in our store directory; `None` if it is not there (any more)."""

    @property
    def domain(self) -> str | None:
        """The trust domain of the store, `None` if its name is not known."""
        return None if self.path is None else unquote(self.path.name.removesuffix(STORE_SUFFIX))


@dataclass(frozen=True)
class MappingState:
    """One VM's RAM as the kernel has it now; columns have one row a page.

    slot: int32, OWN, ZERO or the slot in store `stores[store]`. If it is also the column
        of a rmap, later merges are noted in it too.
    store: uint8, meaningful if slot >= FIRST_SLOT.
    categories: uint8, the pagemap categories (PRESENT, FILE, SWAPPED, PFNZERO, HUGE). After
        `note_unmapped` also for pages that a RAM file holds beside the page tables:
        SWAPPED, or FILE alone if in memory.
    """

    slot: npt.NDArray[np.int32]
    store: npt.NDArray[np.uint8]
    categories: npt.NDArray[np.uint8]
    stores: tuple[StoreId, ...]
    process_vmas: int
    ram_vmas: int

    @property
    def broken(self) -> npt.NDArray[np.bool_]:
        """Pages that were merged once but written by the guest since."""
        return _broken(self.slot, self.categories)

    def broken_at(self, page: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each of these pages is `broken`."""
        return _broken(self.slot[page], self.categories[page])

    @property
    def merged(self) -> npt.NDArray[np.bool_]:
        """Pages that really share a store page now."""
        return np.asarray((self.slot >= FIRST_SLOT) & ~self.broken)

    @property
    def zero(self) -> npt.NDArray[np.bool_]:
        """Pages that really share the zero page now."""
        return np.asarray((self.slot == ZERO) & ~self.broken)

    @property
    def own(self) -> npt.NDArray[np.bool_]:
        """Pages that occupy memory of the VM's own, in RAM or in swap."""
        return np.asarray(self.broken | ((self.slot == OWN) & (self.categories & HELD != 0)))

    def note(self, page: npt.NDArray[np.int64], categories: npt.NDArray[np.uint8]) -> None:
        """Note pages that were written, and their categories now; mappings are unchanged."""
        self.categories[page] = categories

    def note_remapped(self, page: npt.NDArray[np.int64]) -> None:
        """Note pages that were mapped again: nothing is there until the guest touches them."""
        self.categories[page] = 0

    def held_bytes(self) -> int:
        """Memory the VM would hold without vmdedup: its own, merged and zero-merged pages."""
        pages = np.count_nonzero(self.own | self.merged | self.zero)
        return int(pages) * PAGE_BYTES


def read_mapping_state(
    vm: str, pid: int, space: PageSpace, pagemap: Pagemap, store_dir: Path
) -> MappingState:
    """Read the state of every page of the page space.

    Raises VmGoneError, and RefusedError when it maps store pages that do not exist.
    """
    maps = read_maps(vm, pid)
    slot = zeroes(space.pages, np.int32)
    store = zeroes(space.pages, np.uint8)
    categories = zeroes(space.pages, np.uint8)
    stores = _Stores(vm, pid, store_dir)
    ram_vmas = 0
    for region in range(len(space.address)):
        start, end = space.span(region)
        if not maps.covers(start, end):
            raise VmGoneError(vm, f"its RAM at {start:#x} is not mapped any more", pid=pid)
        part = maps.within(start, end)
        ram_vmas += len(part)
        where = space.slice_of(region)
        _fill_slots(part, start, end, slot[where], store[where], stores)
    read_categories(space, pagemap, categories)
    return MappingState(slot, store, categories, tuple(stores.met), len(maps), ram_vmas)


def standing_pages(pid: int) -> int:
    """Pages of a process that are mapped to a store or /dev/zero, by its mappings alone.

    Broken pages count too. `0` for a process that has ended, or may not be read.
    """
    try:
        maps = read_maps("", pid)
    except (OSError, VmError):
        return 0
    return sum(
        int(maps.end[row] - maps.start[row]) // PAGE_BYTES
        for row, path in enumerate(maps.path)
        if maps.permissions[row] == "rw-p" and is_merged_onto(path)
    )


def read_categories(space: PageSpace, pagemap: Pagemap, categories: npt.NDArray[np.uint8]) -> None:
    """Write the category of every page of the page space into a column of zeroes."""
    for region in range(len(space.address)):
        pagemap.note_categories(space.span(region)[0], categories[space.slice_of(region)])
    if not pagemap.use_scan:
        # Raw entries do not tell which pages are huge: each present page may be.
        categories[(categories & PRESENT) != 0] |= HUGE


def note_unmapped(
    pid: int, regions: Sequence[Region], space: PageSpace, state: MappingState
) -> None:
    """Add to the categories the share=on pages that only RAM files hold, not the page tables.

    For a file on disk these are the pages in its cache. A file that cannot be opened adds
    none. If a tmpfs file holds nothing beside the page tables, only its size is read.
    """
    for index, region in enumerate(regions):
        if not region.share:
            continue
        where = space.slice_of(index)
        absent = (state.slot[where] == OWN) & (state.categories[where] & HELD == 0)
        mapped = np.count_nonzero((state.slot[where] == OWN) & ~absent)
        with suppress(VmError), _ram_file(pid, region) as fd:
            if region.filesystem not in IN_MEMORY:
                absent &= resident(fd, region.ram_offset_bytes, region.pages)
                state.categories[where][absent] = FILE
                continue
            if os.fstat(fd).st_blocks * BLOCK_BYTES <= mapped * PAGE_BYTES:
                continue
            absent &= allocated(fd, region.ram_offset_bytes, region.pages)
            if absent.any():
                is_here = resident(fd, region.ram_offset_bytes, region.pages)[absent]
                state.categories[where][absent] = np.where(is_here, FILE, SWAPPED)


def _broken(
    slot: npt.NDArray[np.int32], categories: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Whether each of these pages was merged and has a page of the VM's own again."""
    of_store, of_zero = _HOLDS_OWN[categories], _HOLDS_OWN_BUT_ZERO[categories]
    return np.asarray(((slot >= FIRST_SLOT) & of_store) | ((slot == ZERO) & of_zero))


def _fill_slots(
    part: Maps,
    start: int,
    end: int,
    slot: npt.NDArray[np.int32],
    store: npt.NDArray[np.uint8],
    stores: _Stores,
) -> None:
    """Write slot and store of the pages of one region that are not mapped to its own memory."""
    vma_start = part.start.astype(np.int64)
    low = np.maximum(vma_start, start).astype(np.int64)
    pages = np.asarray(np.minimum(part.end.astype(np.int64), end) - low, dtype=np.int64)
    pages >>= PAGE_SHIFT
    offset = (part.offset_bytes.astype(np.int64) + (low - vma_start)) >> PAGE_SHIFT
    first = np.cumsum(pages) - pages
    for device, inode in set(zip(part.device.tolist(), part.inode.tolist(), strict=True)):
        rows = np.flatnonzero((part.device == device) & (part.inode == inode))
        path = part.path[rows[0]]
        if path == ZERO_DEVICE:
            slot[ranges(first[rows], pages[rows])] = ZERO
        elif is_store_path(path) and part.permissions[rows[0]].endswith("p"):
            spanned = int(offset[rows].min()), int((offset + pages)[rows].max())
            number = stores.number(device, inode, spanned)
            page = ranges(first[rows], pages[rows])
            slot[page] = ranges(offset[rows], pages[rows])
            if number:  # nearly always `0`: then the column stays untouched memory
                store[page] = number


class _Stores:
    """The stores met in one VM's mappings, numbered.

    A VM may map any file. So a store is recognised by device and inode among the files of
    our own directory; a name in a mapping is never opened.
    """

    def __init__(self, vm: str, pid: int, directory: Path) -> None:
        self._vm = vm
        self._pid = pid
        self._slots: dict[tuple[int, int], tuple[Path, int]] = {}
        self.met: list[StoreId] = []
        with suppress(OSError):
            for path in directory.glob(f"*{STORE_SUFFIX}"):
                found = path.lstat()
                self._slots[found.st_dev, found.st_ino] = path, found.st_size // PAGE_BYTES

    def number(self, device: int, inode: int, spanned: tuple[int, int]) -> int:
        """The number of the file; RefusedError when `spanned` (first, end) are not its slots."""
        path, slots = self._slots.get((device, inode), (None, _MOST_SLOTS))
        if spanned[0] < FIRST_SLOT or spanned[1] > slots or len(self.met) >= _MOST_STORES:
            reason = "it maps pages that were never published: QEMU itself has changed its mappings"
            raise RefusedError(self._vm, reason, pid=self._pid)
        for number, known in enumerate(self.met):
            if (known.device, known.inode) == (device, inode):
                return number
        self.met.append(StoreId(device, inode, path))
        return len(self.met) - 1


def swapped_slots(store: StoreId, slot: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether the page of each of these slots of a store, ascending, is swapped out.

    False for all if the store's file is gone or replaced.
    """
    if store.path is None or not len(slot):
        return np.zeros(len(slot), dtype=np.bool_)
    try:
        with PublishedPages.open(store.path, store.device, store.inode) as published:
            return ~published.resident(slot)
    except OSError:
        return np.zeros(len(slot), dtype=np.bool_)


def published_digests(store: StoreId) -> tuple[int, npt.NDArray[np.uint64]] | None:
    """Seed and digests of a store; `None` if its files are gone or replaced."""
    path = store.path
    if path is None:
        return None
    try:
        with opened_store(path, store.device, store.inode):
            return read_sums(path.with_name(path.name.removesuffix(STORE_SUFFIX) + SUMS_SUFFIX))
    except (OSError, StoreError):
        return None


def open_ram_file(pid: int, region: Region, flags: int) -> int:
    """Our own descriptor of a region's RAM file, through QEMU's descriptor or mapping.

    It never has more access than QEMU itself: QEMU's descriptor is copied, not opened
    again, and a mapping is opened for writing only if QEMU may write to the file
    through it. Raises OSError when there is neither, or when the file was replaced.
    """
    if region.ram_file is None:
        raise FileNotFoundError(f"{region.backend} has no RAM file")
    if region.ram_fd is not None:
        fd = _copied_fd(pid, region.ram_fd)
    else:
        fd = _open_mapped(pid, region, flags)
    found = os.fstat(fd)
    if (found.st_dev, found.st_ino) != region.ram_file:
        os.close(fd)
        raise FileNotFoundError(f"{region.backend}: its RAM file was replaced")
    return fd


def _copied_fd(pid: int, number: int) -> int:
    """A copy of descriptor `number` of the process, with its access."""
    pidfd = os.pidfd_open(pid)
    try:
        return pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)


def _open_mapped(pid: int, region: Region, flags: int) -> int:
    """Open the RAM file through a mapping of it inside the region."""
    assert region.ram_file is not None
    maps = read_maps(region.backend, pid).within(region.start, region.end)
    for row in maps.of_file(*region.ram_file).tolist():
        if flags & os.O_ACCMODE == os.O_RDONLY or maps.permissions[row].startswith("rw-s"):
            link = f"map_files/{int(maps.start[row]):x}-{int(maps.end[row]):x}"
            return os.open(f"/proc/{pid}/{link}", flags | os.O_CLOEXEC)
    raise FileNotFoundError(f"{region.backend}: nothing maps its RAM file any more")


@contextmanager
def _ram_file(pid: int, region: Region) -> Iterator[int]:
    """The RAM file of a region, open for questions about its pages. Reads none.

    Raises VmGoneError, or VmError when the file cannot be opened or asked.
    """
    try:
        fd = open_ram_file(pid, region, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # ValueError: it has become shorter
        with suppress(OSError):
            read_maps(region.backend, pid)  # raises VmGoneError if the VM ended
        reason = f"{region.backend}: its RAM file cannot be read: {error}"
        raise VmError(region.backend, reason, pid=pid) from error


def cached_pages(
    pid: int, regions: Sequence[Region], space: PageSpace, state: MappingState
) -> npt.NDArray[np.bool_]:
    """Merged pages of share=on RAM whose old page is still in the cache of a filesystem on disk.

    A hole takes a page out of a large folio only if the folio can be split, and a dirty
    folio cannot (mm/truncate.c: truncate_inode_partial_folio). Raises VmGoneError, or
    VmError if a file cannot be read.
    """
    cached = np.zeros(space.pages, dtype=np.bool_)
    for index, region in enumerate(regions):
        where = space.slice_of(index)
        remapped = state.slot[where] != OWN
        if not region.share or region.filesystem in IN_MEMORY or not remapped.any():
            continue
        with _ram_file(pid, region) as fd:
            cached[where] = remapped & resident(fd, region.ram_offset_bytes, region.pages)
    return cached


def unfreed_pages(
    pid: int,
    regions: Sequence[Region],
    space: PageSpace,
    state: MappingState,
    *,
    only_memory: bool = False,
) -> npt.NDArray[np.bool_]:
    """Merged pages of share=on RAM whose old page still lies in the RAM file.

    Nothing maps that page any more, but it occupies memory until its hole is punched. With
    `only_memory` RAM files on disk are left out: there a filesystem may keep the blocks of
    a short hole (ext4 zeroes them), and `cached_pages` tells of memory. Without it, if a
    file has blocks that no seek finds, all its merged pages count.
    Raises VmGoneError, or VmError if a file cannot be read.
    """
    unfreed = np.zeros(space.pages, dtype=np.bool_)
    remapped = state.slot != OWN
    for index, region in enumerate(regions):
        where = space.slice_of(index)
        if not region.share or not remapped[where].any():
            continue
        if only_memory and region.filesystem not in IN_MEMORY:
            continue
        with _ram_file(pid, region) as fd:
            before = region.ram_offset_bytes // PAGE_BYTES
            held = allocated(fd, 0, before + region.pages)
            data_bytes = np.count_nonzero(held) * PAGE_BYTES
            if not only_memory and os.fstat(fd).st_blocks * BLOCK_BYTES > data_bytes:
                # Blocks without content, as an unmerge allocates them: no seek finds them.
                held[:] = True
        unfreed[where] = remapped[where] & held[before:]
    return unfreed
