"""virtio-mem: plugged blocks are merged as other memory is, and unplugging gives memory back."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.hot_memory import (
    BARE,
    MIB,
    MOVABLE,
    PLUGGED_MIB,
    POOLS,
    Pool,
    hot_vm,
    plug_and_keep,
    resize,
    unplug_all,
    wait_given_back,
)
from tests.qemu.serving import hmp, migrate, serving, speaks
from vmdedup.attach.ranges import yields_to_registration

pytestmark = pytest.mark.qemu


@pytest.mark.both_qemus
def test_blocks_are_plugged_merged_and_unplugged(settings: MakeSettings, boot: Boot) -> None:
    vm = hot_vm(boot)
    with serving(settings(), [vm.member]) as served:
        for _ in range(2):
            plug_and_keep(served, vm, 68)
            served.merge(passes=2)
            assert vm.wrong_pages() == 0
            saved_bytes = served.fleet.report(converged=None).host.saved_bytes
            unplug_all(served, vm)
            report = served.fleet.report(converged=None)
            wait_given_back(served, vm)
            # What the guest has not plugged is saved by nobody.
            assert report.host.saved_bytes < saved_bytes - 20 * MIB
            assert report.vms[0].ballooned_pages <= 5 * PLUGGED_MIB * MIB // 4096
        vm.unharmed()


def test_a_part_is_unplugged_and_the_rest_stays_right(settings: MakeSettings, boot: Boot) -> None:
    """QEMU tells how much is plugged, and not which blocks: nothing is mapped back until all is."""
    half_mib = PLUGGED_MIB // 2
    vm = hot_vm(boot, POOLS)
    with serving(settings(), [vm.member]) as served:
        for _ in range(2):
            plug_and_keep(served, vm, 68)
            vm.vm.ask("end", "ended")
            resize(served, vm, half_mib)
            assert vm.number("keep 24", "kept=") == 24
            served.merge(passes=3)
            assert vm.wrong_pages() == 0
            saved = served.fleet.report(converged=None).vms[0]
            assert saved.ballooned_pages > 0  # of the unplugged blocks, and not saved
            resize(served, vm, PLUGGED_MIB)
            served.merge(passes=2)
            assert vm.wrong_pages() == 0
            unplug_all(served, vm)
            wait_given_back(served, vm)
    vm.unharmed()


def test_a_guest_that_clears_freed_memory_relies_on_no_zeroes(
    settings: MakeSettings, boot: Boot
) -> None:
    """A plugged block is freed to Linux's allocator, which clears it then: `init_on_free`."""
    vm = hot_vm(boot, POOLS[:1], kernel=f"{MOVABLE} init_on_free=1")
    with serving(settings(), [vm.member]) as served:
        for _ in range(2):
            plug_and_keep(served, vm, 12)
            assert vm.number("take 1", "taken=") == 1
            vm.vm.ask("drop", "dropped")
            vm.vm.ask("end", "ended")
            vm.request(0)
            assert becomes_true(lambda: vm.has(0), 60)  # no pass meanwhile: store pages stay
            vm.request(PLUGGED_MIB)
            assert becomes_true(lambda: vm.has(PLUGGED_MIB), 60)
            assert vm.ours(POOLS[0]) > 500
            assert vm.number("fresh 12", "stale=") == 0
            resize(served, vm, 0)
    vm.unharmed()


def test_a_reboot_unplugs_everything(settings: MakeSettings, boot: Boot) -> None:
    vm = hot_vm(boot)
    with serving(settings(), [vm.member]) as served:
        plug_and_keep(served, vm, 68)
        vm.request(0)
        vm.ask("set-action", reboot="reset")
        vm.vm.begin_anew(lambda: vm.ask("system_reset"))
        assert vm.has(0)
        wait_given_back(served, vm)
        plug_and_keep(served, vm, 68)
        vm.unharmed()


@pytest.mark.both_qemus
def test_a_snapshot_of_merged_blocks_is_right_when_it_is_loaded(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """Loaded into the same blocks, and into a VM that has unplugged them all meanwhile."""
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "512M"], check=True)
    vm = hot_vm(boot, extra=["-drive", f"if=none,id=d0,file={disk}"])
    with serving(settings(), [vm.member]) as served:
        plug_and_keep(served, vm, 68)
        merged = {pool.id: vm.ours(pool) for pool in vm.pools}
        assert hmp(vm.vm, "savevm s1") == ""
        assert {pool.id: vm.ours(pool) for pool in vm.pools} == merged
        for unplugs in (False, True):
            if unplugs:
                unplug_all(served, vm)
                wait_given_back(served, vm)
            served.merge(passes=2)
            assert hmp(vm.vm, "loadvm s1") == ""
            assert vm.has(PLUGGED_MIB)
            assert vm.wrong_pages() == 0
            served.merge(passes=4)
            assert [pool.id for pool in vm.pools if vm.ours(pool) < 500] == []
            assert vm.wrong_pages() == 0
        unplug_all(served, vm)
        wait_given_back(served, vm)
    vm.unharmed()


@pytest.mark.parametrize("qemu", ["backports"], indirect=True)
def test_blocks_that_are_memory_slots_of_their_own(settings: MakeSettings, boot: Boot) -> None:
    """`dynamic-memslots` (QEMU 8.2 and later) adds and removes slots as blocks are plugged."""
    pools = [replace(pool, options=",dynamic-memslots=on") for pool in POOLS[:2]]
    vm = hot_vm(boot, pools)
    with serving(settings(), [vm.member]) as served:
        for _ in range(2):
            plug_and_keep(served, vm, 24)
            assert vm.wrong_pages() == 0
            unplug_all(served, vm)
            wait_given_back(served, vm)
    vm.unharmed()


@pytest.mark.both_qemus
def test_merged_blocks_migrate(settings: MakeSettings, boot: Boot, tmp_path: Path) -> None:
    """While passes run; the peer has the blocks, merges them, and gives them back."""
    uri = f"unix:{tmp_path / 'migration'}"
    vm = hot_vm(boot)
    peer = hot_vm(boot, ready=False, extra=["-incoming", uri])
    with serving(settings(), [vm.member]) as served:
        plug_and_keep(served, vm, 68)
        migrate(vm.vm, uri)
        served.merge(passes=2)
    speaks(peer.vm)
    assert peer.has(PLUGGED_MIB)
    assert peer.wrong_pages() == 0
    vm.vm.close()
    with serving(settings(), [peer.member]) as served:
        served.merge(passes=4)
        assert [pool.id for pool in peer.pools if peer.ours(pool) < 500] == []
        assert peer.wrong_pages() == 0
        unplug_all(served, peer)
        wait_given_back(served, peer)
    peer.unharmed()


@pytest.mark.both_qemus
def test_shared_memory_without_a_file_is_refused(settings: MakeSettings, boot: Boot) -> None:
    vm = hot_vm(boot, [BARE])
    with serving(settings(), [vm.member]) as served:
        (attached,) = served.fleet.engine.vms
        refused = dict(attached.left_alone)
        if BARE.id in refused:
            assert "virtio-mem-pci (vm5)" in refused[BARE.id]
            assert "memory-backend-memfd" in refused[BARE.id]
            resize(served, vm, PLUGGED_MIB)
            served.merge(passes=2)
            assert vm.ours(BARE) == 0
            resize(served, vm, 0)
        else:
            plug_and_keep(served, vm, 12)
            unplug_all(served, vm)
            wait_given_back(served, vm)
    vm.unharmed()


def test_a_device_that_allocates_is_merged_once_its_backend_is_registered(
    settings: MakeSettings, boot: Boot
) -> None:
    pool = Pool(6, "memfd,share=on", ",prealloc=on")
    vm = hot_vm(boot, [pool])
    with serving(settings(), [vm.member]) as served:
        (attached,) = served.fleet.engine.vms
        reason = dict(attached.left_alone)[pool.id]
        assert reason.startswith("prealloc=on of virtio-mem-pci (vm6)")
        assert yields_to_registration(reason)
        attached = served.fleet.renew(attached, {pool.id})
        assert pool.id not in dict(attached.left_alone)
        for _ in range(2):  # plugging allocates over what is still mapped
            plug_and_keep(served, vm, 12)
            vm.vm.ask("end", "ended")
            vm.request(0)
            assert becomes_true(lambda: vm.has(0), 60)
        wait_given_back(served, vm)
    vm.unharmed()
