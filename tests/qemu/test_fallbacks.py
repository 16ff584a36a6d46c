"""What works where a feature is missing: each is masked here in turn."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import get_args

import pytest

from tests.harness.images import REPOSITORY
from tests.harness.kernel import (
    becomes_true,
    cached_behind_merges,
    huge_bytes,
    most_saved_pages,
    stranded_pages,
)
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import (
    EVERY_BACKEND,
    Member,
    assert_nothing_of_ours,
    assert_report_is_true,
    attached,
    boot_fleet,
    frozen,
    merge,
)
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.models import SharingReport
from vmdedup.settings import Feature, Versions

pytestmark = pytest.mark.qemu

QUICK = {"mib": 4, "check_per_s": 8192}
HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
EVERYTHING = get_args(Feature)


@pytest.mark.parametrize("masked", [*([one] for one in EVERYTHING), EVERYTHING], ids=" ".join)
def test_without_a_feature(settings: MakeSettings, boot: Boot, masked: tuple[str, ...]) -> None:
    """Everything is merged and comes back, while the guests write."""
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters=QUICK)
    # Only the stub's calls end with us; a chain's would run on after the protection went.
    is_live = not {"userfaultfd-wp", "stub"}.intersection(masked)
    own = settings(mask=frozenset(masked))
    with attached(own, fleet) as dedup:
        dedup.run(passes=2)
        assert becomes_true(lambda: _merged_much(dedup.run(passes=1)))
        report = dedup.report()
        assert (report.host.stopped_ms == 0) == is_live
        assert all((vm.stops == 0) == is_live for vm in report.vms)
        assert all((vm.hint is None) == is_live for vm in report.vms)
        assert [member.run_state() for member in fleet] == ["running"] * len(fleet)
        with frozen(fleet):
            before = [member.snapshot() for member in fleet]
            assert_report_is_true(dedup.report(), fleet)
            truth = assert_report_is_true(dedup.run(until_converged=True, timeout_s=20), fleet)
            assert truth.saved_pages >= 0.99 * most_saved_pages(before)
            # Paused by someone else: it is merged, and stays paused.
            assert [member.run_state() for member in fleet] == ["paused"] * len(fleet)
            assert all(map(Member.still_holds, fleet, before))
            assert dedup.verify().ok
        for member in fleet:
            member.vm.wait_passes(1)
            assert member.vm.errors == 0
        result = dedup.unmerge()
        assert [vm.remaining_pages for vm in result.vms] == [0] * len(fleet)
        assert result.store_removed
    assert list(own.runtime_dir.glob("stopped-*")) == []
    for member in fleet:
        assert_nothing_of_ours(member)
        member.vm.wait_passes(1)
        assert (member.vm.errors, member.run_state()) == (0, "running")


def test_untouched_zero_pages_come_home(settings: MakeSettings, boot: Boot) -> None:
    """Where the kernel protects only pages that are there: those that nobody has read since."""
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters={"mib": 4, "hold": 1, "check_per_s": 1})
    with attached(settings(mask=frozenset({"wp-unpopulated"})), fleet) as dedup:
        report = dedup.run(until_converged=True, timeout_s=30)
        assert all(vm.zero_pages > 200 for vm in report.vms)
        result = dedup.unmerge()
        assert [vm.remaining_pages for vm in result.vms] == [0] * len(fleet)
        assert dedup.report().host.stopped_ms == 0


def _merged_much(report: SharingReport) -> bool:
    """Of every VM; on a busy host that takes more passes, as guests write more in each."""
    print(report.host, report.vms)
    return all(vm.merged_pages > 256 and vm.zero_pages > 100 for vm in report.vms)


def test_huge_pages_are_split_without_pagemap_scan(settings: MakeSettings, boot: Boot) -> None:
    backend = Backend("ram", share=False, mib=256)
    (member,) = boot_fleet(boot, [backend], parameters={"mib": 192, "hold": 1, "run_pages": 8})
    assert huge_bytes(member.pid, member.areas[0]) > 128 << 20
    with frozen([member]):
        report = merge(settings(mask=frozenset({"pagemap-scan"})), [member])
        assert report.host.saved_bytes > 100 << 20
        assert becomes_true(lambda: stranded_pages(member.pid, member.areas[0]) < 512)


def test_ram_file_on_an_ordinary_filesystem(settings: MakeSettings, boot: Boot) -> None:
    """libvirt's default directory: no write protection there, so stops, and a hint."""
    directory = Path(tempfile.mkdtemp(prefix="ram-", dir=REPOSITORY / ".cache"))
    backends = []
    for share in (True, False):
        own = directory / f"share-{share}"
        own.mkdir()
        backends.append(Backend("file", share=share, mib=16, directory=own))
    try:
        if filesystem_of(directory) == "tmpfs":
            pytest.skip("the repository lies on tmpfs")
        fleet = boot_fleet(boot, backends, parameters=QUICK)
        with attached(settings(), fleet) as dedup:
            report = dedup.run(passes=3)
            for vm in report.vms:
                assert vm.stops
                assert "tmpfs" in (vm.hint or "")
                assert vm.merged_pages > 256
            with frozen(fleet):
                shared = fleet[0]
                kept = cached_behind_merges(shared.pid, shared.areas[0])
                print("kept", kept)
                assert_report_is_true(dedup.report(), fleet, kept_pages=kept)
            for member in fleet:
                member.vm.wait_passes(1)
                assert (member.vm.errors, member.run_state()) == (0, "running")
            assert [vm.remaining_pages for vm in dedup.unmerge().vms] == [0, 0]
        for member in fleet:
            member.vm.wait_passes(1)
            assert member.vm.errors == 0
            member.vm.close()
    finally:
        shutil.rmtree(directory)


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds `path`, by the longest mount point."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(m[1]), m[2]) for m in mounts if path.is_relative_to(m[1])]
    return max(holding)[1]


@pytest.mark.parametrize("trusted", [((7, 2), (10, 99)), ((7, 2), (12, 0)), ((12, 0), (13, 0))])
def test_a_qemu_of_another_version_is_merged_live_where_the_setting_says_so(
    trusted: Versions, settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one that says it is 11.1: the setting alone decides, and can widen."""
    fleet = boot_fleet(boot, [Backend(mib=16), Backend(mib=16)], parameters=QUICK)
    monkeypatch.setattr(QmpMonitor, "version", (11, 1, 0))
    with attached(settings(drain_trusted=trusted), fleet) as dedup:
        report = dedup.run(until_converged=True, timeout_s=40)
        is_live = trusted[0] <= (11, 1) <= trusted[1]
        assert (report.host.stopped_ms == 0) == is_live
        for vm in report.vms:
            assert vm.status == "merged"
            assert (vm.hint is None) == is_live
            assert is_live or "draining was not tried on QEMU 11.1.0" in (vm.hint or "")
        assert dedup.unmerge().store_removed
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0
