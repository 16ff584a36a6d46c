"""What real memory cgroups and real swap leave a process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.harness.limits import MemoryGroup, memory_group_missing, swap, swap_missing
from tests.harness.skips import require
from vmdedup.procfs.cgroup import headroom

pytestmark = pytest.mark.process


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
