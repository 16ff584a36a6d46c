"""What KSM would save, against the kernel's own KSM on the same frozen VMs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.benchmark import ksm
from tests.benchmark.errors import BenchError
from tests.harness.kernel import write_memory
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.test_analyze import PAGE, ZERO, pause, ram_start
from vmdedup.deduplicator import Deduplicator
from vmdedup.models import KsmComparison
from vmdedup.settings import Settings

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.alone,
    pytest.mark.usefixtures("needs_root"),
]

MIB = 16
TOP = (MIB - 4) * (1 << 20)
"""Offset of memory that a bare guest with little to do has never touched."""
_SETTLED_SCANS = 3
_LIMIT_S = 120


@contextmanager
def kernel_ksm(**changed: str) -> Iterator[ksm.KsmSettings]:
    """KSM at full speed with these settings; everything is unmerged and put back at the end."""
    try:
        settings = ksm.KsmSettings()
    except BenchError as error:
        pytest.skip(str(error))
    with settings:
        settings.use(ksm.FULL_SPEED | changed)
        try:
            yield settings
        finally:
            settings.unmerge()


def scanned(kernel: ksm.KsmSettings) -> ksm.Counters:
    """KSM's counters after scans that changed nothing more."""
    kernel.run()
    before, since, limit = ksm.counters(), 0, time.monotonic() + _LIMIT_S
    while since < _SETTLED_SCANS:
        assert time.monotonic() < limit, "KSM does not come to an end"
        time.sleep(0.1)
        now = ksm.counters()
        if (now.pages_shared, now.saved_pages) != (before.pages_shared, before.saved_pages):
            before = now
        since = now.full_scans - before.full_scans
    kernel.rest()
    return now


def compared(settings: Settings, vms: Sequence[Vm]) -> KsmComparison:
    with Deduplicator(settings) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms], merging=False)
        found = dedup.compare_with_ksm().ksm
    assert found is not None
    return found


def fill(vm: Vm, copies: dict[bytes, int]) -> None:
    """So many pages of each content, in a row; the VM must be paused."""
    pages = [content for content, number in copies.items() for _ in range(number)]
    start = ram_start(vm) + TOP
    write_memory(vm.pid, {start + at * PAGE: page for at, page in enumerate(pages)})


@pytest.fixture
def vms(boot: Boot) -> list[Vm]:
    """Two with private memory, one with shared memory; paused, and with chosen contents."""
    kinds = [
        Backend("ram", share=False, mib=MIB),
        Backend("memfd", share=False, mib=MIB),
        Backend("memfd", share=True, mib=MIB),
    ]
    started = [
        # KSM leaves some huge pages whole, of equal pages for one: the account's note says so.
        boot("bare", backend=kind, parameters={"mib": 2, "seed": seed}, ready=False, thp=False)
        for seed, kind in enumerate(kinds, 1)
    ]
    for vm in started:
        vm.wait_ready()
        pause(vm)
    # 513 = 2 * 256 + 1: two KSM pages are full, and one page stays alone.
    fill(started[0], {b"a" * PAGE: 300, b"b" * PAGE: 257, b"c" * PAGE: 1, ZERO: 20})
    fill(started[1], {b"a" * PAGE: 213, b"b" * PAGE: 1, b"d" * PAGE: 1, ZERO: 7})
    fill(started[2], {b"a" * PAGE: 100, b"c" * PAGE: 1, ZERO: 5})
    return started


@pytest.mark.parametrize("use_zero_pages", ["0", "1"])
def test_the_kernel_comes_to_the_same(
    settings: MakeSettings, vms: list[Vm], use_zero_pages: str
) -> None:
    if not Path(f"/proc/{vms[0].pid}/ksm_stat").exists():
        pytest.skip("this kernel has no /proc/PID/ksm_stat")
    with kernel_ksm(use_zero_pages=use_zero_pages) as kernel:
        told = compared(settings(), vms)
        counted = scanned(kernel)
        if ksm.share_of([vm.pid for vm in vms]).foreign_pages:
            pytest.skip("KSM also merges pages of other processes on this host")
        each = [ksm.share_of([vm.pid]).merging_pages for vm in vms]
        while_merged = compared(settings(), vms)
    assert (told.pages_shared, told.pages_sharing) == (counted.pages_shared, counted.pages_sharing)
    assert told.zero_pages == counted.zero_pages
    assert [vm.merging_pages for vm in told.vms] == each
    assert told.saved_bytes == counted.saved_pages * PAGE
    assert told.pages_sharing > 700
    assert (told.zero_pages > 0) == (use_zero_pages == "1")
    # KSM's own merges do not change what it would come to.
    for field in ("pages_shared", "pages_sharing", "zero_pages"):
        assert getattr(while_merged, field) == getattr(told, field)


def test_our_own_merges_count_as_the_vms_pages(settings: MakeSettings, vms: list[Vm]) -> None:
    """An admin may ask at any time; what vmdedup would save is what it does save."""
    before = compared(settings(), vms)
    with Deduplicator(settings()) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        merged = dedup.run(until_converged=True)
    after = compared(settings(), vms)
    assert after == before
    assert merged.host.saved_bytes == pytest.approx(before.vmdedup_saved_bytes, rel=0.05)
    with Deduplicator(settings()) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        dedup.unmerge()
