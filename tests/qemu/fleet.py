"""VMs under test, with what the kernel said of them before anything was merged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.kernel import (
    PAGE_BYTES,
    Area,
    PageTable,
    Sharing,
    Snapshot,
    Vma,
    becomes_true,
    contents_of,
    inside,
    mappings,
    ram_areas,
    snapshot,
    write_memory,
)
from tests.harness.monitor import qmp
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot
from vmdedup.deduplicator import Deduplicator
from vmdedup.linux.sparse_file import punch_holes
from vmdedup.models import SharingReport
from vmdedup.settings import Settings

EVERY_BACKEND = [
    Backend("memfd", share=True, mib=16),
    Backend("memfd", share=False, mib=16),
    Backend("file", share=True, mib=16),
    Backend("file", share=False, mib=16),
    Backend("ram", share=True, mib=16),
    Backend("ram", share=False, mib=16),
]
"""Small ones, as the bare guest takes."""


@dataclass
class Member:
    """A VM and where its backends lie."""

    vm: Vm
    areas: list[Area]

    @property
    def pid(self) -> int:
        return self.vm.pid

    @property
    def name(self) -> str:
        return self.vm.name

    def mappings(self) -> list[Vma]:
        """The mappings of its backends now."""
        starts = [(area.start, area.end) for area in self.areas]
        return [m for m in mappings(self.pid) if any(a <= m.start < b for a, b in starts)]

    def store_inodes(self) -> set[int]:
        return {m.inode for m in self.mappings() if m.is_store}

    def run_state(self) -> str:
        return str(qmp(self.vm.test_qmp_path, "query-status")["status"])

    def snapshot(self) -> Snapshot:
        return snapshot(self.pid, self.areas)

    def still_holds(self, before: Snapshot) -> bool:
        """Whether each page held then has the same content now."""
        return contents_of(self.pid, before.areas, before.held) == before.contents


def name_of(backend: Backend) -> str:
    return f"{backend.kind}-{'on' if backend.share else 'off'}"


def boot_fleet(
    boot: Boot, backends: Sequence[Backend | Sequence[Backend]], *, prefix: str = "", **options: Any
) -> list[Member]:
    """One VM for each backend (or group of them), booted side by side; the bare guest
    with 4 MiB of worker, unless told otherwise. Guests share what is `common`.
    """
    options.setdefault("guest", "bare")
    parameters = options.pop("parameters", {"mib": 4})
    vms = []
    for number, backend in enumerate(backends):
        one = backend if isinstance(backend, Backend) else backend[0]
        guest_parameters = {"seed": number + 1, **parameters}
        vm = boot(
            **options,
            name=f"{prefix}{name_of(one)}-{number}",
            backend=backend,
            parameters=guest_parameters,
            ready=False,
        )
        vms.append(vm)
    for vm in vms:
        vm.wait_ready()
    return [Member(vm, ram_areas(vm.pid, [each.mib for each in vm.backends])) for vm in vms]


def paths(members: Sequence[Member], *, second: bool = False) -> list[str]:
    """The monitors for vmdedup, or with `second` the others, which are always free."""
    return [str(m.vm.test_qmp_path if second else m.vm.qmp_path) for m in members]


@contextmanager
def attached(settings: Settings, members: Sequence[Member]) -> Iterator[Deduplicator]:
    """A Deduplicator that has attached to all of them."""
    with Deduplicator(settings) as dedup:
        listing = dedup.attach(paths(members))
        assert [(row.name, row.mergeable) for row in listing.vms] == [
            (member.name, True) for member in members
        ]
        yield dedup


def merge(settings: Settings, members: Sequence[Member], **run: Any) -> SharingReport:
    """Attach, run until converged (or as told), let go; the merges stay."""
    with attached(settings, members) as dedup:
        return dedup.run(**(run or {"until_converged": True, "timeout_s": 40}))


def sharing(members: Sequence[Member]) -> Sharing:
    """The kernel's word on who shares what."""
    return Sharing({member.name: (member.pid, member.areas) for member in members})


@contextmanager
def frozen(members: Sequence[Member]) -> Iterator[None]:
    """All of them paused by the test: their memory cannot change by themselves."""
    for member in members:
        qmp(member.vm.test_qmp_path, "stop")
    try:
        yield
    finally:
        for member in members:
            if member.vm.alive:
                qmp(member.vm.test_qmp_path, "cont")


def assert_report_is_true(
    report: SharingReport, members: Sequence[Member], *, kept_pages: int = 0
) -> Sharing:
    """Every number that the kernel knows too is what the kernel says. VMs are quiet.

    `kept_pages`: what of the old memory behind merged pages is not freed.
    """
    truth = sharing(members)
    host = report.host
    assert host.pages_shared == truth.pages_shared
    assert host.pages_sharing == truth.pages_sharing
    assert host.zero_pages == sum(truth.zero_pages.values())
    assert host.cow_broken_pages == sum(truth.broken_pages.values())
    assert host.saved_bytes == (truth.saved_pages - kept_pages) * 4096
    assert sum(vm.saved_bytes for vm in report.vms) == host.saved_bytes
    assert report.matrix.vms == [member.name for member in members]
    by_name = {vm.name: vm for vm in report.vms}
    for row, member in zip(report.matrix.pages, members, strict=True):
        vm = by_name[member.name]
        assert vm.pid == member.pid
        assert vm.merged_pages == truth.sites[member.name].total()
        assert vm.zero_pages == truth.zero_pages[member.name]
        assert vm.cow_broken_pages == truth.broken_pages[member.name]
        share_bytes = truth.fair_share_bytes(member.name)
        if not kept_pages:
            assert vm.saved_bytes == pytest.approx(share_bytes, abs=1)
        else:
            assert vm.saved_bytes <= share_bytes + 1
        assert row == [truth.common(member.name, other.name) for other in members]
        assert vm.vmas == pytest.approx(len(mappings(member.pid)), abs=4)
    return truth


def assert_nothing_of_ours(member: Member) -> None:
    """No mapping and no descriptor of ours is left in the VM."""
    assert [m for m in member.mappings() if m.is_ours] == []
    assert [m for m in mappings(member.pid) if "vmdedup" in m.path] == []
    # QEMU closes what was lent to it when its main loop comes by.
    assert becomes_true(lambda: not any("vmdedup" in link for link in open_files(member.pid)))
    assert "anon_inode:[userfaultfd]" not in open_files(member.pid)


def open_files(pid: int) -> list[str]:
    """What the VM's descriptors point to."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(fd))
    return found


def absent_pages(pid: int, area: Area, count: int) -> list[int]:
    """Addresses of the last pages of an area that were never touched."""
    absent = np.flatnonzero(~PageTable(pid, area).present)[-count:]
    return [area.start + page * PAGE_BYTES for page in absent.tolist()]


def fill_absent(pid: int, area: Area, count: int, content: bytes) -> list[int]:
    """Write this into pages that were never touched; their addresses."""
    addresses = absent_pages(pid, area, count)
    write_memory(pid, dict.fromkeys(addresses, content))
    return addresses


def punch(pid: int, area: Area, address: int) -> None:
    """Free a page of the RAM file, as QEMU does when a balloon takes it."""
    with ram_file(pid, area, address) as (fd, offset):
        punch_holes(fd, np.array([offset]), np.array([PAGE_BYTES]))


@contextmanager
def ram_file(pid: int, area: Area, address: int) -> Iterator[tuple[int, int]]:
    """The RAM file mapped at this address, opened, and the address's offset in it."""
    (vma,) = [m for m in inside(pid, area) if m.start <= address < m.end]
    fd = os.open(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}", os.O_RDWR)
    try:
        yield fd, vma.offset + address - vma.start
    finally:
        os.close(fd)
