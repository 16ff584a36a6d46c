"""A daemon that is killed while virtio-mem plugs and unplugs blocks of a merged VM."""

from __future__ import annotations

import time

import pytest

from tests.harness.kernel import becomes_true
from tests.qemu.conftest import Boot
from tests.qemu.hot_memory import PLUGGED_MIB, POOLS, assert_given_back, hot_vm
from tests.service.daemon import Directories, monitors, running, store_pages, wait_mergeable

pytestmark = pytest.mark.qemu


def test_an_engine_is_killed_amid_plugging_and_unplugging(
    boot: Boot, directories: Directories
) -> None:
    vm = hot_vm(boot)
    for _ in range(2):
        with running(directories, *monitors(vm.vm)) as daemon:
            wait_mergeable(daemon, vm.vm)
            vm.request(PLUGGED_MIB)
            assert becomes_true(lambda: vm.has(PLUGGED_MIB), 60)
            assert vm.number("keep 68", "kept=") == 68
            daemon.client.merge(timeout_s=100)
            assert store_pages(vm.vm) > 500
            assert vm.wrong_pages() == 0
            vm.vm.ask("end", "ended")
            vm.request(0)
            time.sleep(0.2)
            daemon.kill()
        assert becomes_true(lambda: vm.has(0), 60)
        assert {pool.id: vm.held_bytes(pool) for pool in POOLS} == {p.id: 0 for p in POOLS}
        with running(directories, *monitors(vm.vm)) as daemon:
            wait_mergeable(daemon, vm.vm)
            daemon.client.merge(timeout_s=100)
            assert becomes_true(lambda: sum(map(vm.ours, POOLS)) == 0, 30)
            assert_given_back(vm)
            daemon.kill()
    vm.unharmed()
