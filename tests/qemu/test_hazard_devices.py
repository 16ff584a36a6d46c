"""Devices that come and go while a VM is merged: balloons, memory, vhost-user."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness.kernel import becomes_true, mappings
from tests.harness.monitor import qmp
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, assert_nothing_of_ours, boot_fleet, frozen, open_files
from tests.qemu.serving import merged_pages, migration_of, serving, set_capability
from tests.service.daemon import store_pages
from vmdedup.attach.identity import VmPolicy
from vmdedup.core.nominate import Nomination, nominate

pytestmark = pytest.mark.qemu

SHARED = Backend("memfd", share=True, mib=96)
BUSY = {"mib": 8, "rewrite_per_s": 128, "check_per_s": 8192}
MIB = 1 << 20


def linux(boot: Boot, *extra: str, backend: Backend = SHARED) -> Member:
    (member,) = boot_fleet(
        boot, [backend], guest="tiny", parameters=BUSY, extra=extra, thp=backend.kind == "ram"
    )
    return member


def unharmed(member: Member) -> None:
    member.vm.wait_passes(1)
    assert member.vm.errors == 0, member.vm.serial.complaints()


def ask(vm: Vm, command: str, /, **arguments: Any) -> Any:
    return qmp(vm.test_qmp_path, command, **arguments)


def plugged(vm: Vm) -> set[str]:
    """Ids of the devices that were given one."""
    return {one["name"] for one in ask(vm, "qom-list", path="/machine/peripheral")}


def unplug(vm: Vm, device: str) -> None:
    ask(vm, "device_del", id=device)
    assert becomes_true(lambda: device not in plugged(vm), 30), f"{device} was not let go of"


def removed(vm: Vm, channel: str) -> bool:
    """Try to remove a character device; whether there is none of that id (any more)."""
    with suppress(KeyError):
        ask(vm, "chardev-remove", id=channel)
    return channel not in {one["label"] for one in ask(vm, "query-chardev")}


def balloon_to(vm: Vm, mib: int) -> None:
    ask(vm, "balloon", value=mib * MIB)
    assert becomes_true(lambda: ask(vm, "query-balloon")["actual"] == mib * MIB, 30)


@contextmanager
def storage_daemon(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A real vhost-user backend: a disk that another process serves."""
    disk, socket = folder / "disk", folder / "vhost.sock"
    disk.write_bytes(bytes(16 * MIB))
    node = f"file,node-name=d,filename={disk}"
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on"
    process = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", node, "--export", export],
        stdin=subprocess.DEVNULL,
    )
    try:
        assert becomes_true(socket.exists)
        yield process, socket
    finally:
        process.kill()
        process.wait()


def test_balloon_and_a_vhost_user_disk(settings: MakeSettings, boot: Boot, tmp_path: Path) -> None:
    member = linux(boot, "-device", "virtio-balloon-pci,id=balloon0")
    vm, inode = member.vm, member.mappings()[0].inode
    with serving(settings(), [member]) as served, storage_daemon(tmp_path) as (disk, socket):
        assert served.merge() > 1000
        balloon_to(vm, 84)
        served.merge(passes=2)
        balloon_to(vm, 96)
        served.merge(passes=2)
        unharmed(member)

        def map_its_ram() -> bool:
            return any(mapping.inode == inode for mapping in mappings(disk.pid))

        def plug_in_disk() -> None:
            backend = {"type": "unix", "data": {"path": str(socket)}}
            channel = {"type": "socket", "data": {"addr": backend, "server": False}}
            ask(vm, "chardev-add", id="channel", backend=channel)
            ask(vm, "device_add", driver="vhost-user-blk-pci", id="disk0", chardev="channel")

        def follow() -> None:
            served.pass_once()  # one that had begun: it merges nothing more
            ((name, reason),) = served.fleet.follow_changes()
            assert name == member.name
            assert "vhost-user-blk-pci (disk0)" in reason
            assert "remove the device" in served.refusal(member)

        with frozen([member]):  # its driver starts the disk only afterwards
            plug_in_disk()
            follow()
        assert becomes_true(map_its_ram, 30)
        assert_nothing_of_ours(member)
        unharmed(member)
        served.take_in()
        assert "qemu-storage" in served.refusal(member)
        unplug(vm, "disk0")
        # The device is gone from the tree before it has let go of its channel.
        assert becomes_true(lambda: removed(vm, "channel"))
        assert becomes_true(lambda: not map_its_ram(), 30)
        served.take_in()
        assert served.merge() > 1000
        # Seen late: the disk has met holes where its rings are, and may have given up.
        plug_in_disk()
        assert becomes_true(map_its_ram, 30)
        follow()
        assert_nothing_of_ours(member)
        unharmed(member)


@pytest.mark.both_qemus
def test_memory_and_balloons_that_are_plugged_in_and_out(
    settings: MakeSettings, boot: Boot
) -> None:
    size = ["-m", f"{SHARED.mib}M,slots=2,maxmem=1G"]
    ordered = ["-object", "memory-backend-memfd,id=pool,size=128M,share=on"]
    ordered += ["-device", "virtio-mem-pci,id=vm0,memdev=pool,requested-size=0"]
    member = linux(boot, *size, *ordered)
    vm = member.vm
    with serving(settings(), [member]) as served:
        (attached,) = served.fleet.engine.vms
        assert {region.backend for region in attached.regions} == {"ram0", "pool"}
        assert served.merge() > 1000

        ask(
            vm, "qom-set", path="/machine/peripheral/vm0", property="requested-size", value=64 * MIB
        )
        properties = {"path": "/machine/peripheral/vm0", "property": "size"}
        assert becomes_true(lambda: ask(vm, "qom-get", **properties) == 64 * MIB, 30)
        ask(vm, "object-add", **{"qom-type": "memory-backend-memfd", "id": "more"}, size=128 * MIB)
        ask(vm, "device_add", driver="pc-dimm", id="dimm0", memdev="more")
        assert served.fleet.follow_changes() == [(member.name, "its memory changed")]
        (attached,) = served.fleet.engine.vms
        assert {region.backend for region in attached.regions} == {"ram0", "pool", "more"}
        assert served.merge() > 1000
        unharmed(member)

        ask(vm, "device_add", driver="virtio-balloon-pci", id="balloon0", **FREE_PAGE_REPORTING)
        served.pass_once()
        ((_, reason),) = served.fleet.follow_changes()
        assert "virtio-balloon-pci (balloon0): with free-page-reporting=on" in reason
        assert store_pages(vm) == 0
        assert served.merge() > 100
        assert store_pages(vm) == 0
        assert "only zero pages" in (served.fleet.engine.vms[0].hint or "")
        unharmed(member)
        unplug(vm, "balloon0")
        served.pass_once()
        ((_, reason),) = served.fleet.follow_changes()
        assert "more than zero pages may be merged now" in reason
        assert served.merge() > 1000
        assert store_pages(vm) > 0
        with frozen([member]):
            before = member.snapshot()
            served.merge(passes=1)
            assert member.still_holds(before)
        unharmed(member)


FREE_PAGE_REPORTING = {"free-page-reporting": True}


@contextmanager
def ksm_running() -> Iterator[None]:
    run = Path("/sys/kernel/mm/ksm/run")
    if not run.exists() or run.read_text().strip() == "1":
        pytest.skip("KSM is not there, or runs already")
    before = run.read_text()
    try:
        run.write_text("1")
        yield
    finally:
        run.write_text(before)


@pytest.mark.parametrize("pause", ["postcopy-ram", pytest.param("ksm", marks=pytest.mark.alone)])
def test_store_pages_go_home_though_merging_pauses(
    settings: MakeSettings, boot: Boot, pause: str
) -> None:
    """Nothing is merged beside KSM, or before a migration; the guest takes pages for zeroes."""
    member = linux(boot, backend=Backend("ram", share=False, mib=96))
    with serving(settings(), [member]) as served, ExitStack() as exits:
        assert served.merge() > 1000
        assert store_pages(member.vm) > 0
        if pause == "ksm":
            exits.enter_context(ksm_running())
        else:
            set_capability(member.vm, pause)
        ask(
            member.vm,
            "device_add",
            driver="virtio-balloon-pci",
            id="balloon0",
            **FREE_PAGE_REPORTING,
        )
        served.fleet.follow_changes()
        assert served.refusal(member)
        assert store_pages(member.vm) == 0
        assert_nothing_of_ours(member)
    unharmed(member)


def test_zero_pages_stay_merged_before_a_migration(settings: MakeSettings, boot: Boot) -> None:
    member = linux(boot, "-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on")
    with serving(settings(), [member]) as served:
        assert served.merge() > 100
        with frozen([member]):
            standing = merged_pages(member)
            set_capability(member.vm, "postcopy-ram")
            served.fleet.follow_changes()
            assert "postcopy-ram" in served.refusal(member)
            assert merged_pages(member) == standing
        set_capability(member.vm, "postcopy-ram", False)
        served.take_in()
        assert served.merge() > 100
    unharmed(member)


def test_store_pages_wait_for_a_background_snapshot(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """QEMU protects the memory meanwhile; a remap would take that away from it."""
    member = linux(boot)
    with serving(settings(), [member]) as served, socket.socket(socket.AF_UNIX) as reader:
        reader.bind(str(tmp_path / "snapshot"))
        reader.listen()  # and takes nothing for now
        assert served.merge() > 1000
        served.fleet.stop_dirty_tracking()
        balloon = {"driver": "virtio-balloon-pci", "id": "balloon0", **FREE_PAGE_REPORTING}
        ask(member.vm, "device_add", **balloon)
        set_capability(member.vm, "background-snapshot")
        standing = store_pages(member.vm)
        ask(member.vm, "migrate", uri=f"unix:{tmp_path / 'snapshot'}")
        # Active first: before, QEMU has another one for a moment, to ask for its features.
        assert becomes_true(
            lambda: (
                migration_of(member.vm).get("status") == "active"
                and "anon_inode:[userfaultfd]" in open_files(member.pid)
            )
        )
        served.fleet.follow_changes()
        (vm,) = served.fleet.engine.vms  # attached until its store pages are gone
        assert "stay merged: QEMU (it has 1 of its own)" in (vm.refusal or "")
        assert store_pages(member.vm) == standing > 0
        taker, _ = reader.accept()
        with taker:
            while taker.recv(MIB):
                pass
        assert becomes_true(lambda: migration_of(member.vm)["status"] == "completed")
        set_capability(member.vm, "background-snapshot", False)
        assert becomes_true(lambda: bool(served.fleet.settle()), 60)
        assert store_pages(member.vm) == 0
    unharmed(member)


def test_a_vm_of_zero_pages_that_may_be_merged_no_more(settings: MakeSettings, boot: Boot) -> None:
    member = linux(boot, "-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on")
    with serving(settings(), [member]) as served:
        assert served.merge() > 100
        (vm,) = served.fleet.engine.vms
        vm.use_policy(VmPolicy(exclude=True))
        assert "excluded by the policy" in (served.fleet.reexamine(vm) or "")
        assert_nothing_of_ours(member)
    unharmed(member)


def test_a_device_that_comes_while_we_find_out_what_is_equal(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is open by then; with many VMs finding out takes seconds."""
    member = linux(boot)
    taken: list[bool] = []

    def slowly(*arguments: Any, **options: Any) -> Nomination:
        time.sleep(0.5)  # the VM was looked at before
        balloon = {"driver": "virtio-balloon-pci", "id": "balloon0", **FREE_PAGE_REPORTING}
        ask(member.vm, "device_add", **balloon)
        found = nominate(*arguments, **options)
        taken.append(len(found.vms[0].taken) > 0)
        return found

    monkeypatch.setattr("vmdedup.engine.domain_merge.nominate", slowly)
    with serving(settings(), [member]) as served:
        served.pass_once()
        assert taken == [True]
        assert_nothing_of_ours(member)
        ((_, reason),) = served.fleet.follow_changes()
        assert "free-page-reporting=on" in reason
    unharmed(member)
