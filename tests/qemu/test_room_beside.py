"""A store on the tmpfs on which RAM files lie leaves them the blocks that they still need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.limits import free_bytes, resize_tmpfs, small_tmpfs
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, attached, boot_fleet
from tests.qemu.machine import Machine, backend
from vmdedup.deduplicator import Deduplicator
from vmdedup.doctor.host import host_checks
from vmdedup.report.console import make_console
from vmdedup.report.table import show_report
from vmdedup.vm.ram_files import RamFiles

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("needs_root"),
]

MUCH = {"mib": 16, "shared_mib": 8, "repeat_mib": 2, "zero_mib": 2, "hold": 1, "check_per_s": 16384}
RAM_MIB = 32


def sparse_bytes(path: Path) -> int:
    found = path.stat()
    return found.st_size - found.st_blocks * 512


def unharmed(*members: Member) -> None:
    for member in members:
        member.vm.go()
        member.vm.wait_passes(2)
        assert (member.vm.errors, member.vm.serial.complaints()) == (0, [])


def test_a_sparse_vm_beside_the_store_gets_its_blocks(
    settings: MakeSettings, boot: Boot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was never attached to, and takes all of its memory once the others are merged."""
    with small_tmpfs(tmp_path / "vmdedup", (RAM_MIB + 6) << 10) as shared:
        ram = shared / "ram0"
        spec = backend("file", 0, RAM_MIB, "share=on", path=ram)
        machine = ["-object", spec, "-machine", "pc,memory-backend=ram0", "-S"]
        members = boot_fleet(
            boot,
            [Backend("memfd", mib=RAM_MIB), Backend("ram", share=False, mib=RAM_MIB)],
            parameters=MUCH,
        )
        own = settings(store_dir=shared / "store", controls={"use_zero_pages": 0})
        with Machine(tmp_path, *machine, memory_mib=RAM_MIB) as sparse:
            assert sparse_bytes(ram) > 20 << 20
            with attached(own, members) as dedup:
                full = dedup.run(until_converged=True, timeout_s=40)
                assert free_bytes(shared) > sparse_bytes(ram)
                assert full.host.pages_shared > 0
                assert full.converged is False
                for row in full.vms:
                    assert row.deferred_pages
                    assert "wait for room" in (row.reason or ""), row
                    assert "RAM files beside it" in (row.reason or "")
                show_report(full, make_console())
                assert "not converged" in capsys.readouterr().out
                assert dedup.verify().ok
                checks = {each.name: each for each in host_checks(own, daemon_pid=None)}
                assert "1 RAM file on the same tmpfs" in checks["store directory"].found
                assert checks["store directory"].verdict == "note"
                touch(ram)
                assert sparse_bytes(ram) == 0
                unharmed(*members)
                resize_tmpfs(shared, (RAM_MIB + 64) << 10)
                roomy = dedup.run(until_converged=True, timeout_s=40)
                assert (roomy.converged, [row.deferred_pages for row in roomy.vms]) == (
                    True,
                    [0, 0],
                )
                assert roomy.host.pages_shared > full.host.pages_shared
                assert dedup.unmerge().store_removed
            assert sparse.process.poll() is None
        unharmed(*members)


def touch(path: Path) -> None:
    """Allocate every block of a file, as a guest that touches all of its memory."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def test_merging_what_lies_there_itself_makes_room(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """Merged pages need no block any more; blocks that were never allocated are left."""
    with small_tmpfs(tmp_path / "vmdedup", 2 * RAM_MIB << 10) as shared:
        backends = []
        for name in ("a", "b"):
            (shared / name).mkdir()
            backends.append(Backend("file", mib=24, directory=shared / name))
        members = boot_fleet(boot, backends, parameters=MUCH)
        own = settings(store_dir=shared / "store")
        with attached(own, members) as dedup:
            report = dedup.run(until_converged=True)
            assert (report.converged, [row.reason for row in report.vms]) == (True, [None, None])
            assert report.host.pages_sharing > 2000
            rams = [shared / name / "ram0" for name in ("a", "b")]
            room = promised(dedup, shared)
            merged = sum(row.merged_pages + row.zero_pages for row in report.vms) * 4096
            assert room == pytest.approx(sum(map(sparse_bytes, rams)) - merged, abs=1 << 20)
            # Nobody is attached: what the mappings alone say.
            seen = RamFiles(shared).room().promised_bytes
            assert seen == pytest.approx(room, abs=1 << 20)
            assert dedup.unmerge().store_removed
        unharmed(*members)
        for member in members:
            member.vm.close()


def promised(dedup: Deduplicator, place: Path) -> int:
    return RamFiles(place, dedup._attached().engine.vms).room().promised_bytes
