"""Reports that need nobody's memory: the state is read back from the kernel."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.harness.kernel import becomes_true
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
    paths,
    sharing,
)
from vmdedup.deduplicator import Deduplicator
from vmdedup.engine.progress import PassProgress
from vmdedup.models import SharingReport, VmListing
from vmdedup.settings import Settings

pytestmark = pytest.mark.qemu

HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
QUICK = {"mib": 4, "check_per_s": 8192}
KERNEL_KNOWS = {"pages_shared", "pages_sharing", "zero_pages", "cow_broken_pages", "saved_bytes"}
SCAN_KNOWS = {
    "pages_unshared",
    "pages_volatile",
    "full_scans",
    "pages_scanned",
    "overhead_bytes",
    "profit_bytes",
    "stopped_ms",
}
VM_SCAN_KNOWS = {"deferred_pages", "gates", "stops"}
VM_KERNEL_KNOWS = {
    "name",
    "pid",
    "status",
    "trust_domain",
    "ram_bytes",
    "present_bytes",
    "merged_pages",
    "zero_pages",
    "cow_broken_pages",
    "saved_bytes",
}


def command_line(*words: str) -> list[str]:
    return [str(Path(sys.executable).with_name("vmdedup")), *words]


def environment(settings: Settings) -> dict[str, str]:
    own = {
        "VMDEDUP_RUNTIME_DIR": str(settings.runtime_dir),
        "VMDEDUP_STORE_DIR": str(settings.store_dir),
        "VMDEDUP_STATE_DIR": str(settings.runtime_dir.with_name("state")),
    }
    return os.environ | own


def fresh_process(settings: Settings, verb: str, members: list[Member], *more: str) -> Any:
    """The JSON that a new process of the command line prints."""
    monitors = [word for path in paths(members, second=True) for word in ("--qmp", path)]
    command = command_line(verb, *monitors, "--json", *more)
    done = subprocess.run(
        command, env=environment(settings), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_a_fresh_process_reports_the_same(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters=HELD)
    with frozen(fleet):
        with attached(settings(), fleet) as dedup:
            mine = dedup.run(until_converged=True)
            other = fresh_process(settings(), "report", fleet)
        assert_report_is_true(mine, fleet)
        assert mine.host.pages_shared > 256
        assert (mine.converged, other["converged"]) == (True, None)
        assert mine.matrix.model_dump() == other["matrix"]
        known = mine.host.model_dump(include=KERNEL_KNOWS)
        assert known == {name: other["host"][name] for name in KERNEL_KNOWS}
        assert [other["host"][name] for name in SCAN_KNOWS] == [None] * len(SCAN_KNOWS)
        for vm, its in zip(mine.vms, other["vms"], strict=True):
            known = vm.model_dump(include=VM_KERNEL_KNOWS)
            assert known == {name: its[name] for name in VM_KERNEL_KNOWS}
            assert None not in vm.model_dump(include=VM_SCAN_KNOWS).values()
            assert [its[name] for name in VM_SCAN_KNOWS] == [None] * len(VM_SCAN_KNOWS)
        verified = fresh_process(settings(), "verify", fleet)
        assert verified["ok"]
        for checked, vm in zip(verified["vms"], mine.vms, strict=True):
            assert checked["unchecked_pages"] == 0
            assert checked["checked_pages"] == vm.merged_pages + vm.zero_pages


def test_a_fresh_engine_goes_on_with_the_same_store(settings: MakeSettings, boot: Boot) -> None:
    """The next engine finds every store page again, and publishes none twice."""
    fleet = boot_fleet(boot, EVERY_BACKEND[:4], parameters=HELD)
    with frozen(fleet):
        merge(settings(), fleet[:2])
        first = sharing(fleet)
        merge(settings(), fleet)
        report = merge(settings(), fleet)
        truth = assert_report_is_true(report, fleet)
        assert {inode for member in fleet for inode in member.store_inodes()} == {
            inode for inode, _ in first.all_sites
        }
        for member in fleet[:2]:
            assert truth.sites[member.name].keys() >= first.sites[member.name].keys()
        # Equal contents stand on one page: those that all four VMs share are all shared.
        assert truth.common(fleet[0].name, fleet[3].name) >= 256
        assert truth.pages_shared < 4 * 256 + 256 + 300
        assert merge(settings(), fleet, passes=2).host.saved_bytes == report.host.saved_bytes


@pytest.mark.both_qemus
def test_merges_outlive_a_killed_engine(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters=QUICK)
    own = settings()
    monitors = [word for path in paths(fleet) for word in ("--qmp", path)]
    said = own.runtime_dir.with_suffix(".log")
    with (
        said.open("wb") as log,
        subprocess.Popen(
            command_line("run", *monitors), env=environment(own), stdout=log, stderr=log
        ) as engine,
    ):
        try:
            are_merged = becomes_true(lambda: min(map(merged_pages, fleet)) > 256, 60)
            assert are_merged, said.read_text()
        finally:
            engine.send_signal(signal.SIGKILL)
    for member in fleet:
        member.vm.wait_passes(1)
        assert (member.vm.errors, member.run_state()) == (0, "running")
    assert min(map(merged_pages, fleet)) > 100
    with attached(own, fleet) as dedup:
        assert sum(vm.merged_pages for vm in dedup.report().vms) > 100 * len(fleet)
        dedup.run(passes=3)
        verified = dedup.verify()
        assert verified.ok, verified
        assert dedup.unmerge().store_removed
    for member in fleet:
        assert_nothing_of_ours(member)
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def merged_pages(member: Member) -> int:
    return sum(m.pages for m in member.mappings() if m.is_store)


def test_a_client_that_the_caller_connected(settings: MakeSettings, boot: Boot) -> None:
    (member,) = boot_fleet(boot, [Backend(mib=16)], parameters=QUICK)

    def work(client: QMPClient, loop: asyncio.AbstractEventLoop) -> tuple[VmListing, SharingReport]:
        with Deduplicator(settings()) as dedup:
            return dedup.adopt(client, loop), dedup.run(until_converged=True)

    async def program() -> tuple[VmListing, SharingReport, Any]:
        client = QMPClient("caller")
        await client.connect(str(member.vm.qmp_path))
        try:
            listed, report = await asyncio.to_thread(work, client, asyncio.get_running_loop())
            return listed, report, await client.execute("query-status")
        finally:
            await client.disconnect()

    listed, report, status = asyncio.run(program())
    assert (listed.name, listed.mergeable) == (member.name, True)
    assert report.vms[0].merged_pages > 200
    assert status["status"] == "running"
    member.vm.wait_passes(1)
    assert member.vm.errors == 0


def test_a_vm_that_dies_in_the_middle(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND[:3], parameters=QUICK)

    def kill_one(progress: PassProgress) -> None:
        if progress.stage == "merge" and progress.vm == fleet[0].name and fleet[0].vm.alive:
            fleet[0].vm.kill()

    with attached(settings(), fleet) as dedup:
        report = dedup.run(until_converged=True, timeout_s=20, progress=kill_one)
        by_name = {vm.name: vm for vm in report.vms}
        assert by_name[fleet[0].name].status == "gone"
        assert by_name[fleet[0].name].reason
        for member in fleet[1:]:
            assert by_name[member.name].merged_pages > 256
            member.vm.wait_passes(1)
            assert member.vm.errors == 0
        # Killed between two calls too: the report finds out by itself.
        fleet[1].vm.kill()
        by_name = {vm.name: vm for vm in dedup.report().vms}
        assert [by_name[member.name].status for member in fleet] == ["gone", "gone", "merged"]
        assert [vm.remaining_pages for vm in dedup.unmerge().vms] == [0]


def test_a_busy_monitor_is_said_so(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND[:2], parameters=QUICK)
    own = settings(monitor_timeout_ms=300)
    with attached(own, fleet[:1]):
        # An engine for other VMs, which share nothing with the first one's.
        other = settings(
            monitor_timeout_ms=300,
            runtime_dir=own.runtime_dir / "other",
            domains=[{"name": "*", "domain": "other"}],
        )
        with Deduplicator(other) as dedup:
            busy, free = sorted(dedup.attach(paths(fleet)).vms, key=lambda row: row.mergeable)
            report = dedup.run(until_converged=True)
    assert "busy" in (busy.reason or "")
    assert (free.name, free.mergeable) == (fleet[1].name, True)
    assert [vm.status for vm in report.vms] == ["merged", "refused"]


def test_memory_of_a_dead_vm_is_given_back(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND[:2], parameters=HELD)
    own = settings()

    def store_bytes() -> int:
        return sum(file.stat().st_blocks * 512 for file in own.store_dir.glob("*.store"))

    with attached(own, fleet) as dedup:
        dedup.run(until_converged=True)
        truth = sharing(fleet)
        assert store_bytes() == truth.pages_shared * 4096
        fleet[0].vm.kill()
        dedup.run(until_converged=True)
        assert store_bytes() == sharing(fleet[1:]).pages_shared * 4096
        assert store_bytes() < truth.pages_shared * 4096 or len(truth.sites) == 1
        fleet[1].vm.kill()
        dedup.run(passes=1)
        dedup.unmerge()
    assert not Path(own.store_dir).exists()
