"""Cold pages: paged out to swap that is memory, back when the guest reads them, harmless."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.harness.capabilities import pagemap_scan_missing
from tests.harness.kernel import becomes_true
from tests.harness.limits import swap, swap_missing, swapped_bytes
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot, Need
from tests.service.conftest import PRIVATE, SHARED
from tests.service.daemon import (
    Daemon,
    Directories,
    assert_unharmed,
    killed_at,
    monitors,
    running,
    store_pages,
    wait_mergeable,
)
from vmdedup.linux.swap import read_swap
from vmdedup.models import VmReport

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.alone,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("needs_root"),
]

STILL = {"mib": 8, "shared_mib": 1, "repeat_mib": 1, "zero_mib": 1, "hold": 1, "check_per_s": 0}
"""A guest that touches nothing until it is asked for its checksum: 5 MiB of it are unique."""
UNIQUE_PAGES = 5 * 256
COLD_AFTER_S = 2
CONTROLS = f"""
[controls]
cold_after_s = {COLD_AFTER_S}
cold_max_cpu = 100
cold_max_refaults = 20
advisor_target_scan_time = 1
advisor_max_cpu = 100
"""
_WAIT_S = 90


@pytest.fixture
def pages_out(need: Need) -> None:
    need(swap_missing("zram"))
    need(pagemap_scan_missing())


@pytest.fixture
def cold_vms(boot: Boot, pages_out: None) -> list[Vm]:
    """Two guests that hold still, whose memory is a file and their own."""
    return [cold_vm(boot, seed, backend) for seed, backend in enumerate((SHARED, PRIVATE), 1)]


def cold_vm(boot: Boot, seed: int, backend: Backend, number: int | None = None) -> Vm:
    name = f"cold-{number or seed}"
    return boot("bare", name=name, backend=backend, parameters={"seed": seed, **STILL})


@contextmanager
def paging(directories: Directories, vms: list[Vm], settings: str = "") -> Iterator[Daemon]:
    """A daemon that pages out what was not written for two seconds."""
    directories.write(settings + CONTROLS)
    show(directories, vms)
    with running(directories, "--qmp", str(directories.base / "*.qmp")) as daemon:
        wait_mergeable(daemon, *vms)
        yield daemon


def show(directories: Directories, vms: list[Vm]) -> None:
    """Have the daemon find these VMs."""
    for vm in vms:
        link = directories.base / f"{vm.name}.qmp"
        link.unlink(missing_ok=True)
        link.symlink_to(vm.qmp_path)


def row(daemon: Daemon, vm: Vm) -> VmReport:
    return next(each for each in daemon.client.report(fresh=True).vms if each.pid == vm.pid)


def is_out(daemon: Daemon, vm: Vm) -> bool:
    """Whether most of what is unique in it is out."""
    return row(daemon, vm).cold_pages > 0.9 * UNIQUE_PAGES


def out_pages(vm: Vm) -> int:
    """Pages of a private VM that are swapped out, by the kernel's word."""
    return swapped_bytes(vm.pid) // 4096


def test_what_is_cold_goes_out_comes_back_right_and_is_counted(
    directories: Directories, cold_vms: list[Vm]
) -> None:
    sums = [vm.sum() for vm in cold_vms]
    with swap(), paging(directories, cold_vms) as daemon:
        assert becomes_true(lambda: all(is_out(daemon, vm) for vm in cold_vms), _WAIT_S)
        report = daemon.client.report(fresh=True)
        host = report.host
        assert host.saved_bytes > 0
        assert host.cold_pages == sum(vm.cold_pages for vm in report.vms)
        # These contents cannot be compressed: that they give back next to nothing is told too.
        assert host.cold_bytes_saved < 0.1 * host.cold_pages * 4096
        assert host.cold_bytes_saved == sum(vm.cold_bytes_saved for vm in report.vms)
        assert out_pages(cold_vms[1]) >= row(daemon, cold_vms[1]).cold_pages
        saved = host.saved_bytes
        assert [vm.sum() for vm in cold_vms] == sums
        assert becomes_true(
            lambda: daemon.client.report(fresh=True).host.cold_refaults_per_s > 20, 20
        )
        assert daemon.client.report(fresh=True).host.cold_pages < host.cold_pages / 2
        assert daemon.client.report(fresh=True).host.saved_bytes == pytest.approx(saved, rel=0.1)

        daemon.client.set(cold_after_s=0)
        assert [vm.sum() for vm in cold_vms] == sums
        left = out_pages(cold_vms[1])  # of memory that the guest does not read
        assert left < UNIQUE_PAGES / 2
        time.sleep(4 * COLD_AFTER_S)
        assert out_pages(cold_vms[1]) <= left
        assert daemon.client.report(fresh=True).host.cold_pages < host.cold_pages / 2


@pytest.mark.usefixtures("pages_out")
def test_what_comes_back_slows_it_down(directories: Directories, boot: Boot) -> None:
    """A guest that reads all of its memory round and round: it is out less and less."""
    parameters = {"seed": 1, **STILL, "check_per_s": 2048}
    vm = boot("bare", backend=PRIVATE, parameters=parameters)
    with swap(), paging(directories, [vm]) as daemon:
        assert becomes_true(lambda: row(daemon, vm).cold_refaults_per_s > 20, _WAIT_S)
        # Each page that came back soon needs four times as long, then sixteen times.
        assert becomes_true(lambda: row(daemon, vm).cold_refaults_per_s < 20, _WAIT_S)
        assert row(daemon, vm).cold_pages < 0.5 * UNIQUE_PAGES
    assert_unharmed(vm)


def test_a_page_that_is_out_is_not_read_in_for_one_that_equals_it(
    directories: Directories, boot: Boot, cold_vms: list[Vm]
) -> None:
    """Two twins of a VM come: they share among themselves, and what is out stays out."""
    with swap(), paging(directories, cold_vms) as daemon:
        private = cold_vms[1]
        assert becomes_true(lambda: is_out(daemon, private), _WAIT_S)
        daemon.client.set(cold_after_s=0)
        out, own = out_pages(private), store_pages(private)
        twins = [cold_vm(boot, 2, PRIVATE, number) for number in (3, 4)]
        show(directories, twins)
        wait_mergeable(daemon, *twins)
        assert daemon.client.merge(timeout_s=60).converged
        # The twins hold each of its contents, so all of their unique pages are published.
        assert min(store_pages(vm) for vm in twins) > own + 0.9 * UNIQUE_PAGES
        assert out_pages(private) > 0.99 * out
        assert store_pages(private) < own + 0.1 * UNIQUE_PAGES
        assert private.sum() == twins[0].sum()


def test_killed_right_after_paging_out_it_leaves_pages_swapped_out(
    directories: Directories, cold_vms: list[Vm]
) -> None:
    sums = [vm.sum() for vm in cold_vms]
    with swap():
        with running(directories, *monitors(*cold_vms), program=killed_at("paged-out")) as daemon:
            wait_mergeable(daemon, *cold_vms)
            daemon.client.set(cold_after_s=COLD_AFTER_S, advisor_target_scan_time=1)
            assert becomes_true(lambda: daemon.process.poll() is not None, _WAIT_S)
            assert daemon.process.returncode == -signal.SIGKILL
        assert sum(device.used_bytes for device in read_swap().devices) > 0
        assert [vm.sum() for vm in cold_vms] == sums
        with paging(directories, cold_vms) as daemon:  # the next one goes on
            assert becomes_true(lambda: all(is_out(daemon, vm) for vm in cold_vms), _WAIT_S)
        assert [vm.sum() for vm in cold_vms] == sums


def test_slow_swap_is_refused_with_the_reason_unless_the_user_says_so(
    directories: Directories, cold_vms: list[Vm], need: Need
) -> None:
    need(swap_missing("file"))
    with swap(kind="file"):
        with paging(directories, cold_vms) as daemon:
            assert becomes_true(lambda: daemon.happened("cold-pages") != [], 30)
            assert "cold_any_swap" in daemon.happened("cold-pages")[0]
            time.sleep(8)
            assert daemon.client.report(fresh=True).host.cold_pages == 0
            assert out_pages(cold_vms[1]) == 0
        with paging(directories, cold_vms, "cold_any_swap = true\n") as daemon:
            assert becomes_true(lambda: is_out(daemon, cold_vms[1]), _WAIT_S)


def test_a_vm_that_is_not_to_be_paged_out_is_left(
    directories: Directories, cold_vms: list[Vm]
) -> None:
    with swap(), paging(directories, cold_vms, 'cold_never = ["*-2"]\n') as daemon:
        assert becomes_true(lambda: is_out(daemon, cold_vms[0]), _WAIT_S)
        assert row(daemon, cold_vms[1]).cold_pages == 0
        assert out_pages(cold_vms[1]) == 0
