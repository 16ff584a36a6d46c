"""A region that is wholly home is mapped as one again only where it still is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.kernel import mappings
from tests.process.victims import Victim
from vmdedup.attach.ranges import Region
from vmdedup.errors import MergeError
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.syscalls import NR
from vmdedup.remap.advice import Reapply
from vmdedup.remap.unmerge import HomeRegion, _sync, join_mappings
from vmdedup.units import Hva

pytestmark = pytest.mark.process

BYTES = 16 * 4096
PROT_RW, SHARED, FIXED = 3, 1, 0x10


class Ram:
    """A victim's RAM file, mapped in two pieces that the kernel cannot join."""

    def __init__(self, program: Path) -> None:
        self.files = [os.memfd_create(name) for name in ("ram", "other")]
        for fd in self.files:
            os.ftruncate(fd, 2 * BYTES)
        again = os.open(f"/proc/self/fd/{self.files[0]}", os.O_RDWR)
        self.victim = Victim(program, pass_fds=[*self.files, again])
        self.remote = RemoteThread("vm", self.victim.pid, self.victim.worker)
        self.remote.open()
        ram, _ = self.files
        self.start = self.remote.call(NR.MMAP, 0, BYTES, PROT_RW, SHARED, ram, 0)
        self.map(self.start + BYTES // 2, again, BYTES // 2)
        os.close(again)

    def map(self, address: int, fd: int, offset: int, size_bytes: int = BYTES // 2) -> None:
        place = (address, size_bytes, PROT_RW, SHARED | FIXED, fd, offset)
        assert self.remote.call(NR.MMAP, *place) == address

    def pieces(self) -> list[tuple[int, int]]:
        """(inode, offset) of what is mapped there."""
        return [
            (m.inode, m.offset)
            for m in mappings(self.victim.pid)
            if self.start <= m.start < self.start + BYTES
        ]

    def join(self, fd: int | None = None) -> None:
        """By this descriptor of the victim, that of its RAM file by default."""
        found = os.fstat(self.files[0])
        region = Region(
            backend="ram0",
            kind="ram",
            share=True,
            merge=True,
            dump=True,
            policy="default",
            host_nodes=(),
            size_bytes=BYTES,
            start=Hva(self.start),
            ram_file=(found.st_dev, found.st_ino),
            ram_offset_bytes=0,
            ram_fd=None,
            filesystem="memfd",
        )
        home = HomeRegion(region, 0, fd or self.files[0], Reapply.of(region, ()))
        join_mappings("vm", self.remote, home)


@pytest.fixture
def ram(programs: dict[str, Path]) -> Iterator[Ram]:
    made = Ram(programs["dynamic"])
    try:
        yield made
    finally:
        made.remote.close()
        made.victim.require_healthy()
        made.victim.__exit__(None, None, None)
        for fd in made.files:
            os.close(fd)


def test_two_pieces_become_one(ram: Ram) -> None:
    assert len(ram.pieces()) == 2
    ram.join()
    assert ram.pieces() == [(os.fstat(ram.files[0]).st_ino, 0)]


def test_a_join_that_fails_leaves_both_pieces(ram: Ram) -> None:
    before = ram.pieces()
    with pytest.raises(MergeError, match="mapping the whole region: Bad file descriptor"):
        ram.join(9999)
    assert ram.pieces() == before
    ram.join()
    assert len(ram.pieces()) == 1


def refused(ram: Ram) -> None:
    before = ram.pieces()
    with pytest.raises(MergeError, match="backend ram0 is not there any more"):
        ram.join()
    assert ram.pieces() == before
    assert not ram.remote.stands_still


def test_what_was_unplugged_is_not_mapped_again(ram: Ram) -> None:
    ram.remote.call(NR.MUNMAP, ram.start + BYTES // 2, BYTES // 2)
    refused(ram)
    ram.remote.call(NR.MUNMAP, ram.start, BYTES)
    refused(ram)
    assert ram.pieces() == []


def test_what_came_to_its_address_is_left_alone(ram: Ram) -> None:
    ram.map(ram.start, ram.files[0], BYTES)  # another part of the file
    refused(ram)
    ram.map(ram.start, ram.files[1], 0, BYTES)
    refused(ram)


def test_a_ram_file_that_cannot_be_synced_is_told() -> None:
    """A pipe cannot: what stays merged for it is named with the kernel's word."""
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match=r"file pipe:.* cannot be written \(Invalid argument\); mend"):
        _sync(write_end)
    os.close(read_end)
    os.close(write_end)
