"""A filesystem that is full: no unmerge maps a page back for which it has no block."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.limits import filled, free_bytes, limited, resize_tmpfs, small_tmpfs
from tests.harness.monitor import qmp
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, assert_nothing_of_ours, attached, boot_fleet, paths
from vmdedup import faults
from vmdedup.deduplicator import Deduplicator
from vmdedup.errors import UsageError
from vmdedup.guardian.runtime_dir import RuntimeDirectory, StopNote, read_notes
from vmdedup.linux.process import read_process_id
from vmdedup.linux.sparse_file import punch_holes
from vmdedup.linux.syscall_batch import run_calls
from vmdedup.linux.syscalls import NR
from vmdedup.vm.ram_files import is_ample

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

ZEROES = {"mib": 12, "shared_mib": 0, "repeat_mib": 0, "zero_mib": 12, "hold": 1}
CONTENT = {"mib": 12, "shared_mib": 4, "repeat_mib": 8, "zero_mib": 0, "hold": 1}
SPARE_KIB = 2 << 10


@pytest.fixture(autouse=True)
def _need_root(need: Callable[[str | None], None]) -> Iterator[None]:
    need(root_missing())
    yield
    faults.hook = None


def occupied(folder: Path) -> int:
    return (folder / "ram0").stat().st_blocks * 512


def boot_in(boot: Boot, folder: Path, parameters: dict[str, int], *, share: bool = True) -> Member:
    """A VM whose RAM file is in this folder."""
    backend = Backend("file", share, mib=24, directory=folder)
    (member,) = boot_fleet(boot, [backend], parameters=parameters)
    return member


def allocate(path: Path) -> None:
    """Give a file all its blocks.

    Of what a private mapping has read from a hole, the kernel frees clean pages when memory
    is short (mm/shmem.c: shmem_recalc_inode).
    """
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def go_on(member: Member) -> None:
    """The guest writes and checks all of its memory."""
    assert member.vm.alive
    member.vm.go()
    member.vm.wait_passes(2)
    assert (member.vm.errors, member.vm.serial.complaints()) == (0, [])


@pytest.fixture(params=[ZEROES, CONTENT], ids=["zeroes", "content"])
def parameters(request: pytest.FixtureRequest) -> dict[str, int]:
    chosen: dict[str, int] = request.param
    return {**chosen, "check_per_s": 16384}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "private"])
def test_an_unmerge_onto_a_full_tmpfs_leaves_what_finds_no_block(
    settings: MakeSettings,
    boot: Boot,
    tmp_path: Path,
    parameters: dict[str, int],
    share: bool,
) -> None:
    with small_tmpfs(tmp_path / "ram", 34 << 10) as folder:
        member = boot_in(boot, folder, parameters, share=share)
        with attached(settings(), [member]) as dedup:
            dedup.run(until_converged=True)
            merged = standing(dedup)
            assert merged > 2000
            if not share:
                allocate(folder / "ram0")
            with filled(folder):
                (kept,) = dedup.unmerge().vms
                assert member.vm.alive
                if share:
                    assert kept.remaining_pages > 0.9 * merged, kept
                    assert "MiB left" in (kept.reason or ""), kept
                    assert str(folder) in (kept.reason or "")
                    assert standing(dedup) == kept.remaining_pages
                    assert dedup.verify().ok
                else:
                    assert kept.remaining_pages == 0, kept
                go_on(member)
                assert [row.status for row in dedup.report().vms] == [
                    "merged" if share else "scanning"
                ]
            assert dedup.unmerge().vms[0].remaining_pages == 0
        with filled(folder):
            go_on(member)
            assert_nothing_of_ours(member)
        member.vm.close()


def test_behind_private_pages_blocks_that_the_kernel_freed_are_not_counted_on(
    settings: MakeSettings, boot: Boot, tmp_path: Path, parameters: dict[str, int]
) -> None:
    with small_tmpfs(tmp_path / "ram", 34 << 10) as folder:
        member = boot_in(boot, folder, parameters, share=False)
        (area,) = member.areas
        with attached(settings(), [member]) as dedup:
            dedup.run(until_converged=True)
            merged = standing(dedup)
            ours = [vma for vma in member.mappings() if vma.is_ours]
            with (folder / "ram0").open("r+b") as file:
                holes = [(vma.start - area.start, vma.end - vma.start) for vma in ours]
                start, length = np.array(holes).T
                punch_holes(file.fileno(), start, length)
            with filled(folder):
                (kept,) = dedup.unmerge().vms
                assert kept.remaining_pages == merged
                assert "MiB left" in (kept.reason or ""), kept
                assert dedup.verify().ok
                go_on(member)
            assert dedup.unmerge().vms[0].remaining_pages == 0
        assert_nothing_of_ours(member)
        go_on(member)
        member.vm.close()


def standing(dedup: Deduplicator) -> int:
    (row,) = dedup.report().vms
    return row.merged_pages + row.zero_pages + row.cow_broken_pages


def test_an_unmerge_takes_the_blocks_that_there_are_and_keeps_none_in_vain(
    settings: MakeSettings, boot: Boot, tmp_path: Path, parameters: dict[str, int]
) -> None:
    with small_tmpfs(tmp_path / "ram", 34 << 10) as folder:
        member = boot_in(boot, folder, parameters)
        with attached(settings(), [member]) as dedup:
            dedup.run(until_converged=True)
            before = occupied(folder)
            resize_tmpfs(folder, (before >> 10) + SPARE_KIB)
            (kept,) = dedup.unmerge().vms
            assert kept.remaining_pages > 0
            came_home = (occupied(folder) - before) // 4096
            assert kept.restored_pages == came_home
            assert came_home > 0.7 * (SPARE_KIB >> 2)
            assert free_bytes(folder) > 0  # for pages that the guest has never touched
            go_on(member)
            resize_tmpfs(folder, 34 << 10)
            assert dedup.unmerge().vms[0].remaining_pages == 0
        assert_nothing_of_ours(member)
        go_on(member)
        member.vm.close()


def test_an_unmerge_takes_the_last_blocks_where_nobody_else_needs_any(
    settings: MakeSettings, boot: Boot, tmp_path: Path, parameters: dict[str, int]
) -> None:
    """All other blocks of the RAM file are there, so that no reserve has to be left."""
    with small_tmpfs(tmp_path / "ram", 34 << 10) as folder:
        member = boot_in(boot, folder, parameters)
        allocate(folder / "ram0")
        with attached(settings(), [member]) as dedup:
            dedup.run(until_converged=True)
            wanted_bytes = standing(dedup) * 4096
            resize_tmpfs(folder, (occupied(folder) + wanted_bytes >> 10) + 256)
            assert not is_ample(folder, wanted_bytes)
            assert dedup.unmerge().vms[0].remaining_pages == 0
        assert_nothing_of_ours(member)
        go_on(member)
        member.vm.close()


def test_blocks_that_a_killed_unmerge_left_are_freed(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """They have no content, by which a seek would find them."""

    class KilledError(Exception):
        pass

    def killed(step: str) -> None:
        if step == "blocks-allocated":
            raise KilledError

    with small_tmpfs(tmp_path / "ram", 34 << 10) as folder:
        member = boot_in(boot, folder, ZEROES)
        with attached(settings(), [member]) as dedup:
            dedup.run(until_converged=True)
            merged = occupied(folder)
            faults.hook = killed
            with pytest.raises(KilledError):
                dedup.unmerge()
            faults.hook = None
        assert occupied(folder) > merged + (1 << 20)
        with attached(settings(), [member]) as dedup:
            assert occupied(folder) <= merged
            assert dedup.unmerge().vms[0].remaining_pages == 0
        go_on(member)
        member.vm.close()


def test_a_full_runtime_directory_is_told_and_pauses_nobody(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    (member,) = boot_fleet(boot, [Backend("memfd", mib=24)], parameters=CONTENT)
    with small_tmpfs(tmp_path / "run", 64) as folder:
        own = settings(runtime_dir=folder, mask=frozenset({"userfaultfd-wp"}))
        with filled(folder), pytest.raises(UsageError, match=rf"{folder}: No space left"):
            Deduplicator(own).attach(paths([member]))
        with attached(own, [member]) as dedup:
            with filled(folder):
                (row,) = dedup.run(passes=2).vms
                assert row.status == "failed"
                assert f"{folder}: No space left" in (row.reason or "")
                assert row.stops == 0
                go_on(member)
            assert list(folder.glob("stopped-*")) == []
            (row,) = dedup.run(passes=2).vms
            assert (row.status, row.reason) == ("merged", None)
            dedup.unmerge()
    go_on(member)
    assert_nothing_of_ours(member)


def test_a_damaged_note_holds_no_vm_up(settings: MakeSettings, boot: Boot) -> None:
    """Its name tells whom to resume."""
    own = settings()
    (member,) = boot_fleet(boot, [Backend("memfd", mib=24)], parameters=CONTENT)
    own.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    note = own.runtime_dir / f"stopped-{member.pid}-{read_process_id(member.pid).start_ticks}.json"
    note.write_text('{"vm": ')
    qmp(member.vm.test_qmp_path, "stop")
    with attached(own, [member]) as dedup:
        assert not note.exists()
        assert member.run_state() == "running"
        assert dedup.run(passes=2).vms[0].status == "merged"
        dedup.unmerge()
    go_on(member)


def test_a_vm_is_given_up_where_there_is_no_room_for_a_second_note(tmp_path: Path) -> None:
    note = StopNote("vm", 4_194_303, 1 << 40, "/run/vm.qmp", 4_194_303, os.getpid(), 1)
    with small_tmpfs(tmp_path / "run", 64) as folder:
        runtime = RuntimeDirectory(folder)
        file = runtime.write_note(note)
        with filled(folder):
            runtime.give_up(note)
        assert read_notes(folder) == [(file, replace(note, engine_pid=0, engine_start_ticks=0))]
        runtime.close()


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_an_unmerge_beyond_our_file_size_limit_is_told(
    settings: MakeSettings, boot: Boot, kind: Literal["memfd", "file"]
) -> None:
    """On a tmpfs when it allocates blocks, else when it writes."""
    (member,) = boot_fleet(boot, [Backend(kind, mib=24)], parameters=CONTENT)
    with attached(settings(), [member]) as dedup:
        dedup.run(until_converged=True)
        with limited(os.getpid(), resource.RLIMIT_FSIZE, 1 << 20):
            (kept,) = dedup.unmerge().vms
        assert kept.remaining_pages > 1500
        assert "ulimit -f" in (kept.reason or ""), kept
        go_on(member)
        assert dedup.unmerge().vms[0].remaining_pages == 0
    go_on(member)


def test_a_filesystem_that_knows_no_allocation_is_made_to_write(
    settings: MakeSettings, boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def without_fallocate(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        if rows[0, 0] == NR.FALLOCATE:
            return np.full(len(rows), -errno.EOPNOTSUPP)
        return run_calls(rows)

    monkeypatch.setattr("vmdedup.remap.unmerge.run_calls", without_fallocate)
    monkeypatch.setattr("vmdedup.remap.unmerge._sync", synced.append)
    with small_tmpfs(tmp_path / "ram", 34 << 10) as folder:
        member = boot_in(boot, folder, ZEROES)
        with attached(settings(), [member]) as dedup:
            dedup.run(until_converged=True)
            assert dedup.unmerge().vms[0].remaining_pages == 0
        assert synced
        go_on(member)
        member.vm.close()
