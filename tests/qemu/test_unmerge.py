"""Unmerging on real VMs: every page back where it was, and nothing of ours left."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness.capabilities import object_missing
from tests.harness.kernel import (
    PAGE_BYTES,
    PageTable,
    anonymous_bytes,
    inside,
    mappings,
    ram_file_bytes,
    vm_flags,
)
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import (
    EVERY_BACKEND,
    Member,
    assert_nothing_of_ours,
    attached,
    boot_fleet,
    frozen,
    merge,
    open_files,
    sharing,
)
from vmdedup import faults
from vmdedup.models import Unmerged

pytestmark = pytest.mark.qemu

BUSY = {"mib": 4, "rewrite_per_s": 512, "check_per_s": 8192}
HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
NO_DUMP = [Backend(b.kind, b.share, mib=16, options="dump=off") for b in EVERY_BACKEND]
POSIX = [Backend("shm", mib=16), Backend("shm", mib=16)]


def assert_all_came_home(result: Unmerged, fleet: list[Member]) -> None:
    assert [(vm.name, vm.remaining_pages, vm.reason) for vm in result.vms] == [
        (member.name, 0, None) for member in fleet
    ]
    assert result.store_removed
    for member in fleet:
        assert_nothing_of_ours(member)


def own_bytes(member: Member) -> int:
    """What the VM's backend occupies."""
    (area,) = member.areas
    if not area.is_shared:
        return anonymous_bytes(member.pid, area)
    if (in_file := ram_file_bytes(member.pid, area)) is not None:
        return in_file
    return int(np.count_nonzero(PageTable(member.pid, area).present)) * PAGE_BYTES


@pytest.mark.both_qemus
@pytest.mark.parametrize(
    "backends", [EVERY_BACKEND, NO_DUMP, POSIX], ids=["dump", "no-dump", "posix"]
)
def test_everything_comes_home(settings: MakeSettings, boot: Boot, backends: list[Backend]) -> None:
    if backends is POSIX and (missing := object_missing("memory-backend-shm")) is not None:
        pytest.skip(missing)
    fleet = boot_fleet(boot, backends, parameters=HELD, thp=False)
    own = settings()
    sums = [member.vm.sum() for member in fleet]
    flags = [vm_flags(member.pid, member.areas[0]) for member in fleet]
    mapped = [inside(member.pid, member.areas[0]) for member in fleet]
    descriptors = [len(open_files(member.pid)) for member in fleet]
    assert all(("dd" in each) == (backends is NO_DUMP) for (each,) in flags)
    with attached(own, fleet) as dedup:
        with frozen(fleet):
            before = [member.snapshot() for member in fleet]
            occupied = [own_bytes(member) for member in fleet]
            merged = dedup.run(until_converged=True)
            assert sum(own_bytes(member) for member in fleet) < sum(occupied) / 2
            result = dedup.unmerge()
            after = dedup.report().host
            for member, was in zip(fleet, before, strict=True):
                assert member.still_holds(was), member.name
            home = [own_bytes(member) for member in fleet]
        assert (after.pages_shared, after.zero_pages, after.saved_bytes) == (0, 0, 0)
        assert not own.store_dir.exists()
    assert_all_came_home(result, fleet)
    assert [vm_flags(member.pid, member.areas[0]) for member in fleet] == flags
    # Not more: QEMU may still have been closing a connection of ours when they were counted.
    still_open = [len(open_files(member.pid)) for member in fleet]
    assert all(left <= had for left, had in zip(still_open, descriptors, strict=True)), still_open
    for vm, member, first in zip(merged.vms, fleet, mapped, strict=True):
        now = inside(member.pid, member.areas[0])
        print(member.name, len(now), "mappings, as merged", vm.vmas)
        assert {(m.device, m.inode, m.permissions) for m in now} == {
            (m.device, m.inode, m.permissions) for m in first
        }
        assert len(now) <= (1 if member.areas[0].is_shared else vm.vmas)
    for vm, bytes_before, bytes_home in zip(merged.vms, occupied, home, strict=True):
        # Zero pages come back as untouched memory.
        assert bytes_before - vm.zero_pages * PAGE_BYTES <= bytes_home <= bytes_before
    assert [member.vm.sum() for member in fleet] == sums
    for member in fleet:
        member.vm.go()
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_merge_unmerge_merge_while_guests_write(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters=BUSY)
    saved = []
    with attached(settings(), fleet) as dedup:
        for _ in range(3):
            saved.append(dedup.run(until_converged=True, timeout_s=2).host.pages_sharing)
            assert sum(sharing(fleet).broken_pages.values()) > 0
            assert_all_came_home(dedup.unmerge(), fleet)
        host = dedup.report().host
    print(saved, host)
    assert min(saved) > max(saved) / 8  # of what is written all the time, at one moment each
    for member in fleet:
        member.vm.wait_passes(2)
        assert member.vm.errors == 0


def test_pages_that_are_written_all_the_time(settings: MakeSettings, boot: Boot) -> None:
    backends = [Backend(mib=16), Backend("file", share=False, mib=16)]
    fleet = boot_fleet(boot, backends, parameters={"mib": 1, "hold": 1})
    with attached(settings(), fleet) as dedup:
        dedup.run(until_converged=True)
        for member in fleet:
            member.vm.go()
            member.vm.set_rewrite_rate(1_000_000)
            member.vm.wait_status(lambda now, then: now.rewrites > then.rewrites + 20_000)
        assert sum(sharing(fleet).broken_pages.values()) > 256
        assert_all_came_home(dedup.unmerge(), fleet)
        print(dedup.report().vms)
        assert [member.run_state() for member in fleet] == ["running"] * len(fleet)
    for member in fleet:
        member.vm.set_rewrite_rate(64)
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


@pytest.mark.parametrize("share", [False, True], ids=["private", "shared"])
def test_what_is_written_after_its_memory_was_filled(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    """It stays for another round: what was filled is old by then."""
    (member,) = boot_fleet(boot, [Backend("memfd", share=share, mib=16)], parameters=HELD)
    with attached(settings(), [member]) as dedup:
        dedup.run(until_converged=True)
        member.vm.go()
        member.vm.set_rewrite_rate(20_000)
        written: list[int] = []

        def let_write(step: str) -> None:
            if step == "scratch-filled" and not written:
                now = member.vm.wait_status(lambda now, then: now.rewrites > then.rewrites + 2_000)
                member.vm.hold()
                written.append(now.rewrites)

        monkeypatch.setattr(faults, "hook", let_write)
        assert_all_came_home(dedup.unmerge(), [member])
        assert written
    member.vm.wait_passes(2)
    assert member.vm.errors == 0


def test_one_of_several_vms(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND[:3], parameters=HELD)
    own = settings()
    with attached(own, fleet) as dedup:
        dedup.run(until_converged=True)
        result = dedup.unmerge([fleet[1].name])
        assert [vm.name for vm in result.vms] == [fleet[1].name]
        assert not result.store_removed
        assert_nothing_of_ours(fleet[1])
        assert all(member.store_inodes() for member in (fleet[0], fleet[2]))
        assert dedup.verify().ok
        again = dedup.run(until_converged=True)
        assert next(vm for vm in again.vms if vm.name == fleet[1].name).merged_pages > 256
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_linux_guests_get_their_memory_back(settings: MakeSettings, boot: Boot) -> None:
    backends = [Backend("ram", share=False), Backend("memfd")]
    fleet = boot_fleet(boot, backends, guest="tiny", parameters={"check_per_s": 8192})
    report = merge(settings(), fleet, passes=3)
    occupied = sum(map(own_bytes, fleet))
    vmas = [len(mappings(member.pid)) for member in fleet]
    with attached(settings(), fleet) as dedup:
        result = dedup.unmerge()
    assert_all_came_home(result, fleet)
    # Zero pages come back when they are next written, not before.
    zero_bytes = report.host.zero_pages * PAGE_BYTES
    back = report.host.saved_bytes - zero_bytes
    assert sum(map(own_bytes, fleet)) - occupied > 0.9 * back
    for member, merged_vmas in zip(fleet, vmas, strict=True):
        print(member.name, merged_vmas, "->", len(mappings(member.pid)), "mappings")
        assert len(mappings(member.pid)) <= merged_vmas
        member.vm.wait_passes(2)
        assert member.vm.errors == 0
