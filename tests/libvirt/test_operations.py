"""What libvirt does to a domain while it is merged, and that the guest does not notice."""

from __future__ import annotations

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.libvirtd import Domain, Libvirtd
from tests.libvirt.conftest import Start
from tests.libvirt.domains import (
    assert_nothing_of_ours,
    assert_unharmed,
    fd_sets,
    following,
    merge,
    row,
    store_pages,
    wait_attached,
)
from tests.service.daemon import ALLOWANCE, Daemon, Directories

pytestmark = pytest.mark.libvirt


def _merged_again(daemon: Daemon, *domains: Domain) -> None:
    assert_unharmed(*domains)
    merge(daemon, *domains)
    assert_unharmed(*domains)


def test_save_restore_dump_and_reset_while_merged(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    with following(directories, libvirtd) as daemon:
        one, other = start("one", define=True), start("other")
        merge(daemon, one, other)

        image = libvirtd.base / "files/saved"
        one.virsh("save", str(image))
        assert becomes_true(lambda: row(daemon, one) is None, 8 * ALLOWANCE)
        libvirtd.virsh("restore", str(image))
        one.started_again()
        _merged_again(daemon, one, other)

        one.virsh("managedsave")
        one.virsh("start")
        one.started_again()
        _merged_again(daemon, one, other)

        dump = libvirtd.base / "files/dump"
        one.virsh("dump", str(dump), "--memory-only")
        assert dump.stat().st_size > 0
        assert one.run_state() == "running"
        _merged_again(daemon, one, other)

        one.virsh("dump", str(dump), "--memory-only", "--live")
        one.begin_anew(lambda: one.virsh("reset"))
        _merged_again(daemon, one, other)
        assert fd_sets(one) == []

        daemon.client.unmerge()
        daemon.end()
        assert_nothing_of_ours(one, other)


def test_destroy_and_detach_while_merged(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    with following(directories, libvirtd) as daemon:
        one, other = start("one", usb="piix3-uhci"), start("other")
        merge(daemon, one, other)
        tablet = libvirtd.base / "files/tablet.xml"
        tablet.write_text("<input type='tablet' bus='usb'/>")
        for verb in ("attach-device", "detach-device"):
            one.virsh(verb, str(tablet))
        assert_unharmed(one, other)
        assert store_pages(one) > 0
        one.virsh("destroy")
        assert becomes_true(lambda: row(daemon, one) is None, 8 * ALLOWANCE)
        assert_unharmed(other)
        again = start("one")
        wait_attached(daemon, again)
        _merged_again(daemon, again, other)
