"""Filling untouched memory from a store that is mapped here."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vmdedup.core.rmap import FIRST_SLOT
from vmdedup.linux.pagemap import PRESENT, Pagemap, has_pagemap_scan
from vmdedup.linux.syscalls import NR, syscall
from vmdedup.linux.userfaultfd import SYNCHRONOUS_FEATURES, Userfault
from vmdedup.store.stable_store import PublishedPages, StableStore
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = 8


class Target:
    """Private memory of ours that nobody has touched."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PAGES * PAGE_BYTES, mmap.MAP_PRIVATE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.span = self.start, self.start + len(self._memory)

    def page(self, number: int) -> bytes:
        return self._memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]

    def present(self) -> list[bool]:
        with Pagemap("us", os.getpid(), use_scan=has_pagemap_scan()) as pagemap:
            return [bool(each & PRESENT) for each in pagemap.categories(self.start, PAGES)]


@pytest.fixture
def store() -> Iterator[StableStore]:
    content = np.repeat(np.arange(1, 5, dtype=np.uint8), PAGE_BYTES).reshape(4, PAGE_BYTES)
    with (
        tempfile.TemporaryDirectory(prefix="vmdedup-test-", dir="/dev/shm") as folder,
        StableStore(Path(folder) / "vmdedup", "uid:0") as store,
    ):
        store.publish(content, np.arange(4, dtype=np.uint64))
        yield store


@pytest.fixture
def userfault() -> Iterator[Userfault]:
    fd = syscall(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    made = Userfault("us", os.getpid(), fd, SYNCHRONOUS_FEATURES)
    yield made
    made.close()


def test_published_pages_come_where_they_should(store: StableStore, userfault: Userfault) -> None:
    target = Target()
    with PublishedPages.open(store.path, store.device, store.inode) as published:
        source = published.address(FIRST_SLOT + np.array([2, 0], dtype=np.int32))
        at = target.start + np.array([1, 4]) * PAGE_BYTES
        pages = np.array([2, 1])
        userfault.fill(target.span, at, source, pages * PAGE_BYTES)
        assert target.present() == [False, True, True, False, True, False, False, False]
        assert [target.page(n)[0] for n in (1, 2, 4)] == [3, 4, 1]
        assert [target.page(n) for n in (1, 4)] == [
            bytes([3]) * PAGE_BYTES,
            bytes([1]) * PAGE_BYTES,
        ]
        # Nothing of it is left: the rest is touched without anybody waiting.
        assert target.page(0) == bytes(PAGE_BYTES)


def test_what_is_there_already_is_not_filled_over(store: StableStore, userfault: Userfault) -> None:
    target = Target()
    ctypes.memset(target.start, 7, 1)
    with PublishedPages.open(store.path, store.device, store.inode) as published:
        source = published.address(np.array([FIRST_SLOT + 1], dtype=np.int32))
        with pytest.raises(OSError, match="UFFDIO_COPY: File exists"):
            userfault.fill(target.span, np.array([target.start]), source, np.array([PAGE_BYTES]))
    assert target.page(0) == b"\x07" + bytes(PAGE_BYTES - 1)
    assert target.page(1) == bytes(PAGE_BYTES)


def test_another_file_in_the_place_of_the_store_is_not_read(store: StableStore) -> None:
    device, inode = store.device, store.inode
    content = store.path.read_bytes()
    store.path.unlink()
    store.path.write_bytes(content)
    with pytest.raises(OSError, match="another file by now"):
        PublishedPages.open(store.path, device, inode)
    store.path.unlink()
    store.path.symlink_to("/dev/zero")
    with pytest.raises(OSError, match="symbolic links"):
        PublishedPages.open(store.path, device, inode)
