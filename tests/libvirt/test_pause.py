"""Where a domain can only be merged while it stands still: who may let it go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.libvirtd import Domain, Libvirtd
from tests.libvirt.conftest import Start
from tests.libvirt.domains import assert_unharmed, store_pages
from tests.qemu.conftest import MakeSettings
from vmdedup.attach.libvirt.link import DomainEvent, LibvirtLink
from vmdedup.attach.libvirt.monitor import LibvirtMonitor
from vmdedup.attach.replies import VersionReply
from vmdedup.deduplicator import Deduplicator
from vmdedup.guardian.resume import resume_noted
from vmdedup.guardian.runtime_dir import RuntimeDirectory, StopNote
from vmdedup.linux.process import read_process_id
from vmdedup.settings import LibvirtSettings

pytestmark = pytest.mark.libvirt


@pytest.fixture
def heard() -> list[DomainEvent]:
    return []


@pytest.fixture
def link(libvirtd: Libvirtd, heard: list[DomainEvent]) -> Iterator[LibvirtLink]:
    with LibvirtLink(libvirtd.uri, heard.append) as connected:
        connected.connect(30)
        yield connected


def monitor_of(link: LibvirtLink, domain: Domain) -> LibvirtMonitor:
    return LibvirtMonitor(link, domain.uuid, domain.name)


def test_our_pause_ends_and_is_news_to_nobody(
    link: LibvirtLink, heard: list[DomainEvent], start: Start
) -> None:
    domain = start("paused")
    monitor = monitor_of(link, domain)
    monitor.stop()
    assert domain.run_state() == "paused"
    monitor.cont()
    assert domain.run_state() == "running"
    domain.virsh("suspend")
    assert becomes_true(lambda: any(event.kind == "suspended" for event in heard))
    assert [event.kind for event in heard if event.uuid == domain.uuid][-1] == "suspended"
    assert len([event for event in heard if event.kind == "suspended"]) == 1
    monitor.close()


def test_a_suspend_during_our_pause_is_respected(
    link: LibvirtLink, heard: list[DomainEvent], start: Start
) -> None:
    """It succeeds, changes nothing and is told to nobody: the domain stands still already."""
    domain = start("paused")
    monitor = monitor_of(link, domain)
    for _ in range(3):
        monitor.stop()
        domain.virsh("suspend")
        monitor.cont()
        assert domain.run_state() == "paused"
        assert heard[-1].kind == "left-paused"
        domain.virsh("resume")
    # Other changes are not taken for it: the domain must not stand still for ever.
    monitor.stop()
    domain.virsh("desc", "--live", "something else was written down")
    monitor.cont()
    assert domain.run_state() == "running"
    monitor.close()


def test_a_backup_does_not_keep_a_domain_paused(
    link: LibvirtLink, libvirtd: Libvirtd, start: Start, tmp_path: Path
) -> None:
    """It may last for hours, and began before the pause or in it."""
    place = libvirtd.base / "files"  # QEMU's user gets there
    disk = place / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    device = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{disk}'/><target dev='vdb' bus='virtio'/></disk>"
    )
    domain = start("backed-up", devices=device)
    monitor = monitor_of(link, domain)
    wanted = tmp_path / "backup.xml"
    wanted.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{place}/nbd'/>"
        f"<disks><disk name='vdb' backup='yes' type='file'>"
        f"<scratch file='{place}/scratch'/></disk></disks></domainbackup>"
    )
    domain.virsh("backup-begin", str(wanted))
    assert "Backup" in domain.virsh("domjobinfo")
    monitor.stop()
    monitor.cont()
    assert domain.run_state() == "running"
    domain.virsh("domjobabort")
    monitor.close()


def test_commands_of_another_thread_are_not_taken_for_a_suspend(
    link: LibvirtLink, start: Start
) -> None:
    """As the daemon asks on while a thread of its own pauses the domain for lack of memory."""
    domain = start("paused")
    monitor = monitor_of(link, domain)
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            monitor.query("query-version", VersionReply)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(50):
            monitor.stop()
            monitor.cont()
            assert domain.run_state() == "running"
    finally:
        ends.set()
        asking.join()
    monitor.close()


def test_a_suspend_just_before_our_pause_is_respected(link: LibvirtLink, start: Start) -> None:
    domain = start("paused")
    monitor = monitor_of(link, domain)
    assert monitor.status() == "running"
    domain.virsh("suspend")
    monitor.stop()
    monitor.cont()
    assert domain.run_state() == "paused"
    domain.virsh("resume")
    monitor.stop()
    domain.virsh("resume")
    monitor.cont()
    assert domain.run_state() == "running"
    monitor.close()


def test_a_dead_engines_pause_is_ended_by_its_note(
    link: LibvirtLink, libvirtd: Libvirtd, start: Start, settings: MakeSettings
) -> None:
    domain = start("noted")
    monitor = monitor_of(link, domain)
    runtime = RuntimeDirectory(settings().runtime_dir)
    note = StopNote(
        vm=domain.name,
        pid=domain.pid,
        start_ticks=read_process_id(domain.pid).start_ticks,
        monitor_path=monitor.address,
        thread_id=domain.pid + 1_000_000_000,
        engine_pid=domain.pid,
        engine_start_ticks=0,
    )
    for suspended, state in ((False, "running"), (True, "paused")):
        file = runtime.write_note(note)
        if suspended:
            domain.virsh("suspend")
        else:
            monitor.stop()
        assert resume_noted(runtime.path).unreached == []
        assert not file.exists()
        assert domain.run_state() == state
    domain.virsh("resume")
    runtime.write_note(note)
    monitor.stop()
    libvirtd.kill()
    assert resume_noted(runtime.path).unreached == [domain.name]
    libvirtd.start()
    assert resume_noted(runtime.path).unreached == []
    assert domain.run_state() == "running"
    runtime.close()
    monitor.close()


def test_domains_are_merged_in_pauses(
    libvirtd: Libvirtd, settings: MakeSettings, start: Start
) -> None:
    one, two = start("one"), start("two")
    masked = settings(mask=["userfaultfd-wp"], libvirt=LibvirtSettings(uri=libvirtd.uri))
    with Deduplicator(masked) as dedup:
        assert {row.uuid for row in dedup.attach().vms} == {one.uuid, two.uuid}
        report = dedup.run(until_converged=True, timeout_s=40)
        assert all((vm.stops or 0) > 0 for vm in report.vms)
        assert min(store_pages(one), store_pages(two)) > 100
        assert (one.run_state(), two.run_state()) == ("running", "running")
        assert_unharmed(one, two)
        one.virsh("suspend")
        dedup.run(passes=2)
        dedup.unmerge()
        assert (one.run_state(), two.run_state()) == ("paused", "running")
        one.virsh("resume")
        assert_unharmed(one, two)
