"""How the pages of VMs and RAM images repeat, counted exactly (`vmdedup analyze`).

Owns the reading: raw images from disk, running VMs through their own mappings.
Promises that reading changes nothing: the state of every page is read first. Absent pages
and holes count as the zero pages that reading them would give. Pages that
no page table has are read from their file. Memory is bounded: for images one piece at a
time and 16 bytes for each distinct page, for VMs 16 bytes for each page.

A page that is swapped out is not read; it counts as a distinct content, and a warning
says how many such pages there were. A running VM continues to write: each of its pages
counts as it was when it was read. Refuses nothing that can be read: a hazard that forbids
merging does not forbid counting.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.attach.discover import Attachment, attach_all, expand
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.ranges import Region, find_regions
from vmdedup.core.census import Census
from vmdedup.core.digest import fingerprint_pages, zero_fingerprint
from vmdedup.core.rmap import FIRST_SLOT, OWN
from vmdedup.core.sorting import page_runs
from vmdedup.errors import AttachError, VmError, VmGoneError
from vmdedup.guest.mapping_state import (
    MappingState,
    StoreId,
    open_ram_file,
    read_mapping_state,
)
from vmdedup.guest.page_space import PageSpace
from vmdedup.guest.ram_image import open_image, read_fully, read_image
from vmdedup.guest.vm_readv import PageVanishedError, page_buffer, read_runs
from vmdedup.linux.filesystems import IN_MEMORY
from vmdedup.linux.pagemap import (
    PFNZERO,
    PRESENT,
    SWAPPED,
    Pagemap,
    has_pagemap_scan,
    zero_page_frame,
)
from vmdedup.linux.sparse_file import allocated, resident
from vmdedup.models import ContentAnalysis
from vmdedup.settings import Settings
from vmdedup.store.stable_store import opened_store
from vmdedup.units import MIB, PAGE_BYTES, PAGE_SHIFT, pages

_READ_PAGES = MIB // PAGE_BYTES
"""Pages read and hashed at once: 1 MiB pieces keep the copy in the L2 cache."""


@dataclass(frozen=True)
class ImageSource:
    """A raw RAM image on disk."""

    path: str


@dataclass(frozen=True)
class QmpSource:
    """Running VMs: a QMP socket or a glob of them."""

    pattern: str


Source = ImageSource | QmpSource
Fingerprints = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AnalysisProgress:
    """The progress of counting the VM or image `name`."""

    name: str
    done_pages: int
    total_pages: int


def _nobody(_: object) -> None:
    """Ignore the argument: the default callback."""


@dataclass(frozen=True)
class _Look:
    """Values that all readings of one analysis share."""

    settings: Settings
    seed: int
    progress: Callable[[AnalysisProgress], None]
    warn: Callable[[str], None]


def analyze(
    sources: Sequence[Source] = (),
    *,
    settings: Settings | None = None,
    progress: Callable[[AnalysisProgress], None] = _nobody,
    warn: Callable[[str], None] = _nobody,
) -> ContentAnalysis:
    """Count the sources in their order; without any, every QEMU of this host.

    A VM that cannot be reached or read, or that ends meanwhile, is left out:
    `warn` gets one line with the reason. Raises ImageError if an image cannot
    be read; if it does not exist, before any long work.
    """
    look = _Look(settings or Settings(), secrets.randbits(63), progress, warn)
    census = Census(zero_fingerprint(look.seed))
    with ExitStack() as exits:
        images = {
            source: exits.enter_context(open_image(source.path))
            for source in dict.fromkeys(sources)
            if isinstance(source, ImageSource)
        }
        attached = _attach(sources, look, exits)
        for number, source in enumerate(sources or [QmpSource("")]):
            if isinstance(source, ImageSource):
                _count_image(source.path, images[source], census, look)
            for attachment in attached.get(number, ()):
                _count_vm(attachment, census, look)
    return census.result()


# ---- images ----


def _count_image(path: str, fd: int, census: Census, look: _Look) -> None:
    """Feed one image. Raises ImageError."""
    census.add_vm(path)
    total = pages(os.fstat(fd).st_size)
    fed = 0
    for first, content in read_image(path, fd, page_buffer(_READ_PAGES)):
        census.feed(fingerprint_pages(content.reshape(-1).data, look.seed))
        fed += len(content)
        look.progress(AnalysisProgress(path, first + len(content), total))
    census.feed_zero(total - fed)
    look.progress(AnalysisProgress(path, total, total))


# ---- running VMs ----


def _attach(
    sources: Sequence[Source], look: _Look, exits: ExitStack
) -> dict[int, list[Attachment]]:
    """Attached VMs by the index of their source; all are attached at the same time."""
    patterns = [(n, s.pattern) for n, s in enumerate(sources) if isinstance(s, QmpSource)]
    if sources and not patterns:
        return {}
    loop = exits.enter_context(MonitorLoop())
    timeout_s = look.settings.monitor_timeout_ms / 1000
    found = attach_all(
        [pattern for _, pattern in patterns],
        loop,
        timeout_s=timeout_s,
        use=look.settings.monitor,
    )
    for attachment in found.attached:
        exits.callback(attachment.close)
    for lost in found.unreachable:
        look.warn(str(AttachError(lost.name, lost.reason, pid=lost.pid)))
    if not patterns:
        return {0: found.attached}
    source_of = {
        candidate.sockets[0]: number
        for number, pattern in reversed(patterns)
        for candidate in expand([pattern])
    }
    by_source: dict[int, list[Attachment]] = {}
    for attachment in found.attached:
        path = attachment.identity.socket_path
        if path in source_of:
            by_source.setdefault(source_of[path], []).append(attachment)
    return by_source


def _count_vm(attachment: Attachment, census: Census, look: _Look) -> None:
    """Feed one VM once it was read completely; otherwise leave it out with a warning."""
    vm, pid = attachment.identity.name, attachment.identity.pid
    try:
        reading = _read_vm(attachment, look)
    except VmError as error:
        look.warn(str(error))
        return
    except PermissionError:
        look.warn(str(AttachError(vm, "its memory may not be read (run as root)", pid=pid)))
        return
    except OSError as error:
        look.warn(str(AttachError(vm, f"its memory cannot be read: {error.strerror}", pid=pid)))
        return
    finally:
        attachment.close()
    census.add_vm(vm)
    for fingerprints in reading.fingerprints:
        census.feed(fingerprints)
    census.feed_zero(reading.zero_pages)
    if reading.swapped_pages:
        # They are never read, so their contents are unknown: no two count as equal.
        raw = np.frombuffer(secrets.token_bytes(16 * reading.swapped_pages), dtype=np.uint64)
        census.feed(raw.reshape(-1, 2))
        count = f"{reading.swapped_pages} swapped pages"
        look.warn(f"{vm} (pid {pid}): {count} were not read; each counts as a content of its own")


def _read_vm(attachment: Attachment, look: _Look) -> _VmReading:
    vm, pid = attachment.identity.name, attachment.identity.pid
    regions, left_alone = find_regions(attachment.monitor, attachment.process)
    if not regions:
        why = "; ".join(f"{backend}: {reason}" for backend, reason in left_alone)
        raise AttachError(vm, f"no mergeable memory ({why or 'no memory backend'})", pid=pid)
    for backend, reason in left_alone:
        if reason != "merge=off":
            look.warn(f"{vm} (pid {pid}): backend {backend} is not counted: {reason}")
    reading = _VmReading(vm, pid, regions, look)
    try:
        reading.read()
    except PageVanishedError as error:
        attachment.process.require_alive()
        raise VmGoneError(vm, "its RAM was unplugged while it was read", pid=pid) from error
    attachment.process.require_alive()
    return reading


class _VmReading:
    """One VM's fingerprints, taken page by page from mappings, the store or RAM files."""

    def __init__(self, vm: str, pid: int, regions: list[Region], look: _Look) -> None:
        self.fingerprints: list[Fingerprints] = []
        self.swapped_pages = 0
        self._vm = vm
        self._pid = pid
        self._regions = regions
        self._look = look
        self._space = PageSpace(regions)
        self._buffer = page_buffer(_READ_PAGES)
        self._read_pages = 0

    @property
    def zero_pages(self) -> int:
        """Number of pages known to be zero without reading them."""
        return self._space.pages - self._read_pages - self.swapped_pages

    def read(self) -> None:
        """Read all pages. Raises VmGoneError, PageVanishedError, PermissionError."""
        use_scan = self._look.settings.has("pagemap-scan") and has_pagemap_scan()
        with Pagemap(self._vm, self._pid, use_scan=use_scan) as pagemap:
            state = read_mapping_state(
                self._vm, self._pid, self._space, pagemap, self._look.settings.store_dir
            )
        present = (state.categories & PRESENT) != 0
        swapped = ~present & ((state.categories & SWAPPED) != 0)
        zero = np.zeros_like(present)
        if use_scan or zero_page_frame():  # raw entries hide frame numbers from non-root users
            zero = present & ((state.categories & PFNZERO) != 0)
        self.swapped_pages += int(np.count_nonzero(swapped))
        self._read_present(np.flatnonzero(present & ~zero))
        absent = ~present & ~swapped
        self._read_store_pages(state, absent & (state.slot >= FIRST_SLOT))
        for number, region in enumerate(self._regions):
            where = self._space.slice_of(number)
            unmapped = absent[where] & (state.slot[where] == OWN)
            if region.ram_file is not None and unmapped.any():
                self._read_unmapped(region, unmapped)
        self._tell(self._space.pages)

    def _tell(self, done_pages: int) -> None:
        self._look.progress(AnalysisProgress(self._vm, done_pages, self._space.pages))

    def _take(self, content: npt.NDArray[np.uint8]) -> Fingerprints:
        return fingerprint_pages(content.reshape(-1).data, self._look.seed)

    def _read_present(self, page: Pages) -> None:
        """Read pages of QEMU's page tables through QEMU's mapping: what the guest sees."""
        for first in range(0, len(page), _READ_PAGES):
            piece = page[first : first + _READ_PAGES]
            start, length = page_runs(piece, self._space.first_page)
            address = self._space.hva(start)
            content = read_runs(self._vm, self._pid, address, length, self._buffer)
            self.fingerprints.append(self._take(content))
            self._read_pages += len(piece)
            self._tell(int(piece[-1]) + 1)

    def _read_store_pages(self, state: MappingState, untouched: npt.NDArray[np.bool_]) -> None:
        """Read merged pages that are not in page tables from the store, so that they stay out."""
        for number, store in enumerate(state.stores):
            slot = state.slot[untouched & (state.store == number)].astype(np.int64)
            if not len(slot):
                continue
            distinct, which = np.unique(slot, return_inverse=True)
            with self._opened_store(store) as fd:
                found = list(self._read_file(fd, distinct))
            self.fingerprints.append(np.concatenate(found)[which])
            self._read_pages += len(slot)

    @contextmanager
    def _opened_store(self, store: StoreId) -> Iterator[int]:
        """A descriptor of the store that a mapping names, if that is still the file at its path."""
        if store.path is None:
            reason = "its merged pages cannot be read: their store is not in our store directory"
            raise AttachError(self._vm, reason, pid=self._pid)
        with ExitStack() as exits:
            try:
                fd = exits.enter_context(opened_store(store.path, store.device, store.inode))
            except OSError as error:
                reason = f"its merged pages cannot be read: {store.path}: {error.strerror}"
                raise AttachError(self._vm, reason, pid=self._pid) from error
            yield fd

    def _read_unmapped(self, region: Region, unmapped: npt.NDArray[np.bool_]) -> None:
        """Read RAM file pages that are not in QEMU's page tables (a fault would map them)."""
        try:
            fd = open_ram_file(self._pid, region, os.O_RDONLY)
        except OSError as error:
            reason = f"{region.backend}: its RAM file cannot be read: {error}"
            raise AttachError(self._vm, reason, pid=self._pid) from error
        try:
            held = unmapped & allocated(fd, region.ram_offset_bytes, region.pages)
            if held.any() and region.filesystem in IN_MEMORY:
                swapped = held & ~resident(fd, region.ram_offset_bytes, region.pages)
                self.swapped_pages += int(np.count_nonzero(swapped))
                held &= ~swapped
            page = np.flatnonzero(held) + (region.ram_offset_bytes >> PAGE_SHIFT)
            self.fingerprints.extend(self._read_file(fd, page))
            self._read_pages += len(page)
        finally:
            os.close(fd)

    def _read_file(self, fd: int, page: Pages) -> Iterator[Fingerprints]:
        """Fingerprints of a file's pages, by ascending page numbers."""
        for first in range(0, len(page), _READ_PAGES):
            piece = page[first : first + _READ_PAGES]
            start, length = page_runs(piece, np.empty(0, dtype=np.int64))
            filled = 0
            for at, count in zip(start.tolist(), length.tolist(), strict=True):
                into = self._buffer[filled : filled + count].reshape(-1)
                try:
                    read_fully(fd, at << PAGE_SHIFT, into)
                except EOFError as error:
                    reason = "its RAM file became shorter while it was read"
                    raise VmGoneError(self._vm, reason, pid=self._pid) from error
                filled += count
            yield self._take(self._buffer[:filled])
