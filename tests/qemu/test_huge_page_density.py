"""Huge pages are split only where enough is saved in them: page tables and guests confirm it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.harness.huge_pages import huge_pages, huge_pages_missing
from tests.harness.kernel import PAGE_BYTES, huge_bytes
from tests.harness.skips import require
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, attached, boot_fleet, frozen, merge
from vmdedup.controls import Controls
from vmdedup.linux.pagemap import HUGE, Pagemap, has_pagemap_scan
from vmdedup.settings import Settings

pytestmark = [pytest.mark.qemu, pytest.mark.alone]

PRIVATE = Backend("ram", share=False, mib=64)
SCATTERED = {"mib": 48, "run_pages": 4, "hold": 1, "check_per_s": 8192}
"""Three quarters of each huge page could be merged."""
HUGE_BYTES = 2 << 20
BLOCK_PAGES = HUGE_BYTES // PAGE_BYTES
ONLY_2_MIB = {"enabled": "madvise", "hugepages-64kB/enabled": "never"}


@pytest.fixture
def of_density(settings: MakeSettings) -> Callable[..., Settings]:
    def make(density: int, **others: Any) -> Settings:
        return settings(controls=Controls(huge_page_density=density, **others))

    return make


@pytest.fixture
def need_huge_pages(need: Callable[[str | None], None]) -> None:
    need(huge_pages_missing(64))
    require(None if has_pagemap_scan() else "this kernel has no PAGEMAP_SCAN")


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


@pytest.mark.usefixtures("need_huge_pages")
def test_huge_pages_are_split_only_from_the_density_on(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    with huge_pages(ONLY_2_MIB):
        fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SCATTERED)
        with frozen(fleet):
            before = {member.pid: huge_blocks(member) for member in fleet}
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
                assert [vm.huge_pages for vm in report.vms] == [
                    size // HUGE_BYTES for size in kernel
                ]
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
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


@pytest.mark.usefixtures("need_huge_pages")
def test_what_a_guest_writes_stays_in_huge_pages(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    """Tracking of its writes does not split them; at density 0 it does."""
    unique = {"mib": 48, "shared_mib": 0, "repeat_mib": 0, "zero_mib": 0, "rewrite_per_s": 2000}
    left = {}
    with huge_pages(ONLY_2_MIB):
        for density in (0, BLOCK_PAGES):
            (member,) = boot_fleet(boot, [PRIVATE], prefix=f"density{density}-", parameters=unique)
            before = huge_blocks(member)
            assert len(before) > 20
            with attached(of_density(density), [member]) as dedup:
                dedup.run(passes=8)
            left[density] = len(before & huge_blocks(member)) / len(before)
            member.vm.wait_passes(1)
            assert member.vm.errors == 0
    print(f"huge pages left: {left}")
    assert left[0] < 0.5
    assert left[BLOCK_PAGES] > 0.9


@pytest.mark.usefixtures("need_huge_pages")
def test_where_memory_is_short_more_huge_pages_are_split(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    with huge_pages(ONLY_2_MIB):
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


@pytest.mark.usefixtures("need_huge_pages")
def test_where_the_kernel_does_not_tell_all_are_split_and_that_is_said(
    of_density: Callable[..., Settings], boot: Boot
) -> None:
    with huge_pages(ONLY_2_MIB):
        fleet = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=SCATTERED)
        with frozen(fleet):
            unknown = of_density(BLOCK_PAGES).model_copy(
                update={"mask": frozenset({"pagemap-scan"})}
            )
            report = merge(unknown, fleet)
    assert all("huge_page_density" in (vm.hint or "") for vm in report.vms)
    assert report.host.huge_pages is None
    assert report.host.saved_bytes > 48 << 20
    assert np.all([vm.pages_kept_in_huge == 0 for vm in report.vms])
