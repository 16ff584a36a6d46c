"""Memory that comes and goes under the daemon: a pc-dimm plugged in, merged and unplugged.

The bare guest has no ACPI, so the test does at its ports what a guest's `_EJ0` does when
the operating system has let go of a DIMM: select the slot, set the eject bit
(docs/specs/acpi_mem_hotplug.rst in QEMU). What the DIMM holds, the test writes into its
RAM file, and reads through the guest's physical addresses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true, mappings
from tests.harness.monitor import qmp
from tests.harness.vm import Vm
from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import (
    Daemon,
    Directories,
    assert_unharmed,
    merged,
    monitors,
    running,
)

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

DIMM_BYTES = 128 << 20
"""The least that a DIMM can have."""
FILLED_BYTES = 8 << 20
PAGE = 4096
PLUGGABLE = ["-m", "16M,slots=2,maxmem=512M"]


@dataclass(frozen=True)
class Dimm:
    """A DIMM in a VM, its RAM file filled by us."""

    vm: Vm
    name: str
    file: Path
    content: bytes

    def plug(self, *, share: bool) -> None:
        with self.file.open("xb") as file:
            file.write(self.content)
            file.truncate(DIMM_BYTES)
        backend = {"id": f"ram-{self.name}", "size": DIMM_BYTES, "share": share}
        kind = "memory-backend-file"
        path = str(self.file)
        qmp(self.vm.test_qmp_path, "object-add", **{"qom-type": kind, "mem-path": path}, **backend)
        qmp(
            self.vm.test_qmp_path,
            "device_add",
            driver="pc-dimm",
            id=self.name,
            memdev=backend["id"],
        )
        # Only what QEMU has touched is memory of its own.
        assert self.read() == self.content

    def read(self) -> bytes:
        """What the guest would read there."""
        (own,) = [each for each in devices(self.vm) if each["id"] == self.name]
        copy = self.vm.directories.run / "copy"
        qmp(
            self.vm.test_qmp_path,
            "pmemsave",
            val=own["addr"],
            size=len(self.content),
            filename=str(copy),
        )
        return copy.read_bytes()

    def merged_pages(self) -> int:
        """Pages at the DIMM's address that stand on the store."""
        mine = [each for each in devices(self.vm) if each["id"] == self.name]
        assert mine
        low, high = self.area
        return sum(
            (min(m.end, high) - max(m.start, low)) // PAGE
            for m in mappings(self.vm.pid)
            if m.is_store and m.end > low and m.start < high
        )

    @property
    def area(self) -> tuple[int, int]:
        """Its addresses in QEMU, by the mapping that is still its own at the end of it."""
        ends = [m.end for m in mappings(self.vm.pid) if m.path.startswith(str(self.file))]
        return max(ends) - DIMM_BYTES, max(ends)

    def unplug(self) -> None:
        """Ask for it, and let go of it as the guest."""
        slot = next(each["slot"] for each in devices(self.vm) if each["id"] == self.name)
        qmp(self.vm.test_qmp_path, "device_del", id=self.name)
        for out in (f"o /w 0xa00 {slot}", "o /b 0xa14 8"):
            qmp(self.vm.test_qmp_path, "human-monitor-command", **{"command-line": out})
        assert self.name not in {each["id"] for each in devices(self.vm)}
        low, high = self.area
        qmp(self.vm.test_qmp_path, "object-del", id=f"ram-{self.name}")
        # QEMU's RCU thread unmaps it when nobody can be reading there any more.
        assert becomes_true(
            lambda: all(m.end <= low or m.start >= high for m in mappings(self.vm.pid))
        )


def devices(vm: Vm) -> list[dict[str, object]]:
    return [each["data"] for each in qmp(vm.test_qmp_path, "query-memory-devices")]


@pytest.fixture
def ram_files(directories: Directories) -> Path:
    """A folder in tmpfs that goes with the test."""
    directories.store.mkdir(mode=0o700)
    return directories.store


def holds_merged_pages(dimm: Dimm) -> bool:
    return dimm.merged_pages() > 0


def content(seed: int) -> bytes:
    """Pages of which each stands there eight times."""
    source = random.Random(seed)
    return b"".join(source.randbytes(PAGE) for _ in range(FILLED_BYTES // PAGE // 8)) * 8


def ram_bytes(daemon: Daemon, vm: Vm) -> int:
    return next(row.ram_bytes for row in daemon.client.report().vms if row.pid == vm.pid)


def test_a_dimm_is_unplugged_while_merged(
    directories: Directories, ram_files: Path, start: Start
) -> None:
    vms = [start(SHARED, extra=PLUGGABLE), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        size = ram_bytes(daemon, vms[0])
        dimm = Dimm(vms[0], "dimm", ram_files / "dimm", content(1))
        dimm.plug(share=True)
        assert becomes_true(lambda: ram_bytes(daemon, vms[0]) == size + DIMM_BYTES, 60)
        merged(daemon, *vms)
        assert dimm.merged_pages() > FILLED_BYTES // PAGE * 9 // 10
        assert dimm.read() == dimm.content
        saved_before = daemon.client.report(fresh=True).host.saved_bytes

        dimm.unplug()
        report = daemon.client.merge(timeout_s=60)
        assert {row.status for row in report.vms} == {"merged"}
        assert becomes_true(lambda: ram_bytes(daemon, vms[0]) == size, 60)
        assert daemon.happened("dropped") == []
        after = daemon.client.report(fresh=True)
        assert after.host.saved_bytes < saved_before - FILLED_BYTES // 2
        merged(daemon, *vms)
        assert_unharmed(*vms)


def test_other_dimms_at_the_same_addresses_keep_what_they_hold(
    directories: Directories, ram_files: Path, start: Start
) -> None:
    """Swapped at once: QEMU uses the addresses again before the daemon has looked."""
    vms = [start(SHARED, extra=PLUGGABLE), start(PRIVATE)]
    numbers = iter(range(1, 100))

    def plug(share: bool) -> Dimm:
        name = f"dimm{next(numbers)}"
        dimm = Dimm(vms[0], name, ram_files / name, content(int(name[4:])))
        dimm.plug(share=share)
        return dimm

    with running(directories, *monitors(*vms)) as daemon:
        dimms = [plug(share=True), plug(share=True)]
        merged(daemon, *vms)
        assert becomes_true(lambda: all(dimm.merged_pages() for dimm in dimms), 60)
        for share in (True, False):
            areas = [dimm.area for dimm in dimms]
            for dimm in dimms:
                dimm.unplug()
            # One where two were, then another: neither needs to lie as before.
            dimms = [plug(share=share)]
            low, high = dimms[0].area
            assert any(start < high and low < end for start, end in areas)
            daemon.client.merge(timeout_s=60)
            dimms.append(plug(share=not share))
            daemon.client.merge(timeout_s=60)
            assert [dimm.read() == dimm.content for dimm in dimms] == [True, True]
            # What was only read of a share=off file is the page cache's, and stays.
            shared = dimms[0 if share else 1]
            assert becomes_true(partial(holds_merged_pages, shared), 60)
            assert [dimm.read() == dimm.content for dimm in dimms] == [True, True]
        assert daemon.happened("dropped") == []
        daemon.client.set(run=2)
        assert [dimm.read() == dimm.content for dimm in dimms] == [True, True]
        assert_unharmed(*vms)
