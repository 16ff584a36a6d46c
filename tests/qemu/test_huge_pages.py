"""Huge pages of every size: what is merged is free, and what is written takes one page."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.harness.huge_pages import collapse, huge_pages, huge_pages_missing
from tests.harness.kernel import (
    PAGE_BYTES,
    Vma,
    anonymous_bytes,
    stranded_pages,
    vm_flags,
    write_memory,
)
from tests.harness.limits import MemoryGroup, memory_group_missing
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, attached, boot_fleet, frozen, merge
from vmdedup.linux.capabilities import ENGINE, Capability, started_with
from vmdedup.models import HostReport

pytestmark = [pytest.mark.qemu, pytest.mark.alone]

PRIVATE = Backend("ram", share=False, mib=64)
SHARED = Backend("memfd", mib=64)
ALWAYS = {"enabled": "always", "shmem_enabled": "within_size", "hugepages-64kB/enabled": "always"}
ONLY_64_KIB = {
    "enabled": "never",
    "hugepages-64kB/enabled": "always",
    "hugepages-64kB/shmem_enabled": "always",
}
_WRITTEN_EVERY_BYTES = 1 << 19


def test_written_zero_pages_take_a_page_each(
    settings: MakeSettings, boot: Boot, need: Callable[[str | None], None]
) -> None:
    need(huge_pages_missing(64))
    long_runs = {"mib": 24, "zero_mib": 20, "run_pages": 2048, "hold": 1, "check_per_s": 8192}
    fleet = boot_fleet(boot, [PRIVATE, SHARED] * 2, parameters=long_runs)
    flags = [vm_flags(member.pid, member.areas[0]) for member in fleet]
    with frozen(fleet), huge_pages(ALWAYS):
        merge(settings(), fleet[:2])
        merge(settings(mask=frozenset({"map-stack"})), fleet[2:])
        for member in fleet:
            before = own_pages(member)
            written = write_zero_runs(member)
            assert written > 16
            assert own_pages(member) == before + written
            # Nobody is attached: write protection would keep khugepaged away too.
            assert collapse(member.pid, zero_runs(member)) == 0
            assert own_pages(member) == before + written
    with attached(settings(), fleet) as dedup:
        assert dedup.unmerge().store_removed
    assert [vm_flags(member.pid, member.areas[0]) for member in fleet] == flags
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def zero_runs(member: Member) -> list[Vma]:
    return [mapping for mapping in member.mappings() if mapping.path == "/dev/zero"]


def write_zero_runs(member: Member) -> int:
    """Write a page here and there of what is merged as zero, to the same; how many."""
    runs = [range(run.start, run.end, _WRITTEN_EVERY_BYTES) for run in zero_runs(member)]
    places = [address for run in runs for address in run]
    write_memory(member.pid, dict.fromkeys(places, b"\0"))
    return len(places)


def own_pages(member: Member) -> int:
    return anonymous_bytes(member.pid, member.areas[0]) // PAGE_BYTES


def test_what_large_folios_keep_is_not_counted_and_they_are_split(
    settings: MakeSettings, boot: Boot, need: Callable[[str | None], None]
) -> None:
    """Of 64 KiB, which pagemap does not show; what counts as saved, the VMs' group is rid of."""
    need(huge_pages_missing(64))
    need(memory_group_missing())
    scattered = {"mib": 48, "run_pages": 4, "hold": 1, "check_per_s": 8192}
    with MemoryGroup() as group, huge_pages(ONLY_64_KIB):
        group.add(os.getpid())
        fleet = boot_fleet(boot, [PRIVATE, PRIVATE, SHARED], parameters=scattered)
        group.release(os.getpid())
        with frozen(fleet):
            before = group.used_bytes

            def assert_freed(host: HostReport) -> None:
                freed = before - group.used_bytes - host.pages_shared * PAGE_BYTES
                print(f"saved {host.saved_bytes >> 20} MiB, freed {freed >> 20} MiB")
                assert abs(freed - host.saved_bytes) < 4 << 20

            # Whoever may not split them says so.
            kept = started_with(ENGINE - {Capability.SYS_NICE}, lambda: merge(settings(), fleet))
            assert stranded(fleet) > 4096
            assert_freed(kept.host)
            with attached(settings(), fleet) as dedup:
                host = dedup.run(until_converged=True).host
                assert stranded(fleet) == 0
                assert_freed(host)
                assert host.saved_bytes > kept.host.saved_bytes + (32 << 20)
                # Folios that came home do not lie at addresses that are aligned.
                dedup.unmerge()
                assert dedup.run(until_converged=True).host.saved_bytes > 32 << 20
                assert stranded(fleet) == 0


def stranded(fleet: list[Member]) -> int:
    return sum(stranded_pages(member.pid, member.areas[0]) for member in fleet)


def test_huge_pages_of_a_ram_file_are_merged(
    settings: MakeSettings, boot: Boot, need: Callable[[str | None], None]
) -> None:
    """Where guests run in such pages: their memory leaves the page table as it is protected."""
    need(huge_pages_missing())
    need(memory_group_missing())
    scattered = {"mib": 24, "run_pages": 4, "hold": 1, "check_per_s": 8192}
    shared = Backend("ram", mib=32)
    with MemoryGroup() as group, huge_pages({"shmem_enabled": "within_size"}):
        group.add(os.getpid())
        fleet = boot_fleet(boot, [shared, shared], parameters=scattered)
        group.release(os.getpid())
        with frozen(fleet):
            before = group.used_bytes
            host = merge(settings(), fleet).host
            freed = before - group.used_bytes - host.pages_shared * PAGE_BYTES
            print(f"saved {host.saved_bytes >> 20} MiB, freed {freed >> 20} MiB")
            assert host.saved_bytes > 24 << 20
            assert abs(freed - host.saved_bytes) < 4 << 20
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0
