"""Cold pages: paged out to swap that is memory, back when the guest reads them, harmless."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.capabilities import pagemap_scan_missing
from tests.harness.kernel import becomes_true
from tests.harness.limits import SwapKind, swap, swap_missing, swapped_bytes
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot, Need
from tests.service.conftest import PRIVATE, SHARED
from tests.service.daemon import (
    COMMAND,
    Daemon,
    Directories,
    assert_unharmed,
    killed_at,
    monitors,
    running,
    store_pages,
    wait_mergeable,
)
from vmdedup.engine.cold_paging import SHORT_AFTER_S
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
SHORTAGE_CONTROLS = """
[controls]
shortage_page_out = 1
advisor_target_scan_time = 1
advisor_max_cpu = 100
"""
_WAIT_S = 90


class SmallHost:
    """A host whose MemAvailable is what the test says, to one daemon, as lxcfs would show it.

    No test may fill up the memory of the host that it runs on.
    """

    def __init__(self, meminfo: Path) -> None:
        self._meminfo = meminfo
        meminfo.write_text(Path("/proc/meminfo").read_text())

    @property
    def program(self) -> str:
        """Python for a daemon in a mount namespace of its own."""
        script = f'mount --bind {self._meminfo} /proc/meminfo && exec "$@"'
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        return f"import os, sys\nos.execvp('unshare', {[*words, *COMMAND]} + sys.argv[1:])\n"

    def show_available(self, amount_bytes: int | None, *, swap_free_bytes: int = 0) -> None:
        """From now on so much is available, or what was just now. The text keeps its length.

        It does not follow what goes out, so tell of no more swap than zram has left at the end.
        """
        text = Path("/proc/meminfo").read_text()
        if amount_bytes is not None:
            for name, amount in (("MemAvailable", amount_bytes), ("SwapFree", swap_free_bytes)):
                line = f"{name}:".ljust(14) + f"{amount >> 10:>10} kB"
                text = re.sub(rf"^{name}:.*$", line, text, flags=re.MULTILINE)
        with self._meminfo.open("r+") as file:
            file.write(text)


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


@pytest.fixture
def host(tmp_path: Path) -> SmallHost:
    return SmallHost(tmp_path / "meminfo")


def test_short_memory_has_what_is_cold_paged_out_at_once(
    directories: Directories, cold_vms: list[Vm], host: SmallHost
) -> None:
    """The step `shortage_page_out` alone: nothing goes out before, nor after."""
    sums = [vm.sum() for vm in cold_vms]
    directories.write(SHORTAGE_CONTROLS)
    options = monitors(*cold_vms)
    with swap(), running(directories, *options, program=host.program) as daemon:
        wait_mergeable(daemon, *cold_vms)
        assert daemon.client.merge(timeout_s=60).converged
        time.sleep(SHORT_AFTER_S + 5)
        assert daemon.client.report(fresh=True).host.cold_pages == 0
        assert out_pages(cold_vms[1]) == 0
        assert daemon.happened("paged-out") == []

        host.show_available(1 << 20, swap_free_bytes=64 << 20)
        assert becomes_true(lambda: all(is_out(daemon, vm) for vm in cold_vms), _WAIT_S)
        assert daemon.client.report(fresh=True).memory[0].short
        assert out_pages(cold_vms[1]) >= row(daemon, cold_vms[1]).cold_pages
        assert daemon.happened("paged-out") == ["memory is short: cold pages go out at once"]

        host.show_available(None)
        assert becomes_true(lambda: len(daemon.happened("paged-out")) == 2, 30)
        told = daemon.happened("paged-out")[1]
        assert told.endswith(" pages, while memory was short")
        assert int(told.split()[0].replace(",", "")) > 2 * 0.9 * UNIQUE_PAGES
        assert [vm.sum() for vm in cold_vms] == sums
        assert daemon.client.report(fresh=True).host.cold_pages < UNIQUE_PAGES


def test_short_memory_without_zram_is_told(
    directories: Directories, cold_vms: list[Vm], host: SmallHost
) -> None:
    directories.write(SHORTAGE_CONTROLS)
    with running(directories, *monitors(*cold_vms), program=host.program) as daemon:
        wait_mergeable(daemon, *cold_vms)
        assert daemon.client.merge(timeout_s=60).converged
        host.show_available(1 << 20)
        assert becomes_true(lambda: daemon.happened("paged-out") != [], 30)
        assert daemon.happened("paged-out")[0].startswith("there is no swap with room")


@pytest.mark.parametrize("kind", ["zram", "zswap"])
def test_doctor_says_what_there_is(directories: Directories, need: Need, kind: SwapKind) -> None:
    need(swap_missing(kind))
    directories.write("[controls]\nshortage_page_out = 1\n")
    with swap(kind=kind):
        words = ("doctor", "--config", str(directories.config), "--json")
        done = subprocess.run(
            [*COMMAND, *words], env=directories.environment, capture_output=True, check=False
        )
    checks = json.loads(done.stdout)["checks"]
    (told,) = [check for check in checks if check["name"] == "cold pages"]
    has_psi = readable(Path("/proc/pressure/memory"))
    assert ("PSI is on" if has_psi else "PSI is off") in told["found"]
    if kind == "zram":
        algorithms = Path("/sys/block/zram0/comp_algorithm").read_text()
        assert f"compressed by {algorithms.partition('[')[2].partition(']')[0]} " in told["found"]
        assert all(each.strip("[]") in told["found"] for each in algorithms.split())
        assert told["verdict"] == "fine"
    else:
        assert Path("/sys/module/zswap/parameters/compressor").read_text().strip() in told["found"]
        assert "swap to zram" in told["remedy"], "the step for short memory needs it"


def readable(path: Path) -> bool:
    try:
        return bool(path.read_text())
    except OSError:
        return False


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
