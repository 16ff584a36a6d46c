"""Trust domains on real VMs: who may share with whom."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import (
    EVERY_BACKEND,
    Member,
    assert_nothing_of_ours,
    attached,
    boot_fleet,
    frozen,
    paths,
    sharing,
)
from vmdedup.deduplicator import Deduplicator
from vmdedup.settings import DomainRule

pytestmark = pytest.mark.qemu

HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
QUICK = {"mib": 4, "check_per_s": 8192}


def test_rules_keep_vms_apart(settings: MakeSettings, boot: Boot) -> None:
    rules = (
        DomainRule(name="memfd-*", domain="red"),
        DomainRule(name="file-*", domain="blue"),
        DomainRule(name="ram-on-*", domain="none"),
        DomainRule(name="ram-off-*", domain="zero-only"),
    )
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters=HELD)
    red, blue, (none,), (zero_only,) = fleet[:2], fleet[2:4], fleet[4:5], fleet[5:]
    with Deduplicator(settings(domains=rules)) as dedup:
        listed = {row.name: row for row in dedup.attach(paths(fleet)).vms}
        with frozen(fleet):
            report = dedup.run(until_converged=True)
            truth = sharing(fleet)
            funnel = dedup.explain(red[0].name)
        assert [vm.trust_domain for vm in report.vms if vm.status == "merged"] == [
            *["red"] * 2,
            *["blue"] * 2,
            "zero-only",
        ]
        assert not listed[none.name].mergeable
        assert "never merged" in (listed[none.name].reason or "")
        (refused,) = [vm for vm in report.vms if vm.status == "refused"]
        assert (refused.name, refused.reason) == (none.name, listed[none.name].reason)
        assert_nothing_of_ours(none)
        inodes = [
            {inode for member in group for inode in member.store_inodes()} for group in (red, blue)
        ]
        assert [len(each) for each in inodes] == [1, 1]
        assert not inodes[0] & inodes[1]
        assert zero_only.store_inodes() == set()
        assert truth.zero_pages[zero_only.name] > 256
        assert truth.common(red[0].name, red[1].name) >= 256
        assert truth.common(red[0].name, blue[0].name) == 0
        index = {name: number for number, name in enumerate(report.matrix.vms)}
        assert report.matrix.pages[index[red[0].name]][index[blue[0].name]] == 0
        assert funnel.merged_pages == truth.sites[red[0].name].total()
        assert dedup.verify().ok
        assert dedup.unmerge().store_removed
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


@pytest.mark.both_qemus
def test_another_user_is_another_domain(
    settings: MakeSettings, boot: Boot, need: Callable[[str | None], None]
) -> None:
    """QEMU of another user, sandboxed as by libvirt: merged live, but with its like only."""
    need(root_missing())
    backends = [Backend(mib=16), Backend("file", share=False, mib=16)]
    mine = boot_fleet(boot, backends, parameters=QUICK)
    other = boot_fleet(boot, backends, prefix="other-", parameters=QUICK, uid=65534, sandbox=True)
    fleet = [*mine, *other]
    with attached(settings(), fleet) as dedup:
        report = dedup.run(until_converged=True, timeout_s=10)
        assert [vm.trust_domain for vm in report.vms] == ["uid:0", "uid:0", *["uid:65534"] * 2]
        assert [vm.stops for vm in report.vms] == [0] * 4
        assert min(vm.merged_pages for vm in report.vms) > 256
        assert not store_inodes(mine) & store_inodes(other)
        assert dedup.verify().ok
        for member in fleet:
            member.vm.wait_passes(1)
            assert member.vm.errors == 0
        result = dedup.unmerge()
        assert (result.store_removed, {vm.remaining_pages for vm in result.vms}) == (True, {0})
    for member in fleet:
        assert_nothing_of_ours(member)
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def store_inodes(members: list[Member]) -> set[int]:
    return {inode for member in members for inode in member.store_inodes()}
