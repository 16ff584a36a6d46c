"""A guest's disk reads by DMA into the very pages that are merged, and reads nothing wrong.

With O_DIRECT the host's kernel pins the guest's page and the device writes to it
whenever it gets there, past every protection. On a disk that is slow below the
host's kernel (not by QEMU's throttling, which holds requests back before that)
the pages stay pinned for long, and without the drain thousands of reads are lost.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.disk import Disk, write_image
from tests.harness.throttle import slow_disk, throttle_missing
from tests.harness.vm import Vm
from tests.qemu.conftest import Boot
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.deduplicator import Deduplicator
from vmdedup.settings import Settings

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

_MERGING_S = float(os.environ.get("VMDEDUP_DMA_SECONDS", "8"))
_SLOW_IOPS = 300
_AREA = {"mib": 2, "rewrite_per_s": 32, "dma": 1, "dma_mib": 2, "dma_hold_ms": 100}
_BUFFERS = _AREA["dma_mib"] * 256


@pytest.fixture
def slow(need: Callable[[str | None], None], tmp_path: Path) -> Iterator[Path]:
    """Where the ids of the processes go for which the disk under `tmp_path` is slow."""
    need(root_missing() or throttle_missing(tmp_path))
    with slow_disk(tmp_path, _SLOW_IOPS) as processes:
        yield processes


def _boot(boot: Boot, folder: Path, disks: dict[str, Disk], slow: Path | None = None) -> list[Vm]:
    image = write_image(folder / "image", mib=4)
    for disk in disks.values():
        shutil.copy(image, disk.path)
    vms = [
        boot(ready=False, name=name, disk=disk, parameters={**_AREA, "seed": number + 1})
        for number, (name, disk) in enumerate(disks.items())
    ]
    for vm in vms:
        vm.wait_ready()
        if slow is not None:
            slow.write_text(str(vm.pid))
    return vms


def _merge(vms: list[Vm], folder: Path, enough: Callable[[], bool]) -> dict[str, int]:
    """Merge until `enough`, take all back, merge once more; the gates of each VM."""
    store = Path("/dev/shm") / f"vmdedup-dma-{os.getpid()}"
    settings = Settings(runtime_dir=folder / "run", store_dir=store, first_look_ms=10)
    try:
        with Deduplicator(settings) as dedup:
            listed = dedup.attach([str(vm.qmp_path) for vm in vms]).vms
            assert [f"{vm.name}: {vm.reason}" for vm in listed if not vm.mergeable] == []
            passes = 0
            while passes == 0 or not enough():
                passes += 2
                report = dedup.run(passes=passes)
            assert [vm.name for vm in report.vms if vm.stops] == []
            dedup.unmerge()
            report = dedup.run(passes=passes + 2)
            assert dedup.verify().ok
            dedup.unmerge()
            return {vm.name: vm.gates or 0 for vm in report.vms}
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(store)


def _require_nothing_lost(vms: list[Vm], folder: Path) -> None:
    reads = [vm.status().dma_reads for vm in vms]
    deadline = time.monotonic() + _MERGING_S
    gates = _merge(vms, folder, lambda: time.monotonic() > deadline)
    for vm, before in zip(vms, reads, strict=True):
        vm.wait_passes(1)
        done = vm.status().dma_reads - before
        print(f"{vm.name}: {done} reads, {gates[vm.name]} gates, {vm.errors} wrong")
        assert vm.errors == 0, vm.serial.complaints()
        assert done > 2 * _BUFFERS
        assert gates[vm.name] > 10


def test_no_read_is_lost_to_a_merge(boot: Boot, tmp_path: Path) -> None:
    disks = {
        "threads": Disk(tmp_path / "threads"),
        "throttled": Disk(tmp_path / "throttled", iops=_SLOW_IOPS),
        "native": Disk(tmp_path / "native", aio="native", iothread=True),
        "io_uring": Disk(tmp_path / "io_uring", aio="io_uring"),
        "writeback": Disk(tmp_path / "writeback", cache="writeback"),
    }
    _require_nothing_lost(_boot(boot, tmp_path, disks), tmp_path)


@pytest.mark.both_qemus
def test_no_read_is_lost_where_the_disk_is_slow(slow: Path, boot: Boot, tmp_path: Path) -> None:
    disks = {
        "threads": Disk(tmp_path / "threads"),
        "native": Disk(tmp_path / "native", aio="native"),
        "io_uring": Disk(tmp_path / "io_uring", aio="io_uring", iothread=True),
    }
    _require_nothing_lost(_boot(boot, tmp_path, disks, slow), tmp_path)


def test_reads_are_lost_there_without_the_drain(
    slow: Path, boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experiment that shows what the empty transaction is good for, on this QEMU."""
    disks = {
        "threads": Disk(tmp_path / "threads"),
        "native": Disk(tmp_path / "native", aio="native"),
    }
    vms = _boot(boot, tmp_path, disks, slow)
    monkeypatch.setattr(QmpMonitor, "drain", lambda *_, **__: 0.0)
    deadline = time.monotonic() + 10 * _MERGING_S

    def all_lost() -> bool:
        return all(vm.status().dma_wrong for vm in vms) or time.monotonic() > deadline

    _merge(vms, tmp_path, all_lost)
    for vm in vms:
        print(f"{vm.name}: {vm.status().dma_reads} reads, {vm.status().dma_wrong} wrong")
        assert vm.status().dma_wrong > 0
