"""Balloons over merged pages: what they have is not counted, and QEMU can always discard it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, assert_nothing_of_ours, boot_fleet
from tests.qemu.serving import Serving, serving
from vmdedup.models import VmReport

pytestmark = pytest.mark.qemu

MIB = 1 << 20
BUSY = {"mib": 8, "rewrite_per_s": 128, "check_per_s": 8192}
TAKEN_MIB = 20


def ask(member: Member, command: str, /, **arguments: Any) -> Any:
    return qmp(member.vm.test_qmp_path, command, **arguments)


def plug_in(member: Member) -> None:
    ask(member, "device_add", driver="virtio-balloon-pci", id="balloon0")


def is_plugged_in(member: Member) -> bool:
    listed = ask(member, "qom-list", path="/machine/peripheral")
    return "balloon0" in {one["name"] for one in listed}


def balloon_to(member: Member, mib: int) -> None:
    ask(member, "balloon", value=mib * MIB)
    assert becomes_true(lambda: ask(member, "query-balloon")["actual"] == mib * MIB, 40)


def unharmed(member: Member) -> None:
    member.vm.wait_passes(1)
    assert member.vm.errors == 0, member.vm.serial.complaints()
    log = (member.vm.directories.run / "qemu.log").read_text()
    assert log == "", log[:1000]


def row(served: Serving, member: Member) -> VmReport:
    report = served.fleet.report(converged=None)
    assert sum(vm.saved_bytes for vm in report.vms) == report.host.saved_bytes
    return next(vm for vm in report.vms if vm.name == member.name)


def test_balloons_over_merged_pages(settings: MakeSettings, boot: Boot) -> None:
    backends = [Backend("memfd", share=True, mib=96), Backend("ram", share=True, mib=96)]
    members = boot_fleet(boot, backends, guest="tiny", parameters=BUSY)
    filed, bare = members
    plug_in(filed)
    for member in members:
        member.vm.ask(f"take {TAKEN_MIB}", "taken=")
        member.vm.ask("drop", "dropped")
    with serving(settings(), members) as served:
        assert served.merge() > 10_000
        before = row(served, filed)
        assert before.ballooned_pages == 0
        assert before.perhaps_discarded_pages == 0  # this balloon does not report free pages
        balloon_to(filed, 96 - TAKEN_MIB)
        served.merge(passes=1)
        after = row(served, filed)
        most = TAKEN_MIB * MIB // 4096
        assert most - (after.absent_pages or 0) <= after.ballooned_pages <= most
        assert after.ballooned_pages > most // 2
        gone_bytes = after.ballooned_pages * 4096
        assert after.present_bytes <= before.present_bytes - gone_bytes + MIB
        assert after.saved_bytes <= before.saved_bytes - gone_bytes + 4 * MIB
        balloon_to(filed, 96)
        served.merge(passes=2)
        again = row(served, filed)
        assert again.ballooned_pages == 0
        assert again.saved_bytes > after.saved_bytes + gone_bytes // 2
        unharmed(filed)

        (region,) = next(t for t in served.fleet.engine.vms if t.pid == bare.pid).regions
        plug_in(bare)
        if region.ram_fd is not None:
            assert served.fleet.follow_changes() == []  # this QEMU has a file for it
            return
        served.pass_once()
        ((name, reason),) = served.fleet.follow_changes()
        assert name == bare.name
        assert "virtio-balloon-pci (balloon0)" in reason
        assert "memory-backend-memfd" in reason
        assert_nothing_of_ours(bare)
        balloon_to(bare, 96 - TAKEN_MIB)
        unharmed(bare)
        served.take_in()
        assert "ram0" in served.refusal(bare)
        ask(bare, "device_del", id="balloon0")
        assert becomes_true(lambda: not is_plugged_in(bare), 30)
        served.take_in()
        assert served.merge() > 10_000
        unharmed(bare)
