"""VMs of which nothing could be merged for an error: said so everywhere, and no success."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest

from tests.harness.limits import limited, open_count
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, assert_nothing_of_ours, attached, boot_fleet
from tests.qemu.serving import serving
from vmdedup.accounting.verify import verify
from vmdedup.guest.mapping_state import MappingState
from vmdedup.models import SharingReport
from vmdedup.settings import Settings
from vmdedup.vm.page_scan import PageScan

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("needs_root"),
]

HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
COMMAND = [sys.executable, "-c", "from vmdedup.cli.main import main; main()", "run", "--json"]


def no_descriptors(member: Member) -> Any:
    """Its QEMU can have one more: the monitor's connection."""
    return limited(member.pid, resource.RLIMIT_NOFILE, open_count(member.pid) + 1)


def run(own: Settings, members: list[Member], *words: str) -> tuple[int, SharingReport, str]:
    qmp = [word for member in members for word in ("--qmp", str(member.vm.qmp_path))]
    directories = {
        "VMDEDUP_RUNTIME_DIR": str(own.runtime_dir),
        "VMDEDUP_STORE_DIR": str(own.store_dir),
    }
    command = [*COMMAND, *qmp, *words]
    done = subprocess.run(command, env=directories, capture_output=True, text=True, check=False)
    return done.returncode, SharingReport(**json.loads(done.stdout)), done.stderr


def test_a_run_in_which_every_vm_failed_is_a_failure(settings: MakeSettings, boot: Boot) -> None:
    own = settings()
    members = boot_fleet(boot, [Backend("memfd", mib=16)] * 2, parameters=HELD)
    with ExitStack() as limits:
        limits.enter_context(no_descriptors(members[0]))
        code, report, said = run(own, members, "--once")
        assert (code, [vm.status for vm in report.vms]) == (0, ["failed", "merged"]), report.vms
        assert "nobody watches these VMs for new hazards" in said
        with attached(own, [members[1]]) as dedup:
            dedup.unmerge()
        assert_nothing_of_ours(members[1])
        limits.enter_context(no_descriptors(members[1]))
        for words in (["--once"], ["--until-converged", "--timeout", "60"]):
            code, report, said = run(own, members, *words)
            assert code == 1, (report.vms, said)
            assert [vm.status for vm in report.vms] == ["failed", "failed"], report.vms
            assert not report.converged
            for vm in report.vms:
                assert vm.reason
                assert f"{vm.name} (pid {vm.pid}): {vm.reason}" in said
            assert "nobody watches" not in said
    code, report, _ = run(own, members, "--passes", "2")
    assert (code, [vm.status for vm in report.vms]) == (0, ["merged", "merged"])
    for member in members:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0, member.vm.serial.complaints()


def test_vms_says_what_failed_last(settings: MakeSettings, boot: Boot) -> None:
    """With one descriptor left there is room for the table, but not for the stub."""
    (member,) = boot_fleet(boot, [Backend("memfd", mib=16)], parameters=HELD)
    with serving(settings(), [member]) as served:
        with no_descriptors(member):
            served.merge(1)
            (row,) = served.fleet.listed().vms
        assert row.mergeable
        assert row.reason == served.fleet.engine.vms[0].record.trouble is not None
        served.merge()
        (row,) = served.fleet.listed().vms
        assert (row.mergeable, row.reason) == (True, None)


def test_verify_names_a_store_that_a_vm_of_no_merges_still_has(
    settings: MakeSettings, boot: Boot
) -> None:
    """As a predecessor that was killed before its first remap left it."""
    members = boot_fleet(boot, [Backend("memfd", mib=16)] * 2, parameters=HELD)
    own = settings()
    with attached(own, members[:1]) as dedup:
        dedup.run(passes=2)
    (store,) = own.store_dir.glob("*.store")
    with serving(own, members) as served, store.open("rb") as file:
        vms = served.fleet.engine.vms
        (other,) = [each for each in vms if each.name == members[1].name]
        with other.lent.lending() as lend:
            lend(file.fileno(), "store")
            checked = verify(vms, own, served.fleet.engine.served.drop)
    left = {vm.name: vm.leftovers for vm in checked.vms}
    assert left[members[0].name] == []
    (leftover,) = left[other.name]
    assert str(store) in leftover


def test_verify_goes_on_when_a_vm_ends_meanwhile(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = boot_fleet(boot, [Backend("memfd", mib=16)] * 2, parameters=HELD)
    first, second = members
    state = PageScan.refresh

    def killed(scan: PageScan) -> MappingState:
        found = state(scan)
        if scan.vm.pid == first.pid:
            os.kill(first.pid, signal.SIGKILL)
        return found

    with attached(settings(), members) as dedup:
        dedup.run(passes=2)
        monkeypatch.setattr(PageScan, "refresh", killed)
        checked = dedup.verify()
    assert (checked.ok, [vm.name for vm in checked.vms]) == (True, [second.name])
    assert checked.gone == [f"{first.name} (pid {first.pid}): it ended before it was checked"]
    assert checked.vms[0].checked_pages
