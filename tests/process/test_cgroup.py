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
