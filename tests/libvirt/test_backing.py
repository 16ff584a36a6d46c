"""Every <memoryBacking>: what merges, what is refused, and in libvirt's own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.capabilities import capability_missing, kvm_missing
from tests.harness.kernel import becomes_true
from tests.harness.libvirtd import Libvirtd
from tests.libvirt.conftest import Start
from tests.libvirt.domains import (
    assert_nothing_of_ours,
    assert_unharmed,
    following,
    merge,
    row,
    wait_attached,
)
from tests.service.daemon import ALLOWANCE, Directories
from vmdedup.attach.ramfile import filesystem_at

pytestmark = pytest.mark.libvirt

MERGED = {
    "none": "",
    "memfd-shared": "<source type='memfd'/><access mode='shared'/>",
    "memfd-private": "<source type='memfd'/><access mode='private'/>",
    "file-shared": "<source type='file'/><access mode='shared'/>",
    "file-private": "<source type='file'/><access mode='private'/>",
    "file-implied": "<source type='anonymous'/><access mode='shared'/>",
}
_CAP_SYS_RESOURCE = 24
_VIRTIOFS = """
<filesystem type='mount'>
  <driver type='virtiofs'/><binary path='/usr/lib/qemu/virtiofsd'/>
  <source dir='{folder}'/><target dir='share'/>
</filesystem>
"""
_SHARED = "<source type='memfd'/><access mode='shared'/>"


def test_every_kind_is_merged_and_given_back(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    with following(directories, libvirtd) as daemon:
        domains = {kind: start(kind, backing=xml, ready=False) for kind, xml in MERGED.items()}
        for domain in domains.values():
            domain.wait_ready()
        merge(daemon, *domains.values())
        report = {vm.name: vm for vm in daemon.client.report(fresh=True).vms}
        on_disk = filesystem_at(1, str(libvirtd.base)) not in ("tmpfs", "")
        # libvirt's RAM files lie on an ordinary filesystem by default, which keeps what is merged
        # for a while.
        stopped = {kind for kind, vm in report.items() if vm.stops}
        files = {kind for kind in MERGED if kind.startswith("file")}
        quick = [vm for kind, vm in report.items() if not (on_disk and kind in files)]
        assert min(vm.saved_bytes for vm in quick) > 0
        assert stopped == (files if on_disk else set()), report
        assert {domain.run_state() for domain in domains.values()} == {"running"}
        assert_unharmed(*domains.values())
        daemon.client.unmerge()
        assert_unharmed(*domains.values())
        daemon.end()
        assert_nothing_of_ours(*domains.values())


def test_a_domain_under_kvm_is_merged(
    directories: Directories,
    libvirtd: Libvirtd,
    start: Start,
    need: Callable[[str | None], None],
) -> None:
    need(kvm_missing())
    with following(directories, libvirtd) as daemon:
        small = {"mib": 1, "check_per_s": 1000}
        one, two = (start(name, accel="kvm", parameters=small) for name in ("kvm1", "kvm2"))
        merge(daemon, one, two, least_pages=32)
        assert_unharmed(one, two)


def test_what_is_refused_is_named_by_its_element(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    folder = libvirtd.base / "files/share"
    folder.mkdir(exist_ok=True)
    wanted = {
        "shares-no-pages": ({"backing": "<nosharepages/>"}, "<memoryBacking><nosharepages/>"),
        "prealloc": (
            {"backing": "<source type='memfd'/><allocation mode='immediate'/>"},
            "<memoryBacking><allocation mode='immediate'/>",
        ),
        "virtiofs": (
            {"backing": _SHARED, "devices": _VIRTIOFS.format(folder=folder)},
            "<filesystem><driver type='virtiofs'/>",
        ),
    }
    with following(directories, libvirtd) as daemon:
        domains = {
            name: start(name, ready=False, **options) for name, (options, _) in wanted.items()
        }

        def reasons() -> dict[str, str]:
            rows = {name: row(daemon, domain) for name, domain in domains.items()}
            return {
                name: found.reason
                for name, found in rows.items()
                if found is not None and not found.mergeable and found.reason is not None
            }

        assert becomes_true(lambda: reasons().keys() == wanted.keys(), 6 * ALLOWANCE), reasons()
        for name, reason in reasons().items():
            assert wanted[name][1] in reason
        sound = start("sound")
        wait_attached(daemon, sound)
        assert_nothing_of_ours(*domains.values())


def test_locked_memory_is_refused_by_its_element(
    directories: Directories,
    libvirtd: Libvirtd,
    start: Start,
    need: Callable[[str | None], None],
) -> None:
    need(capability_missing(_CAP_SYS_RESOURCE, "raise the limit of locked memory"))
    limit = "<memtune><hard_limit unit='MiB'>1024</hard_limit></memtune>"
    with following(directories, libvirtd) as daemon:
        domain = start("locked", backing="<locked/>", memtune=limit, ready=False)
        assert becomes_true(lambda: row(daemon, domain) is not None, 6 * ALLOWANCE)
        assert "<memoryBacking><locked/>" in str(getattr(row(daemon, domain), "reason", ""))


def test_huge_pages_are_refused_by_their_element(
    directories: Directories,
    libvirtd: Libvirtd,
    start: Start,
    need: Callable[[str | None], None],
) -> None:
    reserved = Path("/proc/sys/vm/nr_hugepages")
    before = reserved.read_text()
    reserved.write_text(str(int(before) + 8))
    try:
        enough = int(reserved.read_text()) >= int(before) + 8
        need(None if enough else "no huge pages to reserve")
        with following(directories, libvirtd) as daemon:
            domain = start("huge", backing="<hugepages/>", ready=False)
            assert becomes_true(lambda: row(daemon, domain) is not None, 6 * ALLOWANCE)
            assert "<memoryBacking><hugepages/>" in str(getattr(row(daemon, domain), "reason", ""))
            domain.close()
    finally:
        reserved.write_text(before)


def test_zero_pages_of_a_domain_that_reports_free_pages(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    with following(directories, libvirtd) as daemon:
        domain = start("reports", balloon="<memballoon model='virtio' freePageReporting='on'/>")
        merge(daemon, domain, least_pages=-1)
        (report,) = daemon.client.report(fresh=True).vms
        assert report.zero_pages > 0
        assert report.merged_pages == 0
        assert "<memballoon freePageReporting='on' model='virtio'>" in (report.hint or "")
        assert_unharmed(domain)
