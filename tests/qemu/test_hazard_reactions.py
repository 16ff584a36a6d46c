"""What becomes of merges when a hazard appears: taken back, left alone, or only paused."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import (
    Member,
    assert_nothing_of_ours,
    boot_fleet,
    frozen,
    merge,
    open_files,
    paths,
)
from tests.qemu.serving import merged_pages, migration_of, serving, set_capability, speaks
from tests.qemu.test_hazards import holder
from tests.service.daemon import Directories, monitors, running
from vmdedup.attach.discover import attach_all
from vmdedup.deduplicator import Deduplicator

pytestmark = pytest.mark.qemu

BUSY = {"mib": 4, "rewrite_per_s": 64, "check_per_s": 8192}
FILE = Backend("file", share=True, mib=16)


def unharmed(member: Member) -> None:
    member.vm.wait_passes(1)
    assert member.vm.errors == 0, member.vm.serial.complaints()


def test_an_engine_takes_back_what_its_predecessor_merged(
    settings: MakeSettings, boot: Boot
) -> None:
    """The hazard came while nobody watched: another process maps the RAM file."""
    (member,) = boot_fleet(boot, [FILE], parameters=BUSY)
    own = settings()
    merge(own, [member], passes=3)
    assert merged_pages(member) > 500
    with holder(member.vm.directories.ram / "ram0") as other, frozen([member]):
        before = member.snapshot()
        with Deduplicator(own) as dedup:
            (row,) = dedup.attach(paths([member])).vms
        assert not row.mergeable
        assert str(other.pid) in (row.reason or "")
        assert_nothing_of_ours(member)
        assert member.still_holds(before)
        assert member.run_state() == "paused"
    unharmed(member)
    merge(own, [member], passes=2)
    assert merged_pages(member) > 500


def test_pages_that_a_device_may_have_pinned_stay_merged(
    settings: MakeSettings, boot: Boot
) -> None:
    """COLO stands for all that is refused outright: no device here can pin."""
    (member,) = boot_fleet(boot, [Backend("ram", share=False, mib=16)], parameters=BUSY)
    own = settings()
    with serving(own, [member]) as served:
        # Right before the first session: the pass had begun, and merges nothing.
        set_capability(member.vm, "x-colo")
        served.pass_once()
        assert ["examined again" in (why or "") for why in served.troubles()] == [True]
        assert merged_pages(member) == 0
        set_capability(member.vm, "x-colo", False)
        assert served.merge() > 500
        set_capability(member.vm, "x-colo")
        ((_, reason),) = served.fleet.follow_changes()
        assert "COLO" in reason
        assert "anon_inode:[userfaultfd]" not in open_files(member.pid)
    standing = merged_pages(member)
    assert standing > 500
    with Deduplicator(own) as dedup:
        dedup.attach(paths([member]), refuse=False)
        (left,) = dedup.unmerge().vms
    assert (left.restored_pages, left.remaining_pages) == (0, standing)
    assert "COLO replication is set up" in (left.reason or "")
    unharmed(member)
    set_capability(member.vm, "x-colo", False)
    with Deduplicator(own) as dedup:
        dedup.attach(paths([member]))
        assert dedup.unmerge().store_removed
    assert_nothing_of_ours(member)
    unharmed(member)


def test_a_stopped_process_holds_nobody_up(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, [FILE, FILE], parameters=BUSY)
    stopped, other = fleet
    with serving(settings(), fleet) as served:
        assert served.merge() > 1000
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            assert becomes_true(lambda: "T (stopped)" in status_of(stopped))
            assert served.fleet.follow_changes() == []
            assert "SIGSTOP" in served.refusal(stopped)
            assert served.merge() > 500
            assert served.fleet.pids() == {other.pid}
            # Tried again, its socket is a second thing by which it could be listed.
            for found in attach_all(paths([stopped]), served.fleet.loop, timeout_s=0.2).unreachable:
                served.fleet.note_unreachable(found)
            rows = {row.name: row for row in served.fleet.listed().vms}
            assert rows.keys() == {stopped.name, other.name}
            assert "SIGSTOP" in (rows[stopped.name].reason or "")
            assert not rows[stopped.name].mergeable
            assert len(served.fleet.report(converged=None).vms) == 2
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        served.take_in()
        assert served.merge() > 1000
    for member in fleet:
        unharmed(member)


def status_of(member: Member) -> str:
    return Path(f"/proc/{member.pid}/status").read_text()


@pytest.mark.both_qemus
def test_postcopy_migration_of_a_merged_vm(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """Begun while changes are tracked: the source needs no userfaultfd, its peer has its own."""
    (member,) = boot_fleet(boot, [Backend("memfd", mib=16)], parameters=BUSY)
    vm = boot(
        "bare", ready=False, name="peer", backend=member.vm.backends, extra=["-incoming", "defer"]
    )
    uri = f"unix:{tmp_path / 'migration'}"
    with serving(settings(), [member]) as served:
        assert served.merge() > 500
        for each in (vm, member.vm):
            set_capability(each, "postcopy-ram")
        qmp(vm.test_qmp_path, "migrate-incoming", uri=uri)
        slow = {"max-bandwidth": 1 << 20}
        qmp(member.vm.test_qmp_path, "migrate-set-parameters", **slow)
        qmp(member.vm.test_qmp_path, "migrate", uri=uri)
        served.pass_once()
        ((_, reason),) = served.fleet.follow_changes()
        assert "postcopy-ram" in reason
        qmp(member.vm.test_qmp_path, "migrate-start-postcopy")
        served.take_in()
        assert "postcopy" in served.refusal(member)
        assert becomes_true(lambda: migration_of(member.vm)["status"] == "completed", 40)
    speaks(vm)
    vm.wait_passes(2)
    assert vm.errors == 0, vm.serial.complaints()


def test_the_daemon_takes_back_in_time(boot: Boot) -> None:
    """A migration capability is set by somebody else; no event tells of it."""
    with Directories() as directories:
        (member,) = boot_fleet(boot, [FILE], parameters=BUSY)
        with running(directories, *monitors(member.vm)) as daemon:
            assert becomes_true(lambda: merged_pages(member) > 500, 30)
            set_capability(member.vm, "x-ignore-shared")
            assert becomes_true(lambda: merged_pages(member) == 0, 30)
            assert becomes_true(lambda: "x-ignore-shared" in (daemon.row_of(member.vm)[1] or ""))
            unharmed(member)
            set_capability(member.vm, "x-ignore-shared", False)
            assert becomes_true(lambda: merged_pages(member) > 100, 60)
            unharmed(member)
        member.vm.close()
