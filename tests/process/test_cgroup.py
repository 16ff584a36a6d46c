"""What real memory cgroups and real swap leave a process; whether one is frozen."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true
from tests.harness.limits import MemoryGroup, memory_group_missing, swap, swap_missing
from tests.harness.skips import require
from vmdedup.accounting.memory_places import Tenant, places_of
from vmdedup.linux.cgroup import headroom
from vmdedup.linux.process import Process
from vmdedup.policy.watch import halted_by

pytestmark = pytest.mark.process

FREEZER = ("freezer.state", "FROZEN", "THAWED")


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    require(memory_group_missing())
    with MemoryGroup() as group:
        yield group


@pytest.fixture
def pid(group: MemoryGroup) -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        group.add(process.pid)
        yield process.pid
        process.kill()


def test_a_limit_is_what_is_left_of_it(group: MemoryGroup, pid: int) -> None:
    group.set_limit(group.used_bytes + (64 << 20))
    found = headroom(pid)
    assert found is not None
    assert "vmdedup-test" in found.group
    assert 63 << 20 < found.left_bytes <= 64 << 20


@pytest.mark.alone
def test_swap_counts_where_the_group_may_use_it(group: MemoryGroup, pid: int) -> None:
    require(swap_missing())
    group.set_limit(group.used_bytes + (64 << 20))
    group.may_swap(True)
    assert _swap_bytes(pid) == 0
    with swap(128):
        assert 64 << 20 < _swap_bytes(pid) <= 128 << 20
        group.may_swap(False)
        assert _swap_bytes(pid) == 0


def test_every_group_above_with_a_limit_is_a_place_and_its_vms_add_up(
    group: MemoryGroup, pid: int
) -> None:
    below = group.folder / "below"
    below.mkdir()
    try:
        with subprocess.Popen(["sleep", "600"]) as second:
            (below / "cgroup.procs").write_text(str(second.pid))
            group.set_limit(group.used_bytes + (64 << 20))
            vms = [Tenant("one", pid, 1000), Tenant("two", second.pid, 234)]
            assert _needed(vms) == {"host": 1234 * 4096, str(group.folder): 1234 * 4096}
            _limit_of(below).write_text(str(32 << 20))
            assert _needed(vms) == {
                "host": 1234 * 4096,
                str(group.folder): 1234 * 4096,
                str(below): 234 * 4096,
            }
            rooms = {place.name: place.room() for place in places_of(vms)}
            assert rooms[str(below)].size == 32 << 20
            assert 31 << 20 < rooms[str(below)].available <= 32 << 20
            assert 63 << 20 < rooms[str(group.folder)].available <= 64 << 20
            assert rooms["host"].size > rooms["host"].available > 0
            second.kill()
        assert _needed(vms[1:]) == {"host": 234 * 4096}, "it has ended"
    finally:
        assert becomes_true(lambda: not (below / "cgroup.procs").read_text())
        below.rmdir()


def _needed(vms: list[Tenant]) -> dict[str, int]:
    return {place.name: place.needed_bytes for place in places_of(vms)}


def _limit_of(folder: Path) -> Path:
    unified = folder / "memory.max"
    return unified if unified.exists() else folder / "memory.limit_in_bytes"


@pytest.mark.alone
def test_swap_that_memory_and_swap_together_forbid_does_not_count(
    group: MemoryGroup, pid: int
) -> None:
    """The older version limits both together."""
    both = group.folder / "memory.memsw.limit_in_bytes"
    require(None if both.exists() else "no limit of memory and swap together here")
    require(swap_missing())
    group.may_swap(True)
    group.set_limit(64 << 20)
    both.write_text(str(80 << 20))
    with swap(128):
        (place,) = [each for each in places_of([Tenant("one", pid, 1)]) if each.group]
        assert place.room().swap == 16 << 20
    both.write_text("-1")


def _swap_bytes(pid: int) -> int:
    found = headroom(pid)
    assert found is not None
    return found.swap_bytes


def test_a_process_that_ended_has_no_limit(group: MemoryGroup) -> None:
    group.set_limit(64 << 20)
    with subprocess.Popen(["true"]) as process:
        group.add(process.pid)
    assert headroom(process.pid) is None


@pytest.fixture(params=["cgroup2", "freezer"])
def freezer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A group of our own that can be frozen, of either version, mounted where nobody expects it."""
    require(root_missing())
    kind = ["cgroup2"] if request.param == "cgroup2" else ["cgroup", "-o", "freezer"]
    mounted = subprocess.run(
        ["mount", "-t", *kind, "none", tmp_path], capture_output=True, text=True, check=False
    )
    require(f"{request.param} cannot be mounted: {mounted.stderr}" if mounted.returncode else None)
    try:
        group = tmp_path / f"vmdedup-test-{os.getpid()}" / "below"
        group.mkdir(parents=True)
        try:
            yield group
        finally:
            assert becomes_true(lambda: not (group / "cgroup.procs").read_text())
            group.rmdir()
            group.parent.rmdir()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_frozen_group_is_seen_whatever_the_version(freezer: Path) -> None:
    """Frozen by the group above its own."""
    unified = (freezer / "cgroup.events").exists()
    file, freeze, thaw = ("cgroup.freeze", "1", "0") if unified else FREEZER
    with subprocess.Popen(["sleep", "600"]) as child:
        process = Process("vm", child.pid)
        try:
            (freezer / "cgroup.procs").write_text(str(child.pid))
            assert halted_by(process, process.status()) is None
            (freezer.parent / file).write_text(freeze)
            assert becomes_true(lambda: halted_by(process, process.status()) is not None)
            halted = halted_by(process, process.status())
            assert halted is not None
            assert freezer.name in halted
            (freezer.parent / file).write_text(thaw)
            assert becomes_true(lambda: halted_by(process, process.status()) is None)
        finally:
            (freezer.parent / file).write_text(thaw)
            child.kill()
            process.close()
