"""A process that arranges its own mappings and descriptors to fool us.

This process plays the QEMU: what is read of it comes from the real /proc.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vmdedup.attach.ramfile import find_ram_file
from vmdedup.attach.ranges import Region
from vmdedup.core.rmap import FIRST_SLOT, ZERO
from vmdedup.errors import MergeError, RefusedError, StoreError, VmError, VmGoneError
from vmdedup.guest.mapping_state import (
    StoreId,
    cached_pages,
    note_unmapped,
    open_ram_file,
    published_digests,
    read_mapping_state,
    swapped_slots,
)
from vmdedup.guest.page_space import PageSpace
from vmdedup.inject.leftovers import may_run_leftover_batch
from vmdedup.inject.scratch_files import scratch_fds, scratch_mappings, stale_scratch
from vmdedup.linux.maps import Maps, read_maps
from vmdedup.linux.pagemap import Pagemap, has_pagemap_scan
from vmdedup.linux.process import Process
from vmdedup.linux.readonly_fd import is_unwritable
from vmdedup.linux.smaps import is_guest_ram
from vmdedup.linux.syscalls import NR, syscall
from vmdedup.remap.release import punch_merged
from vmdedup.store.stable_store import SUMS_SUFFIX, StableStore
from vmdedup.units import PAGE_BYTES, Hva

pytestmark = pytest.mark.unit

PAGES = 16
BYTES = PAGES * PAGE_BYTES
ME = os.getpid


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hostile-", dir="/dev/shm") as path:
        yield Path(path)


@contextmanager
def mapped(fd: int, *, shared: bool, offset: int = 0, write: bool = True) -> Iterator[int]:
    """BYTES of a file mapped into this process, at the address that is yielded."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, BYTES, protection, flags, fd, offset)
    assert address is not None
    try:
        yield address
    finally:
        libc.munmap(address, BYTES)


def region(
    address: int, *, share: bool, file: os.stat_result | None = None, fd: int | None = None
) -> Region:
    return Region(
        backend="ram0",
        kind="file",
        share=share,
        merge=True,
        dump=True,
        policy="default",
        host_nodes=(),
        size_bytes=BYTES,
        start=Hva(address),
        ram_file=(file.st_dev, file.st_ino) if file else None,
        ram_offset_bytes=0,
        ram_fd=fd,
        filesystem="",
    )


def part_at(address: int) -> Maps:
    return read_maps("vm", ME()).within(address, address + BYTES)


def state_at(address: int, store_dir: Path) -> object:
    space = PageSpace([region(address, share=False)])
    with Pagemap("vm", ME(), use_scan=has_pagemap_scan()) as pagemap:
        return read_mapping_state("vm", ME(), space, pagemap, store_dir)


def file_of(path: Path, size_bytes: int = BYTES) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def test_a_file_it_can_only_read_is_never_taken_for_its_ram(folder: Path) -> None:
    """All of its RAM stands on a store of its own make; the RAM file could be any it has open."""
    (folder / "vmdedup").mkdir()
    fake = file_of(folder / "vmdedup" / "fake.store")
    victim = file_of(folder / "victim")
    mine = os.open(fake, os.O_RDWR)
    held: list[int] = []
    try:
        with mapped(mine, shared=False) as address, Process("vm", ME()) as process:

            def found() -> tuple[int, int]:
                part = part_at(address)
                return find_ram_file(process, part, address, BYTES, share=True, path="").identity

            held.append(os.open(victim, os.O_RDONLY))
            with pytest.raises(LookupError, match="cannot be told apart"):
                found()
            held.append(os.open(victim, os.O_RDWR))
            status = victim.stat()
            assert found() == (status.st_dev, status.st_ino)
    finally:
        for fd in (mine, *held):
            os.close(fd)


def test_a_mapping_that_only_reads_is_no_proof_that_it_may_write(folder: Path) -> None:
    fd = os.open(file_of(folder / "victim"), os.O_RDONLY)
    try:
        with (
            mapped(fd, shared=True, write=False) as address,
            Process("vm", ME()) as process,
            pytest.raises(LookupError),
        ):
            find_ram_file(process, part_at(address), address, BYTES, share=True, path="")
    finally:
        os.close(fd)


def test_our_descriptor_of_its_ram_has_no_more_access_than_its_own(folder: Path) -> None:
    victim = file_of(folder / "victim")
    fd = os.open(victim, os.O_RDONLY)
    try:
        lying = region(0x1000, share=True, file=victim.stat(), fd=fd)
        copied = open_ram_file(ME(), lying, os.O_RDWR)
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(copied, b"x", 0)
        finally:
            os.close(copied)
    finally:
        os.close(fd)


def test_a_ram_file_that_is_not_there_or_another_now_is_not_opened(folder: Path) -> None:
    victim, other = file_of(folder / "victim"), file_of(folder / "other")
    fd = os.open(other, os.O_RDWR)
    before = len(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(FileNotFoundError, match="has no RAM file"):
            open_ram_file(ME(), region(0x1000, share=True), os.O_RDONLY)
        reused = region(0x1000, share=True, file=victim.stat(), fd=fd)
        with pytest.raises(FileNotFoundError, match="was replaced"):
            open_ram_file(ME(), reused, os.O_RDONLY)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(fd)


def test_ram_that_is_not_mapped_any_more_is_not_taken_for_pages(folder: Path) -> None:
    fd = os.open(file_of(folder / "victim"), os.O_RDWR)
    try:
        with mapped(fd, shared=True) as address:
            pass
    finally:
        os.close(fd)
    with pytest.raises(VmGoneError, match="is not mapped any more"):
        state_at(address, folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="map_files is for root")
def test_a_private_mapping_is_never_opened_for_writing(folder: Path) -> None:
    """Its RAM file is "share=off": root could open any file it maps, and lend it to it."""
    victim = file_of(folder / "victim")
    fd = os.open(victim, os.O_RDONLY)
    with mapped(fd, shared=False) as address:
        os.close(fd)
        lying = region(address, share=False, file=victim.stat())
        with pytest.raises(FileNotFoundError, match="nothing maps"):
            open_ram_file(ME(), lying, os.O_RDWR)
        os.close(open_ram_file(ME(), lying, os.O_RDONLY))


def test_a_file_in_the_place_of_its_ram_is_not_punched(folder: Path) -> None:
    """Its own file was replaced since it was examined: nothing of either is discarded."""
    paths = [folder / "ram", folder / "other"]
    for path in paths:
        path.write_bytes(b"x" * BYTES)
    fd = os.open(paths[0], os.O_RDWR)
    try:
        with mapped(fd, shared=True) as address, Process("vm", ME()) as process:
            replaced = region(address, share=True, file=paths[1].stat(), fd=fd)
            with pytest.raises(MergeError, match="its RAM file was replaced"):
                punch_merged(process, [replaced], PageSpace([replaced]), np.arange(PAGES))
            own = region(address, share=True, file=paths[0].stat(), fd=fd)
            assert [path.read_bytes() for path in paths] == [b"x" * BYTES] * 2
            assert punch_merged(process, [own], PageSpace([own]), np.arange(PAGES - 1)) == PAGES - 1
    finally:
        os.close(fd)
    assert paths[0].read_bytes() == bytes(BYTES - PAGE_BYTES) + b"x" * PAGE_BYTES


def test_a_ram_file_that_became_shorter_ends_nothing_else(folder: Path) -> None:
    """One VM's file must not end the report of all: VmError, which names it, or nothing."""
    victim = file_of(folder / "victim")
    fd = os.open(victim, os.O_RDWR)
    try:
        with mapped(fd, shared=True) as address, Pagemap("vm", ME()) as pagemap:
            lying = region(address, share=True, file=victim.stat(), fd=fd)
            space = PageSpace([lying])
            state = read_mapping_state("vm", ME(), space, pagemap, folder)
            os.truncate(victim, PAGE_BYTES)
            note_unmapped(ME(), [lying], space, state)
            state.slot[:] = ZERO
            with pytest.raises(VmError, match="ram0: its RAM file cannot be read"):
                cached_pages(ME(), [lying], space, state)
    finally:
        os.close(fd)


def test_a_store_of_its_own_make_is_not_believed(folder: Path) -> None:
    """Slots beyond all numbers would cost us memory; its checksum file could be a pipe."""
    own = folder / "vmdedup-of-its-own"
    own.mkdir()
    fake = file_of(own / "fake.store", 1 << 44)
    os.mkfifo(own / "fake.sums")
    fd = os.open(fake, os.O_RDWR)
    try:
        with (
            mapped(fd, shared=False, offset=(1 << 43) + (1 << 30)) as address,
            pytest.raises(RefusedError, match="never published"),
        ):
            state_at(address, folder)
        with mapped(fd, shared=False, offset=FIRST_SLOT * PAGE_BYTES) as address:
            (met,) = state_at(address, folder).stores  # type: ignore[attr-defined]
            status = fake.stat()
            assert met == StoreId(status.st_dev, status.st_ino, None)
            assert published_digests(met) is None
    finally:
        os.close(fd)


def test_each_page_is_told_by_its_own_store_and_never_by_a_file_in_its_place(folder: Path) -> None:
    """A VM stands on two while its trust domain changes."""
    seen = {2: ("uid:1", FIRST_SLOT), 5: ("uid:2", FIRST_SLOT), 9: ("uid:2", FIRST_SLOT + 1)}
    with ExitStack() as exits:
        ram = os.memfd_create("ram")
        exits.callback(os.close, ram)
        os.truncate(ram, BYTES)
        address = exits.enter_context(mapped(ram, shared=False))
        for domain in ("uid:1", "uid:2"):
            store = exits.enter_context(StableStore(folder / "vmdedup", domain))
            digest = np.array([7, 8], dtype=np.uint64)
            store.publish(np.ones((2, PAGE_BYTES), dtype=np.uint8), digest)
            fd = store.open_read_only()
            exits.callback(os.close, fd)
            for page, (of, slot) in seen.items():
                if of == domain:
                    at, offset = address + page * PAGE_BYTES, slot * PAGE_BYTES
                    syscall(NR.MMAP, at, PAGE_BYTES, 3, mmap.MAP_PRIVATE | 0x10, fd, offset)
        space = PageSpace([region(address, share=False)])
        with Pagemap("vm", ME(), use_scan=has_pagemap_scan()) as pagemap:
            state = read_mapping_state("vm", ME(), space, pagemap, folder / "vmdedup")
        pages = np.flatnonzero(state.slot >= FIRST_SLOT).tolist()
        assert seen == {
            page: (state.stores[state.store[page]].domain, state.slot[page]) for page in pages
        }
        slots = np.array([FIRST_SLOT, FIRST_SLOT + 1])
        for store_id in state.stores:
            told = published_digests(store_id)
            assert told is not None
            assert told[1][slots].tolist() == [7, 8]
            assert not swapped_slots(store_id, slots).any()
            assert store_id.path is not None
            os.replace(file_of(folder / "other"), store_id.path)
            assert published_digests(store_id) is None
            assert not swapped_slots(store_id, slots).any()
            assert replace(store_id, path=None).domain is None


def test_slots_that_were_never_published_are_refused(folder: Path) -> None:
    content = np.ones((PAGES, PAGE_BYTES), dtype=np.uint8)
    store_dir = folder / "vmdedup"
    with StableStore(store_dir, "uid:0") as store:
        store.publish(content, np.arange(PAGES, dtype=np.uint64))
        fd = store.open_read_only()
        try:
            with mapped(fd, shared=False, offset=FIRST_SLOT * PAGE_BYTES) as address:
                (met,) = state_at(address, store_dir).stores  # type: ignore[attr-defined]
                assert met.path == store.path
            for slot in (FIRST_SLOT - 1, FIRST_SLOT + 1):
                other = mapped(fd, shared=False, offset=slot * PAGE_BYTES)
                with other as address, pytest.raises(RefusedError, match="never published"):
                    state_at(address, store_dir)
        finally:
            os.close(fd)


def test_a_store_of_an_earlier_version_is_left_alone(folder: Path) -> None:
    with StableStore(folder / "vmdedup", "uid:0") as store:
        store.publish(np.ones((1, PAGE_BYTES), dtype=np.uint8), np.ones(1, dtype=np.uint64))
        sums = store.path.with_suffix(SUMS_SUFFIX)
        met = StoreId(store.device, store.inode, store.path)
    assert published_digests(met) is not None
    with sums.open("r+b") as file:
        file.write(b"vmdedup1")
    assert published_digests(met) is None
    before = sums.read_bytes()
    with pytest.raises(StoreError, match="unmerge all with the one that made it"):
        StableStore(folder / "vmdedup", "uid:0")
    assert sums.read_bytes() == before


def test_files_named_almost_as_ours_are_not_ours() -> None:
    """One such name in any process of the host must not end a look at all of them."""
    names = ["stub-", "table-1-1-zz", "table-\u00b2-1-1", "table-1-1", "table-1-1-1-1", "stub-1--1"]
    fds = [os.memfd_create(f"vmdedup-{name}") for name in names]
    try:
        for fd in fds:
            os.truncate(fd, BYTES)
        with ExitStack() as exits:
            for fd in fds:
                exits.enter_context(mapped(fd, shared=True))
            assert scratch_mappings(ME()) == []
            assert stale_scratch(ME()) == []
            text = Path("/proc/self/maps").read_bytes()
            assert all(name.encode() in text for name in names)
            assert not may_run_leftover_batch(ME(), text, (0, 0))
        assert scratch_fds(ME()) == []
    finally:
        for fd in fds:
            os.close(fd)


def test_only_memory_with_the_marks_of_guest_ram_is_guest_ram() -> None:
    size = 4 * PAGE_BYTES
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = (ctypes.c_char * size).from_buffer(memory)
        address = ctypes.addressof(view)
        assert not is_guest_ram("vm", ME(), address, address + size)
        memory.madvise(mmap.MADV_DONTFORK)
        assert is_guest_ram("vm", ME(), address, address + size)
        del view


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount of its own takes root")
def test_a_lent_store_can_not_be_made_writable(folder: Path) -> None:
    with StableStore(folder / "vmdedup", "uid:0") as store:
        store.publish(np.ones((1, PAGE_BYTES), dtype=np.uint8), np.ones(1, dtype=np.uint64))
        fd = store.open_read_only()
        try:
            if not is_unwritable(fd):
                pytest.skip("open_tree or mount_setattr is not allowed here")
            for attempt in (
                lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
                lambda: os.fchmod(fd, 0o666),
                lambda: os.truncate(f"/proc/self/fd/{fd}", 0),
            ):
                with pytest.raises(OSError, match="Read-only file system"):
                    attempt()
            with pytest.raises(PermissionError):
                mmap.mmap(fd, PAGE_BYTES, flags=mmap.MAP_SHARED)
            assert ".store" not in Path("/proc/self/mountinfo").read_text()
        finally:
            os.close(fd)
