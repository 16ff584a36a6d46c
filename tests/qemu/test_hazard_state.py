"""Snapshots, dumps, migration and reset of merged VMs: nothing is lost, nothing is held up."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.harness.kernel import PAGE_BYTES, PageTable, becomes_true, read_memory
from tests.harness.monitor import qmp
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, boot_fleet, frozen, open_files
from tests.qemu.serving import (
    hmp,
    merged_pages,
    migrate,
    serving,
    set_capability,
    speaks,
)

pytestmark = [pytest.mark.qemu, pytest.mark.both_qemus]

BUSY = {"mib": 4, "rewrite_per_s": 64, "check_per_s": 8192}
SHARED = Backend("memfd", share=True, mib=16)
PRIVATE = Backend("ram", share=False, mib=16)
PT_LOAD = 1


def unharmed(*members: Member) -> None:
    for member in members:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0, member.vm.serial.complaints()


def restored(boot: Boot, source: Vm, incoming: str, **options: object) -> Vm:
    """A new VM that goes on where the source was."""
    return boot(
        "bare",
        ready=False,
        name="restored",
        backend=source.backends,
        parameters=source.parameters,
        extra=["-incoming", incoming],
        **options,
    )


def dumped(path: Path) -> bytes:
    """Guest-physical memory from 0 in an ELF file of dump-guest-memory."""
    raw = path.read_bytes()
    (table,) = struct.unpack_from("<Q", raw, 32)
    size, count = struct.unpack_from("<HH", raw, 54)
    memory = bytearray()
    for number in range(count):
        kind, _, offset, _, physical, length = struct.unpack_from(
            "<IIQQQQ", raw, table + number * size
        )
        if kind == PT_LOAD and physical + length <= 16 << 20:
            memory.extend(bytes(max(0, physical + length - len(memory))))
            memory[physical : physical + length] = raw[offset : offset + length]
    return bytes(memory)


def test_snapshot_dump_and_reset_of_merged_vms(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    extra = ["-drive", f"if=none,id=d0,file={disk}", "-action", "reboot=reset"]
    (first,) = boot_fleet(boot, [SHARED], parameters=BUSY, extra=extra, prefix="a-")
    extra = ["-action", "reboot=reset"]
    (second,) = boot_fleet(boot, [PRIVATE], parameters=BUSY, extra=extra, prefix="b-")
    fleet = [first, second]
    with serving(settings(), fleet) as served:
        assert served.merge() > 2000
        with frozen(fleet):
            before = [member.snapshot() for member in fleet]
            assert hmp(first.vm, "savevm s1") == ""
            for member, was in zip(fleet, before, strict=True):
                assert merged_pages(member) > 500
                assert same_memory(member, tmp_path)
                assert member.still_holds(was)
        for member in fleet:
            member.vm.wait_status(lambda now, then: now.rewrites > then.rewrites + 64)
        served.merge()
        with frozen(fleet):
            assert not first.still_holds(before[0])
            assert hmp(first.vm, "loadvm s1") == ""
            assert first.still_holds(before[0])
        unharmed(*fleet)
        assert served.merge() > 2000

        for member in fleet:
            qmp(member.vm.test_qmp_path, "system_reset")
        served.pass_once()
        for member in fleet:
            assert becomes_true(partial(has_begun_anew, member), 30)
        served.merge()
        unharmed(*fleet)
        assert served.fleet.pids() == {m.pid for m in fleet}, served.fleet.listed()


def has_begun_anew(member: Member) -> bool:
    return member.vm.serial.boots() == 2


def same_memory(member: Member, folder: Path) -> bool:
    """Whether dump-guest-memory and pmemsave write what the process's memory holds."""
    dump, saved = folder / "dump", folder / "saved"
    qmp(member.vm.test_qmp_path, "dump-guest-memory", paging=False, protocol=f"file:{dump}")
    qmp(member.vm.test_qmp_path, "pmemsave", val=1 << 20, size=8 << 20, filename=str(saved))
    (area,) = member.areas
    held = np.flatnonzero(PageTable(member.pid, area).present)
    held = held[(held >= 256) & (held < 256 + 2048)]  # beyond the firmware's holes below 1 MiB
    live = read_memory(member.pid, [area.start + page * PAGE_BYTES for page in held.tolist()])
    from_dump, from_save = dumped(dump), bytes(1 << 20) + saved.read_bytes()
    return all(
        copy[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] == content
        for copy in (from_dump, from_save)
        for page, content in zip(held.tolist(), live, strict=True)
    )


def test_migration_to_a_file_and_back(settings: MakeSettings, boot: Boot, tmp_path: Path) -> None:
    fleet = boot_fleet(boot, [SHARED, PRIVATE], parameters=BUSY)
    own = settings()
    with serving(own, fleet) as served:
        assert served.merge() > 2000
        for member in fleet:
            file = tmp_path / member.name
            migrate(member.vm, f"exec:cat > {file}")
            standing = merged_pages(member)
            assert standing > 500
            # It stands still, migrated away: let go of, and its merges left.
            served.merge(passes=1)
            assert "postmigrate" in served.refusal(member)
            assert merged_pages(member) == standing
            assert "anon_inode:[userfaultfd]" not in open_files(member.pid)
            member.vm.kill()
            speaks(vm := restored(boot, member.vm, f"exec:cat {file}"))
            vm.wait_passes(2)
            assert vm.errors == 0, vm.serial.complaints()


def test_migration_by_the_ram_file_finds_it_whole(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """x-ignore-shared: the RAM file itself is what the other QEMU goes on with."""
    folder = Path(f"/dev/shm/{tmp_path.name}-{os.getpid()}")
    folder.mkdir()
    try:
        backend = Backend("file", share=True, mib=16, directory=folder)
        (member,) = boot_fleet(boot, [backend], parameters=BUSY)
        with serving(settings(), [member]) as served:
            assert served.merge() > 500
            with frozen([member]):
                before = member.snapshot()
                set_capability(member.vm, "x-ignore-shared")
                # A pass that is under way finds out before it merges anything more.
                assert merged_pages(member) > 500
                served.pass_once()
                ((name, reason),) = served.fleet.follow_changes()
                assert name == member.name
                assert "x-ignore-shared" in reason
                assert "x-ignore-shared" in served.refusal(member)
                assert merged_pages(member) == 0
                assert member.still_holds(before)
            migrate(member.vm, f"exec:cat > {tmp_path / 'state'}")
            member.vm.kill()
            vm = restored(boot, member.vm, "defer")
            set_capability(vm, "x-ignore-shared")
            migrate(vm, f"exec:cat {tmp_path / 'state'}", "migrate-incoming")
            speaks(vm)
            vm.wait_passes(2)
            assert vm.errors == 0, vm.serial.complaints()
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("backend", [SHARED, PRIVATE], ids=["shared", "private"])
def test_background_snapshot_of_a_merged_vm(
    settings: MakeSettings, boot: Boot, tmp_path: Path, backend: Backend
) -> None:
    (member,) = boot_fleet(boot, [backend], parameters=BUSY)
    monitor = member.vm.test_qmp_path
    with serving(settings(), [member]) as served:
        assert served.merge() > 500
        assert served.fleet.engine.vms[0].scan.dirty_tracking is not None
        capability = "migrate_set_capability background-snapshot on"
        assert "not compatible with guest memory" in hmp(member.vm, capability)
        served.fleet.stop_dirty_tracking()
        assert hmp(member.vm, capability) == ""
        standing = merged_pages(member)
        served.pass_once()
        assert served.fleet.follow_changes() != []
        assert "background-snapshot" in served.refusal(member)
        migrate(member.vm, f"exec:cat > {tmp_path / 'state'}")
        assert merged_pages(member) == standing
        unharmed(member)
        set_capability(member.vm, "background-snapshot", False)
        served.take_in()
        assert served.merge() > 500
        unharmed(member)
        assert qmp(monitor, "query-status")["running"]
    member.vm.kill()
    vm = restored(boot, member.vm, f"exec:cat {tmp_path / 'state'}")
    speaks(vm)
    vm.wait_passes(2)
    assert vm.errors == 0, vm.serial.complaints()
