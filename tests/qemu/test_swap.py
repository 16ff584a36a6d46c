"""Swap: what is swapped out stays in the account, and a store page comes back once for all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.harness.capabilities import pagemap_scan_missing, root_missing
from tests.harness.kernel import becomes_true
from tests.harness.limits import (
    MemoryGroup,
    SwapKind,
    memory_group_missing,
    swap,
    swap_missing,
)
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, attached, boot_fleet, frozen, sharing
from tests.qemu.serving import serving
from vmdedup.deduplicator import Deduplicator
from vmdedup.models import SharingReport

pytestmark = [pytest.mark.qemu, pytest.mark.alone, pytest.mark.timeout(300)]

Need = Callable[[str | None], None]

KINDS: list[SwapKind] = ["zram", "file", "zswap"]
STILL: dict[str, Any] = {"mib": 8, "hold": 1, "check_per_s": 16384}
FLEET = [
    Backend("memfd", share=True, mib=24),
    Backend("file", share=True, mib=24),
    Backend("ram", share=True, mib=24),
]


@pytest.fixture
def group(need: Need) -> Iterator[MemoryGroup]:
    """A memory cgroup for the VMs and what is published for them."""
    need(root_missing())
    need(memory_group_missing())
    with MemoryGroup() as made:
        made.may_swap(True)
        yield made


def account(report: SharingReport) -> list[tuple[int, ...]]:
    """What must not change because something is swapped out."""
    host = report.host
    rows = [
        (vm.present_bytes, vm.saved_bytes, vm.merged_pages, vm.zero_pages, vm.absent_pages or 0)
        for vm in report.vms
    ]
    return [(host.pages_shared, host.pages_sharing, host.saved_bytes), *rows]


def test_what_is_swapped_out_stays_in_the_account(
    group: MemoryGroup, settings: MakeSettings, boot: Boot, need: Need
) -> None:
    missing = {kind: swap_missing(kind) for kind in KINDS}
    kinds = [kind for kind in KINDS if missing[kind] is None]
    need(None if kinds else missing["file"])
    group.add(os.getpid())  # what is published is charged to whoever does
    members = boot_fleet(boot, FLEET, parameters=STILL)
    with attached(settings(), members) as dedup:
        group.release(os.getpid())

        def swap_out(is_done: Callable[[SharingReport], bool]) -> None:
            """Until a report says so: what is just being written stays in memory at first."""

            def reclaimed() -> bool:
                group.reclaim()
                return is_done(dedup.report())

            assert becomes_true(reclaimed, 90), dedup.report()

        with swap(kind=kinds[0]), frozen(members):
            before = account(dedup.report())
            swap_out(lambda report: all((vm.swapped_pages or 0) > 800 for vm in report.vms))
            assert account(dedup.report()) == before
        # What the end of swap has read in is in no page table: it is in the account all the same.
        assert account(dedup.report()) == before

        unharmed(members)
        group.add(os.getpid())
        dedup.run(until_converged=True, timeout_s=40)
        group.release(os.getpid())
        for kind in kinds:
            with swap(kind=kind):
                come_and_go(dedup, members, swap_out)
    need(next(filter(None, missing.values()), None))


def come_and_go(
    dedup: Deduplicator,
    members: list[Member],
    swap_out: Callable[[Callable[[SharingReport], bool]], None],
) -> None:
    """Merged VMs swapped out and in: nobody shares less for it."""
    with frozen(members):
        truth, before = sharing(members), account(dedup.report())
        swap_out(lambda report: store_swapped(report) > report.host.pages_shared * 0.9)
        assert account(dedup.report()) == before
        gone = store_swapped(dedup.report())
        checked = dedup.verify()
        assert checked.ok
        assert sum(vm.swapped_pages for vm in checked.vms) >= gone
        assert store_swapped(dedup.report()) > gone * 0.9
    unharmed(members[:1])
    alone = store_swapped(dedup.report())
    assert alone < gone / 2
    unharmed(members)
    with frozen(members):
        now = sharing(members)
        assert now.sites == truth.sites
        assert now.store_frames
        assert len(now.store_frames) <= now.pages_shared, "each came back once, for all"
        assert account(dedup.report()) == before
        swap_out(lambda report: store_swapped(report) > 0)
        checked = dedup.verify(read_swapped=True)
        assert checked.ok
        assert [vm.swapped_pages for vm in checked.vms] == [0, 0, 0]
        assert store_swapped(dedup.report()) == 0


def test_what_is_cold_goes_out_at_once_where_that_is_asked_for(
    settings: MakeSettings, boot: Boot, need: Need
) -> None:
    """On every kind of shared memory, whatever the VM's pace."""
    need(root_missing())
    need(swap_missing("zram"))
    need(pagemap_scan_missing())
    members = boot_fleet(boot, FLEET, parameters={**STILL, "check_per_s": 0})
    sums = [member.vm.sum() for member in members]
    with swap(), serving(settings(controls={"cold_after_s": 1}), members) as served:
        cold = served.fleet.engine.cold
        out = 0

        def is_out() -> bool:
            nonlocal out
            served.merge(1)
            out += cold.page_out(at_once=True).pages
            time.sleep(0.25)
            report = served.fleet.report(converged=None)
            assert report.host.cold_pages <= out
            return all(vm.cold_pages > 400 for vm in report.vms)

        assert becomes_true(is_out, 60), served.fleet.report(converged=None)
        served.fleet.let_go(members[0].name)  # attached anew, what it has out is still known
        served.take_in()
        served.merge(1)
        assert all(vm.cold_pages > 400 for vm in served.fleet.report(converged=None).vms)
        assert [member.vm.sum() for member in members] == sums
        served.merge(1)
        assert served.fleet.report(converged=None).host.cold_pages < out / 2


def store_swapped(report: SharingReport) -> int:
    return report.host.store_swapped_pages


def unharmed(members: Sequence[Member]) -> None:
    """Each guest has looked at all it holds, and found it right."""
    for member in members:
        member.vm.wait_passes(2)
        assert member.vm.errors == 0, member.vm.serial.complaints()
