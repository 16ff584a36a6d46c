"""Guest memory that the VM's own thread reads: what it finds, and that nothing of it stays."""

from __future__ import annotations

import errno
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from tests.harness.kernel import PAGE_BYTES, most_saved_pages
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import (
    Member,
    assert_nothing_of_ours,
    assert_report_is_true,
    attached,
    boot_fleet,
    fill_absent,
    frozen,
    punch,
)
from vmdedup import faults
from vmdedup.core.digest import zero_digest
from vmdedup.core.rmap import KNOWN
from vmdedup.errors import InjectionError
from vmdedup.guest.page_reader import digests_at
from vmdedup.inject.remote import RemoteThread
from vmdedup.inject.scratch_files import scratch_fds, scratch_mappings

pytestmark = pytest.mark.qemu

HELD = {"mib": 32, "hold": 1, "check_per_s": 8192}
RAM, MEMFD = Backend("ram", share=False, mib=64), Backend("memfd", share=True, mib=64)
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each step was reached."""
    found: Counter[str] = Counter()
    monkeypatch.setattr(faults, "hook", lambda step: found.update([step]))
    return found


def require_no_scratch(members: list[Member]) -> None:
    for member in members:
        assert scratch_mappings(member.pid) == []
        assert scratch_fds(member.pid) == []


@pytest.mark.parametrize("backend", [RAM, MEMFD], ids=["ram", "memfd"])
def test_what_it_reads_is_what_copies_show(
    settings: MakeSettings, boot: Boot, steps: Counter[str], backend: Backend
) -> None:
    fleet = boot_fleet(boot, [backend, backend], parameters=HELD)
    with frozen(fleet), attached(settings(), fleet) as dedup:
        engine = dedup._attached().engine
        before = [member.snapshot() for member in fleet]
        engine.begin_pass(everywhere=True)
        engine.looks.look_some(1 << 20)
        assert steps["inject-running"] >= 2
        for vm in engine.vms:
            assert vm.thread is not None
            page = np.flatnonzero(vm.scan.columns.flags & KNOWN)
            seed = engine.stores.of(str(vm.domain)).seed
            copied, is_read = digests_at(vm.name, vm.pid, vm.space.hva(page), seed)
            assert is_read.all()
            assert len(page) > 4096
            assert np.array_equal(vm.scan.columns.digest[page], copied)
        report = dedup.run(until_converged=True, timeout_s=40)
        assert steps["store-mapped"] >= 2
        assert steps["reading"] >= 2
        truth = assert_report_is_true(report, fleet)
        assert truth.saved_pages >= 0.99 * most_saved_pages(before)
        assert all(map(Member.still_holds, fleet, before))
        require_no_scratch(fleet)
        assert dedup.verify().ok
        dedup.unmerge()
    for member in fleet:
        assert_nothing_of_ours(member)
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_a_file_of_a_filesystem_that_can_be_full_is_copied(
    settings: MakeSettings, boot: Boot, steps: Counter[str]
) -> None:
    backend = Backend("file", share=True, mib=64)
    fleet = boot_fleet(boot, [backend, backend], parameters=HELD)
    with attached(settings(), fleet) as dedup:
        report = dedup.run(passes=2)
        assert all(vm.merged_pages > 1024 for vm in report.vms)
        dedup.unmerge()
    assert steps["compared"]
    assert not {"inject-running", "reading", "store-mapped"}.intersection(steps)


def test_a_thread_that_is_not_to_be_had_for_a_look_costs_only_time(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(remote: RemoteThread, *_: object) -> None:
        raise InjectionError(remote.vm, "its thread is busy", pid=remote.pid, started=False)

    monkeypatch.setattr(RemoteThread, "run", refused)
    fleet = boot_fleet(boot, [RAM, MEMFD], parameters=HELD)
    with attached(settings(), fleet) as dedup:
        engine = dedup._attached().engine
        engine.begin_pass(everywhere=True)
        engine.looks.look_some(1 << 20)
        assert [each.thread for each in engine.vms] == [None, None]
        require_no_scratch(fleet)
        report = dedup.run(passes=2)
        assert all(vm.merged_pages > 1024 for vm in report.vms)
        dedup.unmerge()


def test_without_a_mapping_for_the_store_all_is_compared_by_copies(
    settings: MakeSettings, boot: Boot, steps: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(remote: RemoteThread, _: int) -> int:
        raise OSError(errno.ENOMEM, f"mremap inside {remote.vm}")

    monkeypatch.setattr(RemoteThread, "room", refused)
    fleet = boot_fleet(boot, [RAM, MEMFD], parameters=HELD)
    with attached(settings(), fleet) as dedup:
        report = dedup.run(passes=2)
        assert all(vm.merged_pages > 1024 for vm in report.vms)
        assert steps["compared"]
        assert not steps["reading"]
        dedup.unmerge()


def test_where_nothing_is_to_be_merged_the_thread_is_let_go_of_too(
    settings: MakeSettings, boot: Boot
) -> None:
    fleet = boot_fleet(boot, [RAM], parameters=HELD)
    with attached(settings(), fleet) as dedup:
        engine = dedup._attached().engine
        engine.begin_pass(everywhere=True)
        assert scratch_mappings(fleet[0].pid) != []
        engine.looks.look_some(1 << 20)
        engine.foreground_ends()
        require_no_scratch(fleet)
        engine.begin_pass(everywhere=False)
        require_no_scratch(fleet)


def test_pages_that_are_discarded_before_they_are_read(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read as zeroes, and the others as they are."""
    (member,) = boot_fleet(boot, [MEMFD], parameters=HELD)
    with frozen([member]), attached(settings(), [member]) as dedup:
        engine = dedup._attached().engine
        (vm,) = engine.vms
        filled = fill_absent(member.pid, member.areas[0], 64, b"\xa5" * PAGE_BYTES)
        discarded, kept = np.array(filled[::2]), np.array(filled[1::2])
        digests_at = vm.scan._digests_at

        def late(address: Int64s, seed: int) -> tuple[npt.NDArray[np.uint64], Bools]:
            for each in discarded.tolist():
                punch(member.pid, member.areas[0], each)
            return digests_at(address, seed)

        monkeypatch.setattr(vm.scan, "_digests_at", late)
        engine.begin_pass(everywhere=True)
        engine.looks.look_some(1 << 20)
        assert vm.thread is not None
        seed = engine.stores.of(str(vm.domain)).seed
        first = vm.space.hva(np.array([0]))[0]
        digest = vm.scan.columns.digest
        assert set(digest[(discarded - first) // PAGE_BYTES]) == {np.uint64(zero_digest(seed))}
        (other,) = set(digest[(kept - first) // PAGE_BYTES])
        assert other != zero_digest(seed)
    member.vm.wait_passes(1)
    assert member.vm.errors == 0
