"""Huge pages are split only where enough is saved in them: page tables and guests confirm it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

from tests.harness.capabilities import pagemap_scan_missing
from tests.harness.huge_pages import huge_pages, huge_pages_missing
from tests.harness.kernel import (
    PAGE_BYTES,
    PageTable,
    becomes_true,
    huge_bytes,
    read_memory,
    vm_flags,
    write_memory,
)
from tests.harness.limits import MemoryGroup, memory_group_missing
from tests.harness.monitor import qmp
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings, Need
from tests.qemu.fleet import Member, attached, boot_fleet, frozen, merge, paths
from tests.qemu.test_balloon import balloon_to
from tests.service.daemon import Directories, assert_unharmed, monitors, running
from vmdedup.controls import Controls
from vmdedup.linux.pagemap import HUGE, Pagemap
from vmdedup.settings import Settings

pytestmark = [pytest.mark.qemu, pytest.mark.alone]

PRIVATE = Backend("ram", share=False, mib=64)
SCATTERED = {"mib": 48, "run_pages": 4, "hold": 1, "check_per_s": 8192}
"""Three quarters of each huge page could be merged."""
HUGE_BYTES = 2 << 20
BLOCK_PAGES = HUGE_BYTES // PAGE_BYTES


@pytest.fixture
def of_density(settings: MakeSettings) -> Callable[..., Settings]:
    def make(density: int, **others: Any) -> Settings:
        return settings(controls=Controls(huge_page_density=density, **others))

    return make


@pytest.fixture(autouse=True)
def _huge_pages(need: Need) -> Iterator[None]:
    """QEMU gets huge pages of 2 MiB, where this host has them and tells of them."""
    need(huge_pages_missing(64))
    need(pagemap_scan_missing())
    with huge_pages({"enabled": "madvise", "hugepages-64kB/enabled": "never"}):
        yield


def huge_blocks(member: Member) -> set[int]:
    """The addresses of its RAM's huge pages now."""
    (area,) = member.areas
    with Pagemap(member.name, member.pid) as pagemap:
        found = pagemap.scan(area.start, area.end, required=HUGE)
    first = found.start // HUGE_BYTES
    blocks = [range(low, high // HUGE_BYTES) for low, high in zip(first, found.end, strict=True)]
    return {int(number) * HUGE_BYTES for numbers in blocks for number in numbers}


def merged_in(member: Member, block: int) -> int:
    """Pages of this block that are mapped to a store, or as zeroes."""
    end = block + HUGE_BYTES
    return sum(
        max(0, min(end, vma.end) - max(block, vma.start)) // PAGE_BYTES
        for vma in member.mappings()
        if vma.is_ours
    )


def test_huge_pages_are_split_only_from_the_density_on(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SCATTERED)
    with frozen(fleet):
        before = huge_in_each(fleet)
        held = [member.snapshot() for member in fleet]
        saved = []
        for density in (BLOCK_PAGES, 300, 0):
            report = merge(of_density(density), fleet)
            host = report.host
            print(
                f"density {density}: {host.saved_bytes >> 20} MiB saved, {host.huge_pages} huge"
                f" pages, {host.huge_pages_split} split, {host.pages_kept_in_huge} pages kept"
            )
            assert report.converged
            saved.append(host.saved_bytes)
            kernel = [huge_bytes(member.pid, member.areas[0]) for member in fleet]
            assert [vm.huge_pages for vm in report.vms] == [size // HUGE_BYTES for size in kernel]
            split = 0
            for member in fleet:
                now = huge_blocks(member)
                for block in before[member.pid]:
                    merged = merged_in(member, block)
                    assert (merged == 0) == (block in now)
                    assert merged == 0 or merged >= density
                    split += 0 < merged < BLOCK_PAGES
            if density == BLOCK_PAGES:
                assert split == host.huge_pages_split == 0
                assert host.pages_kept_in_huge is not None
                # Three quarters of what the workers fill.
                assert host.pages_kept_in_huge * PAGE_BYTES > 60 << 20
            if density == 0:
                assert host.pages_kept_in_huge == 0
                assert split > 40
        assert saved[0] < saved[1] <= saved[2]
        for member, snapshot in zip(fleet, held, strict=True):
            assert member.still_holds(snapshot)
    assert_unharmed(*(member.vm for member in fleet))


def test_what_a_guest_writes_stays_in_huge_pages(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    """Tracking of its writes does not split them; at density 0 it does."""
    unique = {"mib": 48, "shared_mib": 0, "repeat_mib": 0, "zero_mib": 0, "rewrite_per_s": 2000}
    left = {}
    for density in (0, BLOCK_PAGES):
        (member,) = boot_fleet(boot, [PRIVATE], prefix=f"density{density}-", parameters=unique)
        before = huge_blocks(member)
        assert len(before) > 20
        with attached(of_density(density), [member]) as dedup:
            dedup.run(passes=8)
        left[density] = len(before & huge_blocks(member)) / len(before)
        assert_unharmed(member.vm)
    print(f"huge pages left: {left}")
    assert left[0] < 0.5
    assert left[BLOCK_PAGES] > 0.9


UNIQUE = {"mib": 48, "shared_mib": 0, "repeat_mib": 0, "zero_mib": 0, "hold": 1}
_FIRST_BYTES = 8


def split_by_tracking(make: Callable[..., Settings], member: Member) -> set[int]:
    """Have huge pages split without a merge, by writes to what is tracked; returns these."""
    before = sorted(huge_blocks(member))
    with attached(make(0), [member]) as dedup:
        dedup.run(passes=3)
        same = [content[:_FIRST_BYTES] for content in read_memory(member.pid, before)]
        write_memory(member.pid, dict(zip(before, same, strict=True)))
    split = set(before) - huge_blocks(member)
    return {block for block in split if not merged_in(member, block)}


def test_what_lost_its_huge_pages_gets_them_again(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    (member,) = boot_fleet(boot, [PRIVATE], parameters=UNIQUE)
    flags = vm_flags(member.pid, member.areas[0], ours=False)
    split = split_by_tracking(of_density, member)
    assert len(split) > 10
    with attached(of_density(BLOCK_PAGES), [member]) as dedup:
        dedup.run(passes=4)
        engine = dedup._attached().engine
        assert engine.collapse(3) == 3  # no more than asked for

        def is_huge_again() -> bool:
            engine.collapse(BLOCK_PAGES)
            dedup.run(passes=1)
            return len(split & huge_blocks(member)) > 0.9 * len(split)

        assert becomes_true(is_huge_again, 40)
    assert vm_flags(member.pid, member.areas[0], ours=False) == flags
    assert_unharmed(member.vm)


UNLIKE = {"mib": 48, "zero_mib": 0, "run_pages": 4, "hold": 1, "check_per_s": 8192}
"""As SCATTERED, but no page comes back untouched."""
SPARSE = {**UNLIKE, "shared_mib": 6, "repeat_mib": 0, "zero_mib": 1}
"""Some 75 pages of each huge page could be merged."""


def huge_in_each(fleet: list[Member]) -> dict[int, set[int]]:
    """The huge pages of each VM's RAM now, by pid."""
    return {member.pid: huge_blocks(member) for member in fleet}


def merged_in_each(fleet: list[Member], blocks: dict[int, set[int]]) -> dict[tuple[int, int], int]:
    """How many pages are merged in these blocks of each VM, by pid and block."""
    return {
        (member.pid, block): merged_in(member, block)
        for member in fleet
        for block in blocks[member.pid]
    }


def wholly_there(member: Member) -> set[int]:
    """The addresses of blocks all of whose pages are in memory; a zero page may not be."""
    (area,) = member.areas
    present = PageTable(member.pid, area).present
    first = -(-area.start // HUGE_BYTES) * HUGE_BYTES
    blocks = range(first, area.end - HUGE_BYTES + 1, HUGE_BYTES)
    pages = {block: (block - area.start) // PAGE_BYTES for block in blocks}
    return {block for block, page in pages.items() if present[page : page + BLOCK_PAGES].all()}


def test_an_unmerged_vm_gets_its_huge_pages_again(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=UNLIKE)
    flags = [vm_flags(member.pid, member.areas[0], ours=False) for member in fleet]
    before = huge_in_each(fleet)
    with frozen(fleet):
        held = [member.snapshot() for member in fleet]
        merge(of_density(0), fleet)
        assert all(len(huge_blocks(member)) < len(before[member.pid]) / 4 for member in fleet)
        with attached(of_density(BLOCK_PAGES), fleet) as dedup:
            assert dedup.unmerge().store_removed
            scattered = [len(member.mappings()) for member in fleet]
            there = [wholly_there(member) for member in fleet]
            dedup._attached().rest_all()  # as the daemon does, whose unmerges last
            dedup._attached().engine.collapse(BLOCK_PAGES)
        for member, snapshot, mappings, blocks in zip(fleet, held, scattered, there, strict=True):
            found = huge_blocks(member)
            print(f"{len(found)} of {len(before[member.pid])}, {len(blocks)} are there whole")
            assert len(blocks) > 20
            assert blocks <= found
            assert len(member.mappings()) < mappings / 4
            assert member.still_holds(snapshot)
    assert [vm_flags(member.pid, member.areas[0], ours=False) for member in fleet] == flags
    assert_unharmed(*(member.vm for member in fleet))


def test_a_daemon_makes_them_huge_again_after_an_unmerge(boot: Boot) -> None:
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], prefix="daemon-", parameters=UNLIKE)
    vms = [member.vm for member in fleet]
    with Directories() as directories, running(directories, *monitors(*vms)) as daemon:
        daemon.client.merge(timeout_s=60)
        assert all(len(huge_blocks(member)) < 10 for member in fleet)
        daemon.client.set(huge_page_density=BLOCK_PAGES)
        daemon.client.unmerge()
        there = {member.pid: wholly_there(member) for member in fleet}
        assert all(len(blocks) > 20 for blocks in there.values())
        assert becomes_true(
            lambda: all(len(there[m.pid] - huge_blocks(m)) <= 1 for m in fleet), 120
        )
        assert not any(vma.is_ours for member in fleet for vma in member.mappings())
        assert_unharmed(*vms)


@pytest.mark.parametrize("density", [BLOCK_PAGES, 256])
def test_blocks_with_few_merged_pages_become_huge_again(
    of_density: Callable[..., Settings], boot: Boot, density: int
) -> None:
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], prefix=f"few{density}-", parameters=SPARSE)
    before = huge_in_each(fleet)
    with frozen(fleet):
        held = [member.snapshot() for member in fleet]
        merge(of_density(0), fleet)
        merged = merged_in_each(fleet, before)
        with attached(of_density(density), fleet) as dedup:
            dedup.run(passes=4)
            dedup._attached().engine.collapse(BLOCK_PAGES)
            # Its pages have equals still, and stay where they are: too few to split it again.
            host = dedup.run(passes=2).host
        now = huge_in_each(fleet)
        few = {each for each, pages in merged.items() if pages <= density / 4}
        back = {each for each in few if each[1] in now[each[0]]}
        print(f"density {density}: {len(few)} of {len(merged)} blocks with few, {len(back)} back")
        assert len(few) > 10
        assert len(back) > 0.9 * len(few)
        for each in merged.keys() - few:
            assert each[1] not in now[each[0]]
        after = merged_in_each(fleet, before)
        assert all(after[each] == (0 if each in back else merged[each]) for each in merged)
        assert host.pages_kept_in_huge == sum(merged[each] for each in back)
        for member, snapshot in zip(fleet, held, strict=True):
            assert member.still_holds(snapshot)
    assert_unharmed(*(member.vm for member in fleet))


def test_guests_that_write_get_their_huge_pages_again(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    """Their merged pages are written one by one, while blocks come home and after that."""
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SPARSE)
    before = huge_in_each(fleet)
    merge(of_density(0), fleet, passes=4)
    split = {member.pid: before[member.pid] - huge_blocks(member) for member in fleet}
    assert all(len(blocks) > 10 for blocks in split.values())
    with attached(of_density(BLOCK_PAGES), fleet) as dedup:
        dedup.run(passes=4)
        for member in fleet:
            member.vm.set_rewrite_rate(48)
            member.vm.go()

        def are_huge_again() -> bool:
            dedup._attached().engine.collapse(8)
            dedup.run(passes=1)
            return all(
                len(split[member.pid] & huge_blocks(member)) > 0.5 * len(split[member.pid])
                for member in fleet
            )

        assert becomes_true(are_huge_again, 60)
        assert dedup.report().host.stopped_ms == 0
    assert_unharmed(*(member.vm for member in fleet))


Hinder = Callable[[list[Member]], AbstractContextManager[None]]


@contextmanager
def in_full_groups(fleet: list[Member]) -> Iterator[None]:
    """Each VM in a memory cgroup that has less room than a huge page takes."""
    with ExitStack() as exits:
        for member in fleet:
            group = exits.enter_context(MemoryGroup())
            group.add(member.pid)
            group.set_limit(group.used_bytes + (17 << 20))
        yield


@pytest.mark.parametrize(
    ("controls", "others", "hinder"),
    [
        ({"pressure_threshold_percent": 99, "pressure_hysteresis_percent": 0}, {}, nullcontext),
        ({}, {"mask": frozenset({"userfaultfd-wp"})}, nullcontext),
        ({}, {}, in_full_groups),
    ],
    ids=["memory is short", "only in pauses", "cgroup is full"],
)
def test_merged_pages_stay_where_they_cannot_come_home(
    of_density: Callable[..., Settings],
    boot: Boot,
    need: Need,
    controls: dict[str, int],
    others: dict[str, Any],
    hinder: Hinder,
) -> None:
    need(memory_group_missing())
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SPARSE)
    before = huge_in_each(fleet)
    with frozen(fleet):
        merge(of_density(0), fleet)
        merged = merged_in_each(fleet, before)
        assert sum(0 < pages <= BLOCK_PAGES / 8 for pages in merged.values()) > 10
        hindered = of_density(BLOCK_PAGES, **controls).model_copy(update=others)
        with hinder(fleet), attached(hindered, fleet) as dedup:
            dedup.run(passes=4)
            dedup._attached().engine.collapse(BLOCK_PAGES)
            assert dedup._attached().engine.huge_page_density
        assert merged_in_each(fleet, before) == merged
        with attached(of_density(BLOCK_PAGES), fleet) as dedup:
            dedup.run(passes=4)
            dedup._attached().engine.collapse(BLOCK_PAGES)
        assert sum(merged_in_each(fleet, before).values()) < sum(merged.values()) / 2
    assert_unharmed(*(member.vm for member in fleet))


def test_what_the_kernel_refuses_is_left_alone_for_a_while(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    """Huge pages are off for these processes; a new VM and shared memory are not even tried."""
    backends = [PRIVATE, Backend("memfd", mib=64)]
    nothing = {"shared_mib": 0, "repeat_mib": 0, "zero_mib": 0}
    fleet = boot_fleet(boot, backends, parameters=UNLIKE | nothing, thp=False)
    with attached(of_density(BLOCK_PAGES), fleet) as dedup:
        engine = dedup._attached().engine

        def refused() -> dict[str, int]:
            assert engine.collapse(2 * BLOCK_PAGES) == 0
            return {vm.name: len(vm.record.collapse_refused) for vm in engine.vms}

        private, shared = (member.name for member in fleet)
        assert refused() == {private: 0, shared: 0}
        dedup.run(passes=4)
        first = refused()
        assert first[private] > 10
        assert first[shared] == 0
        assert refused() == first
    assert not any(map(huge_blocks, fleet))
    assert_unharmed(*(member.vm for member in fleet))


def test_merged_pages_stay_while_news_of_the_vm_are_not_looked_at(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SPARSE)
    before = huge_in_each(fleet)
    with frozen(fleet):
        merge(of_density(0), fleet)
        with attached(of_density(BLOCK_PAGES), fleet) as dedup:
            dedup.run(passes=4)
            merged = merged_in_each(fleet, before)
            for member in fleet:
                qmp(member.vm.test_qmp_path, "device_add", driver="virtio-rng-pci", id="new")
            dedup._attached().engine.collapse(BLOCK_PAGES)
            assert merged_in_each(fleet, before) == merged
            dedup.run(passes=1)
            dedup._attached().engine.collapse(BLOCK_PAGES)
            assert sum(merged_in_each(fleet, before).values()) < sum(merged.values()) / 2
    assert_unharmed(*(member.vm for member in fleet))


def test_what_a_balloon_may_have_taken_does_not_come_home(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    large = Backend("ram", share=False, mib=128)
    balloon = ["-device", "virtio-balloon-pci"]
    fleet = boot_fleet(boot, [large, large], guest="tiny", extra=balloon, parameters=SPARSE)
    taken, whole = fleet
    before = huge_in_each(fleet)
    merge(of_density(0), fleet, passes=4)
    balloon_to(taken, 120)
    with attached(of_density(BLOCK_PAGES), fleet) as dedup:
        dedup.run(passes=4)
        merged = merged_in_each(fleet, before)
        dedup._attached().engine.collapse(BLOCK_PAGES)
    came_home = {each for each, pages in merged_in_each(fleet, before).items() if not pages}
    came_home -= {each for each, pages in merged.items() if not pages}
    assert len(came_home) > 10
    assert {pid for pid, _ in came_home} == {whole.pid}
    assert_unharmed(*(member.vm for member in fleet))


def test_blocks_with_many_merged_pages_are_not_collapsed(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SCATTERED)
    before = huge_in_each(fleet)
    with frozen(fleet):
        merge(of_density(0), fleet)
        merged = merged_in_each(fleet, before)
        many = {each for each, pages in merged.items() if pages > BLOCK_PAGES / 4}
        assert len(many) > 40
        with attached(of_density(BLOCK_PAGES), fleet) as dedup:
            dedup.run(passes=4)
            dedup._attached().engine.collapse(BLOCK_PAGES)
        now = huge_in_each(fleet)
        after = merged_in_each(fleet, before)
        for pid, block in many:
            assert after[pid, block] == merged[pid, block]
            assert block not in now[pid]
    assert_unharmed(*(member.vm for member in fleet))


KILLED = """
import os, signal, sys
from vmdedup import Deduplicator, Settings, faults

def hook(step):
    if step == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

with Deduplicator(Settings.model_validate_json(sys.argv[1])) as dedup:
    dedup.attach(sys.argv[3:])
    dedup.run(passes=4)
    faults.hook = hook
    dedup._attached().engine.collapse(4)
"""


def assert_killed(settings: Settings, step: str, members: list[Member]) -> None:
    """Have an engine collapse blocks of these VMs and be killed at that step."""
    command = [sys.executable, "-c", KILLED, settings.model_dump_json(), step, *paths(members)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_killed_after_a_huge_page_was_made(of_density: Callable[..., Settings], boot: Boot) -> None:
    (member,) = boot_fleet(boot, [PRIVATE], parameters=UNIQUE)
    split = split_by_tracking(of_density, member)
    settings = of_density(BLOCK_PAGES)
    assert_killed(settings, "collapsed", [member])
    assert split & huge_blocks(member)
    assert_unharmed(member.vm)
    with attached(settings, [member]) as dedup:
        assert dedup.run(passes=2).vms[0].status in ("merged", "scanning")
        dedup.unmerge()


@pytest.mark.parametrize(
    "step", ["drained", "scratch-filled", "burst-launched", "launched", "came-home"]
)
def test_killed_while_blocks_come_home(
    of_density: Callable[..., Settings], boot: Boot, step: str
) -> None:
    """Each page is where it was, or moved; the next engine finishes the work."""
    mask = frozenset({"compiled-gates"}) if step == "launched" else frozenset()
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], prefix=f"{step}-", parameters=SPARSE)
    with frozen(fleet):
        held = [member.snapshot() for member in fleet]
        merge(of_density(0), fleet)
        none = huge_in_each(fleet)
        settings = of_density(BLOCK_PAGES).model_copy(update={"mask": mask})
        assert_killed(settings, step, fleet)
        assert huge_in_each(fleet) == none
        for member, snapshot in zip(fleet, held, strict=True):
            assert member.still_holds(snapshot)
    for member in fleet:
        member.vm.wait_passes(1)
    with attached(settings, fleet) as dedup:
        dedup.run(passes=4)
        dedup._attached().engine.collapse(BLOCK_PAGES)
        assert all(len(huge_blocks(member) - none[member.pid]) > 10 for member in fleet)
        assert dedup.unmerge().store_removed
    assert_unharmed(*(member.vm for member in fleet))


def test_where_memory_is_short_more_huge_pages_are_split(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SCATTERED)
    with frozen(fleet):
        kept = merge(of_density(BLOCK_PAGES), fleet).host
        # No host has as much available, so the density is half, below what can be saved.
        short = {"pressure_threshold_percent": 99, "pressure_hysteresis_percent": 0}
        host = merge(of_density(BLOCK_PAGES, **short), fleet).host
    assert kept.pages_kept_in_huge is not None
    assert kept.pages_kept_in_huge > 10_000
    assert host.pages_kept_in_huge == 0
    assert host.saved_bytes > kept.saved_bytes + (48 << 20)


def test_where_the_kernel_does_not_tell_all_are_split_and_that_is_said(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SCATTERED)
    with frozen(fleet):
        unknown = of_density(BLOCK_PAGES).model_copy(update={"mask": frozenset({"pagemap-scan"})})
        report = merge(unknown, fleet)
    assert all("huge_page_density" in (vm.hint or "") for vm in report.vms)
    assert report.host.huge_pages is None
    assert report.host.saved_bytes > 48 << 20
    assert np.all([vm.pages_kept_in_huge == 0 for vm in report.vms])
