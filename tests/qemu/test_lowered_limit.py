"""vm.max_map_count is lowered below what merged VMs have, or were to have, of mappings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.kernel import mappings, vm_flags
from tests.harness.monitor import qmp
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, attached, boot_fleet
from vmdedup.engine import engine
from vmdedup.remap import crowding, new_memory

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("needs_root"),
]

ALTERNATE = {"mib": 8, "hold": 1, "run_pages": 1, "check_per_s": 16384}
SHARED = Backend("memfd", mib=24)
_LIMIT = Path("/proc/sys/vm/max_map_count")


def unharmed(member: Member) -> None:
    member.vm.go()
    member.vm.wait_passes(2)
    assert (member.vm.errors, member.vm.serial.complaints()) == (0, [])


@pytest.mark.parametrize(
    "backend", [SHARED, Backend("ram", share=False, mib=24)], ids=["shared", "private"]
)
def test_what_exceeds_is_unmerged_the_shortest_runs_first(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """The limit that is read is lowered for the engine alone."""
    (member,) = boot_fleet(boot, [backend], parameters={**ALTERNATE, "run_pages": 2})
    own = settings(vma_headroom=256)
    with attached(own, [member]) as dedup:
        merged = dedup.run(until_converged=True).vms[0]
        used = len(mappings(member.pid))
        before = run_lengths(member)
        (area,) = member.areas
        flags = vm_flags(member.pid, area, ours=True)
        limit = used + 100
        monkeypatch.setattr(engine, "max_map_count", lambda: limit)
        (kept,) = dedup.run(passes=2).vms
        assert len(mappings(member.pid)) <= limit - own.vma_headroom + 8
        after = run_lengths(member)
        assert 0 < kept.merged_pages < merged.merged_pages
        assert kept.reason is None or "wait for VMAs" in kept.reason
        assert kept.deferred_pages
        assert sum(after) / len(after) > sum(before) / len(before)
        # What comes home beside them is for huge pages and KSM again, they are not.
        assert vm_flags(member.pid, area, ours=True) == flags
        assert dedup.verify().ok
        standing = len(mappings(member.pid))
        (still,) = dedup.run(passes=2).vms
        assert abs(len(mappings(member.pid)) - standing) <= 8
        assert still.merged_pages == kept.merged_pages

        # Raised as the report says: all that waited is merged, without a restart.
        monkeypatch.setattr(engine, "max_map_count", lambda: still.needed_max_map_count)
        (again,) = dedup.run(until_converged=True).vms
        assert again.merged_pages > kept.merged_pages
        assert (again.deferred_pages, again.reason) == (0, None)
        unharmed(member)
        dedup.unmerge()
    unharmed(member)


def run_lengths(member: Member) -> list[int]:
    return [each.pages for each in member.mappings() if each.is_ours]


def test_where_nothing_can_be_mapped_the_row_says_what_helps(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (member,) = boot_fleet(boot, [SHARED], parameters=ALTERNATE)
    own = settings(vma_headroom=256)
    with attached(own, [member]) as dedup:
        dedup.run(until_converged=True)
        used = len(mappings(member.pid))
        monkeypatch.setattr(engine, "max_map_count", lambda: used - 10)
        (row,) = dedup.run(passes=1).vms
        assert f"vm.max_map_count={used + 256}" in (row.reason or ""), row
        assert "nothing can be mapped" in (row.reason or "")
        monkeypatch.setattr(engine, "max_map_count", lambda: used + 1000)
        assert dedup.run(passes=1).vms[0].reason is None
    unharmed(member)


def test_what_exceeds_stays_merged_while_there_is_no_memory_for_it(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then one try a pass is enough, too. On a tmpfs zero pages need memory as well."""
    backend = Backend("file", mib=24)
    (member,) = boot_fleet(boot, [backend], parameters={**ALTERNATE, "run_pages": 2})
    own = settings(vma_headroom=256)
    with attached(own, [member]) as dedup:
        dedup.run(until_converged=True)
        used, merged = len(mappings(member.pid)), run_lengths(member)
        limit = used + 100
        monkeypatch.setattr(engine, "max_map_count", lambda: limit)
        with monkeypatch.context() as patch:
            patch.setattr(new_memory, "available_bytes", lambda: 0)
            (row,) = dedup.run(passes=1).vms
            assert "0 MiB may be taken of the host" in (row.reason or ""), row
            assert "sysctl vm.max_map_count=" in (row.reason or "")
            assert run_lengths(member) == merged
        monkeypatch.setattr(crowding, "_TRIES", 1)
        for _ in range(4):
            dedup.run(passes=1)
        assert len(mappings(member.pid)) <= limit - own.vma_headroom + 16
        assert dedup.verify().ok
        dedup.unmerge()
    unharmed(member)


@contextmanager
def lowered(limit: int) -> Iterator[None]:
    before = _LIMIT.read_text()
    _LIMIT.write_text(str(limit))
    try:
        yield
    finally:
        _LIMIT.write_text(before)


@pytest.mark.alone
def test_qemu_can_still_make_threads_when_the_limit_was_lowered(
    settings: MakeSettings, boot: Boot
) -> None:
    """For the whole host, to no less than other VMs of small tests have."""
    (member,) = boot_fleet(boot, [Backend("memfd", mib=96)], parameters={**ALTERNATE, "mib": 64})
    own = settings()
    with attached(own, [member]) as dedup:
        dedup.run(until_converged=True)
        used = len(mappings(member.pid))
        assert used > 12_000
        with lowered(used + 500):
            dedup.run(passes=2)
            assert len(mappings(member.pid)) <= used + 500 - own.vma_headroom + 64
            for number in range(64):
                thread = {"qom-type": "iothread", "id": f"thread{number}"}
                qmp(member.vm.test_qmp_path, "object-add", **thread)
            assert dedup.verify().ok
            unharmed(member)
        dedup.unmerge()
    unharmed(member)
