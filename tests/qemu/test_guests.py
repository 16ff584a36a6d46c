"""The test guests themselves: they run everywhere they should, and they notice.

Every later test trusts a guest's error count and checksum. So a guest that says
"no errors" must be able to say otherwise: pages are damaged from outside here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.capabilities import kvm_missing, root_missing
from tests.harness.content import PAGE_BYTES, PAGE_WORDS, Kind, content_key, worker_pages
from tests.harness.disk import Disk, write_image
from tests.harness.images import Guest
from tests.harness.vm import Backend, Vm

from .conftest import Boot

pytestmark = pytest.mark.qemu

QUICK = {"mib": 8, "check_per_s": 8192}
BARE: dict[str, Any] = {"backend": Backend(mib=16), "parameters": {"mib": 2}}


def ram_mapping(vm: Vm) -> tuple[int, int]:
    """(start, length) of the guest's RAM; right only while nothing has been remapped."""
    size = vm.backends[0].mib << 20
    for line in Path(f"/proc/{vm.pid}/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if end - start == size:
            return start, size
    raise AssertionError("no mapping of the RAM's size")


def worker_page_addresses(vm: Vm) -> dict[int, int]:
    """Key of each whole non-zero worker page in the guest's RAM, to one of its HVAs."""
    start, size = ram_mapping(vm)
    with Path(f"/proc/{vm.pid}/mem").open("rb", buffering=0) as memory:
        raw = os.pread(memory.fileno(), size, start)
    pages = np.frombuffer(raw, dtype=np.uint64).reshape(-1, PAGE_WORDS)
    found = np.flatnonzero(worker_pages(pages))
    return {int(pages[page, 0]): start + int(page) * PAGE_BYTES for page in found}


def damage(vm: Vm, address: int) -> None:
    """Flip one bit of the running guest's memory."""
    # SAFETY: one byte of a VM of ours, to do the harm that the guest must notice.
    with Path(f"/proc/{vm.pid}/mem").open("r+b", buffering=0) as memory:
        byte = os.pread(memory.fileno(), 1, address)[0]
        os.pwrite(memory.fileno(), bytes([byte ^ 0x10]), address)


def test_tiny_checks_and_rewrites(boot: Boot) -> None:
    vm = boot(parameters={**QUICK, "shared_mib": 2, "repeat_mib": 1, "zero_mib": 3})
    composition = vm.wait_ready()
    assert (composition.shared, composition.repeat, composition.zero) == (512, 256, 768)
    assert composition.unique == composition.pages - 512 - 256 - 768
    status = vm.wait_passes(2)
    assert status.rewrites > 0
    assert vm.errors == 0


def test_bare_under_tcg(boot: Boot) -> None:
    vm = boot("bare", **BARE)
    assert vm.wait_passes(2).rewrites > 0
    assert vm.errors == 0


def test_bare_under_kvm(boot: Boot, need: Callable[[str | None], None]) -> None:
    need(kvm_missing())
    vm = boot("bare", accel="kvm", **BARE)
    assert vm.wait_passes(2).rewrites > 0
    assert vm.errors == 0


@pytest.mark.parametrize("guest", ["tiny", "bare"])
def test_damage_is_noticed(boot: Boot, guest: Guest) -> None:
    options: dict[str, Any] = {"parameters": QUICK} if guest == "tiny" else BARE
    vm = boot(guest, **options)
    vm.hold()
    assert vm.errors == 0
    before = vm.sum()
    unique = worker_page_addresses(vm)[content_key(Kind.UNIQUE, 1, 3)]
    damage(vm, unique + 8 * 100)
    assert vm.wait_passes(1).errors > 0
    assert any("word=100" in line for line in vm.serial.complaints())
    assert vm.sum() != before


def test_held_area_keeps_its_sum(boot: Boot) -> None:
    vm = boot(parameters={**QUICK, "rewrite_per_s": 500})
    vm.hold()
    held = vm.sum()
    vm.wait_passes(1)
    assert vm.sum() == held
    rewrites = vm.status().rewrites
    vm.go()
    vm.wait_status(lambda now, _: now.rewrites > rewrites)
    vm.hold()
    assert vm.sum() != held
    vm.wait_passes(1)
    assert vm.errors == 0


def test_four_guests_share_what_they_should(boot: Boot) -> None:
    """Four VMs at once, on four kinds of backend, one of them bare."""
    held = {"mib": 4, "hold": 1}
    vms = [
        boot(backend=Backend("memfd"), parameters={**held, "seed": 1}, ready=False),
        boot(backend=Backend("file"), parameters={**held, "seed": 2}, ready=False),
        boot(backend=Backend("ram", share=False), parameters={**held, "seed": 3}, ready=False),
        boot("bare", backend=Backend(mib=16), parameters={**held, "seed": 4}, ready=False),
    ]
    for vm in vms:
        vm.wait_ready()
    contents = [set(worker_page_addresses(vm)) for vm in vms]
    shared = {content_key(Kind.SHARED, 1, rank) for rank in range(256)}
    for seed, keys in enumerate(contents, start=1):
        assert shared <= keys
        assert {content_key(Kind.UNIQUE, seed, rank) for rank in range(256)} <= keys
    assert set.intersection(*contents) == shared
    assert [vm.errors for vm in vms] == [0, 0, 0, 0]


def test_several_backends_and_sandbox(boot: Boot) -> None:
    two = [Backend("memfd", mib=64), Backend("file", share=False, mib=48)]
    vm = boot(backend=two, parameters={"mib": 40, "check_per_s": 20480}, sandbox=True, thp=False)
    vm.wait_passes(1)
    assert vm.errors == 0


def test_another_user(boot: Boot, need: Callable[[str | None], None]) -> None:
    need(root_missing())
    vm = boot("bare", backend=Backend("file", mib=16), parameters={"mib": 1}, uid=65534)
    assert Path(f"/proc/{vm.pid}").stat().st_uid == 65534
    vm.wait_passes(1)
    assert vm.errors == 0


@pytest.mark.parametrize("iops", [None, 300])
def test_disk_reads_are_right(boot: Boot, tmp_path: Path, iops: int | None) -> None:
    disk = Disk(write_image(tmp_path / "disk"), iops=iops)
    vm = boot(disk=disk, parameters={**QUICK, "dma": 1})
    status = vm.wait_status(lambda now, start: now.dma_reads >= start.dma_reads + 200)
    assert status.dma_wrong == 0
    vm.hold()
    paused = vm.wait_passes(1).dma_reads
    assert vm.wait_passes(1).dma_reads == paused
    assert vm.errors == 0


def test_wrong_disk_reads_are_noticed(boot: Boot, tmp_path: Path) -> None:
    image = write_image(tmp_path / "disk")
    with image.open("r+b") as disk:
        for block in range(0, image.stat().st_size // PAGE_BYTES, 4):
            disk.seek(block * PAGE_BYTES + 2048)
            disk.write(b"wrong")
    vm = boot(disk=Disk(image), parameters={**QUICK, "dma": 1})
    status = vm.wait_status(lambda now, start: now.dma_reads >= start.dma_reads + 200)
    assert status.dma_wrong > 0
    assert status.errors == 0


def test_nothing_is_left(tmp_path: Path) -> None:
    with Vm("bare", backend=Backend("file", mib=16), parameters={"mib": 1}) as vm:
        vm.wait_ready()
        pid, directories = vm.pid, vm.directories
        assert (directories.ram / "ram0").exists()
    assert not Path(f"/proc/{pid}").exists()
    assert not directories.run.exists()
    assert not directories.ram.exists()
