"""Merging on real VMs: what is saved is right, real, and unnoticed by the guests."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.capabilities import kvm_missing
from tests.harness.kernel import (
    PAGE_BYTES,
    Area,
    PageTable,
    Sharing,
    anonymous_bytes,
    becomes_true,
    free_bytes,
    huge_bytes,
    inside,
    most_saved_pages,
    ram_areas,
    read_memory,
    stranded_pages,
    write_memory,
)
from tests.harness.monitor import qmp
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import (
    EVERY_BACKEND,
    Member,
    absent_pages,
    assert_nothing_of_ours,
    assert_report_is_true,
    attached,
    boot_fleet,
    fill_absent,
    frozen,
    merge,
    paths,
    punch,
    ram_file,
    sharing,
)
from vmdedup import faults
from vmdedup.core.rmap import KNOWN
from vmdedup.deduplicator import Deduplicator
from vmdedup.inject.threads import current_call, find_idle_thread
from vmdedup.linux.syscalls import NR
from vmdedup.vm.page_scan import PageScan

pytestmark = pytest.mark.qemu

RECVMSG = 47

BUSY = {"mib": 4, "rewrite_per_s": 512, "check_per_s": 8192}
QUICK = {"mib": 4, "check_per_s": 8192}
HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
"""Checked twice a second from end to end."""


def saved_share(truth: Sharing, bound: int) -> float:
    print(f"saved {truth.saved_pages} of at most {bound} pages")
    return truth.saved_pages / bound


@pytest.mark.both_qemus
def test_every_backend_merges_while_guests_write(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters=BUSY)
    report = merge(settings(), fleet, passes=6)
    print(report.host)
    assert [vm.status for vm in report.vms] == ["merged"] * len(fleet)
    assert (report.host.stopped_ms, sum(vm.stops or 0 for vm in report.vms)) == (0, 0)
    assert report.host.gate_ms.count > 0
    assert report.host.drain_ms.count >= len(fleet)
    for member in fleet:
        member.vm.wait_passes(2)
        assert member.vm.errors == 0
    with frozen(fleet):
        truth = assert_report_is_true(merge(settings(), fleet, passes=1), fleet)
    shared, repeated, zeroes = 256, 256, 256
    for member in fleet:
        assert truth.sites[member.name].total() > (shared + repeated) // 2
        assert truth.zero_pages[member.name] > zeroes // 2
        assert len(truth.store_frames) <= truth.pages_shared


def test_what_was_only_planned_is_merged_all_the_same(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, [Backend(mib=16), Backend(mib=16)], parameters=HELD)
    with frozen(fleet), attached(settings(), fleet) as dedup:
        planned = dedup.plan()
        report = dedup.run(until_converged=True)
        assert report.converged
        assert report.host.saved_bytes >= 0.99 * planned.saved_bytes > 0


def test_sums_and_contents_survive(settings: MakeSettings, boot: Boot) -> None:
    """Frozen RAM: each content stays, and what is saved is nearly all that can be."""
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters=HELD)
    sums = [member.vm.sum() for member in fleet]
    with frozen(fleet):
        before = [member.snapshot() for member in fleet]
        report = merge(settings(), fleet)
        assert report.converged
        truth = assert_report_is_true(report, fleet)
        assert saved_share(truth, most_saved_pages(before)) >= 0.99
        assert truth.saved_pages <= most_saved_pages(before)
        for member, was in zip(fleet, before, strict=True):
            assert member.still_holds(was), member.name
            assert member.run_state() == "paused"
    assert [member.vm.sum() for member in fleet] == sums
    for member in fleet:
        member.vm.go()
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


@pytest.mark.alone
def test_linux_guests_free_memory(settings: MakeSettings, boot: Boot) -> None:
    """Huge pages on the private backends: the host's free memory really grows."""
    backends = [Backend("ram", share=False), Backend("memfd", share=False), Backend("file")]
    own = settings()
    fleet = boot_fleet(boot, backends, guest="tiny", parameters={"check_per_s": 8192})
    assert huge_bytes(fleet[0].pid, fleet[0].areas[0]) > 32 << 20
    with frozen(fleet):
        before = [member.snapshot() for member in fleet]
        free_before = free_bytes()
        report = merge(own, fleet)
        assert report.converged
        truth = assert_report_is_true(report, fleet)
        saved = report.host.saved_bytes
        print(
            report.host,
            f"saved {saved >> 20} MiB, MemFree +{(free_bytes() - free_before) >> 20} MiB",
        )
        assert saved_share(truth, most_saved_pages(before)) >= 0.99
        assert saved > 100 << 20
        # What all other processes of the host do meanwhile is in this one too.
        assert becomes_true(lambda: free_bytes() - free_before > 0.4 * saved, within_s=30)
        stores = own.store_dir.glob("*.store")
        assert sum(file.stat().st_blocks * 512 for file in stores) == truth.pages_shared * 4096
        assert stranded_pages(fleet[0].pid, fleet[0].areas[0]) < 512
        for member, was in zip(fleet, before, strict=True):
            assert member.still_holds(was), member.name
            assert_freed(member, was.held[0])
    for member in fleet:
        member.vm.wait_passes(2)
        assert member.vm.errors == 0


def assert_freed(member: Member, held: Any) -> None:
    """The VM's own memory is what it still maps of its own, on its backend."""
    area = member.areas[0]
    table = PageTable(member.pid, area)
    merged = np.zeros(area.pages, dtype=np.bool_)
    for mapping in inside(member.pid, area):
        first = (mapping.start - area.start) // PAGE_BYTES
        merged[first : first + (mapping.end - mapping.start) // PAGE_BYTES] = mapping.is_ours
    assert not (table.anonymous & merged).any()  # frozen: nothing was broken
    if area.is_shared:
        (path,) = {m.path for m in inside(member.pid, area) if not m.is_ours}
        blocks = member.vm.directories.ram.joinpath("ram0").stat().st_blocks * 512
        assert path.endswith("ram0")
        assert blocks == np.count_nonzero(held & ~merged) * PAGE_BYTES
    else:
        assert anonymous_bytes(member.pid, area) == np.count_nonzero(held & ~merged) * PAGE_BYTES


def test_bare_guests_under_kvm(
    settings: MakeSettings, boot: Boot, need: Callable[[str | None], None]
) -> None:
    need(kvm_missing())
    # Where KVM emulates the guest's instructions, a few dozen pages a second are checked.
    backends = [Backend(mib=16), Backend("ram", share=False, mib=16)]
    fleet = boot_fleet(boot, backends, accel="kvm", parameters={"mib": 1, "check_per_s": 2048})
    report = merge(settings(), fleet, passes=3)
    print(report.host)
    assert report.host.stopped_ms == 0
    for member in fleet:
        member.vm.wait_checks(64)
        assert member.vm.errors == 0
    with frozen(fleet):
        before = [member.snapshot() for member in fleet]
        truth = assert_report_is_true(merge(settings(), fleet), fleet)
        assert saved_share(truth, most_saved_pages(before)) >= 0.99
        assert all(map(Member.still_holds, fleet, before))
    for member in fleet:
        member.vm.wait_checks(256)
    with Deduplicator(settings()) as dedup:
        dedup.attach(paths(fleet))
        assert dedup.unmerge().store_removed
    for member in fleet:
        member.vm.wait_checks(256)
    assert [member.vm.errors for member in fleet] == [0] * len(fleet)


def test_several_backends_and_one_not_to_be_touched(settings: MakeSettings, boot: Boot) -> None:
    three = [
        Backend("memfd", mib=64),
        Backend("ram", share=False, mib=32),
        Backend("memfd", mib=48, merge=False),
    ]
    (member,) = boot_fleet(boot, [three], guest="tiny", parameters={"mib": 48}, thp=False)
    untouched = member.areas.pop()
    mapped = inside(member.pid, untouched)
    with Deduplicator(settings()) as dedup:
        (listed,) = dedup.attach(paths([member])).vms
        report = dedup.run(until_converged=True)
    reasons = {row.id: row.reason for row in listed.backends}
    assert reasons == {"ram0": None, "ram1": None, "ram2": "merge=off"}
    assert report.vms[0].ram_bytes == 96 << 20
    assert inside(member.pid, untouched) == mapped
    for area in member.areas:
        assert any(m.is_store for m in inside(member.pid, area))
    member.vm.wait_passes(1)
    assert member.vm.errors == 0


@pytest.mark.both_qemus
def test_hot_plugged_memory(settings: MakeSettings, boot: Boot) -> None:
    (member,) = boot_fleet(boot, [Backend(mib=16)], extra=["-m", "16M,slots=1,maxmem=256M"])
    monitor = member.vm.test_qmp_path
    backend = {"qom-type": "memory-backend-memfd", "id": "more", "size": 32 << 20, "merge": True}
    qmp(monitor, "object-add", **backend)
    qmp(monitor, "device_add", driver="pc-dimm", id="dimm0", memdev="more")
    (dimm,) = ram_areas(member.pid, [32])
    content = bytes(range(256)) * 16
    write_memory(member.pid, {dimm.start + number * 8192: content for number in range(64)})
    member.areas.append(dimm)
    merge(settings(), [member])
    truth = sharing([member])
    pages = [m for m in inside(member.pid, dimm) if m.is_store]
    assert len(pages) == 64
    assert len({m.offset for m in pages}) == 1
    assert max(truth.sites[member.name].values()) == 64


def test_pages_that_change_at_the_last_moment_stay_as_they_are(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other page is written between the look and the gate: runs fall to pieces."""
    (member,) = boot_fleet(boot, [Backend("memfd", mib=48)], parameters=HELD)
    area = member.areas[0]
    with frozen([member]):
        addresses = fill_absent(member.pid, area, 4096, bytes(PAGE_BYTES))
        written = {
            address: number.to_bytes(8, "little") * 512
            for number, address in enumerate(addresses[::2], start=1 << 40)
        }
        todo = [written]

        def change(step: str) -> None:
            if step == "registered" and todo:
                write_memory(member.pid, todo.pop())

        monkeypatch.setattr(faults, "hook", change)
        report = merge(settings(), [member], passes=1)
        assert not todo
        assert [vm.status for vm in report.vms] != ["gone"]
        assert_report_is_true(report, [member])
        assert read_memory(member.pid, list(written)) == list(written.values())
        report = merge(settings(), [member], passes=1)
        zero_page = [m for m in inside(member.pid, area) if m.path == "/dev/zero"]
        for address in addresses[1::2]:
            assert any(m.start <= address < m.end for m in zero_page)
        assert read_memory(member.pid, list(written)) == list(written.values())
    member.vm.wait_passes(1)
    assert member.vm.errors == 0


@pytest.mark.parametrize("share", [False, True], ids=["private", "shared"])
def test_what_is_written_after_it_was_published(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    """It was copied from there, and so is not compared: the gate finds that it has changed."""
    backend = Backend("memfd", share=share, mib=48)
    fleet = member, _ = boot_fleet(boot, [backend, backend], parameters=HELD)
    with attached(settings(), fleet) as dedup:
        written: list[int] = []

        def let_write(step: str) -> None:
            if step == "published" and not written:
                member.vm.go()
                member.vm.set_rewrite_rate(20_000)
                now = member.vm.wait_status(lambda now, then: now.rewrites > then.rewrites + 2_000)
                member.vm.hold()
                written.append(now.rewrites)

        monkeypatch.setattr(faults, "hook", let_write)
        report = dedup.run(passes=1)
        assert written
        assert report.host.pages_sharing > 0
    member.vm.go()
    member.vm.wait_passes(2)
    assert member.vm.errors == 0


@contextmanager
def frames_kept(pid: int, area: Area, addresses: Sequence[int]) -> Iterator[None]:
    """A pipe holds the frames of these pages of a RAM file, so that nobody else gets them.

    A page that gets the same frame again, right after it was freed, looks as if it had kept it.
    """
    read_end, write_end = os.pipe()
    try:
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, len(addresses) * PAGE_BYTES)
        for address in addresses:
            with ram_file(pid, area, address) as (fd, offset):
                assert os.splice(fd, write_end, PAGE_BYTES, offset_src=offset) == PAGE_BYTES
        yield
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("moment", ["published", "compared"])
def test_what_is_discarded_after_it_was_read_is_not_merged(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A hole in the RAM file that is touched again is protected as before, and zero."""
    (member,) = boot_fleet(boot, [Backend("memfd", mib=48)], parameters=HELD)
    area = member.areas[0]
    with frozen([member]):
        addresses = fill_absent(member.pid, area, 256, b"\xa5" * PAGE_BYTES)
        discarded = addresses[::2]
        seen: list[bytes] = []

        def discard(step: str) -> None:
            if step == moment and not seen:
                for address in discarded:
                    punch(member.pid, area, address)
                seen.extend(read_memory(member.pid, discarded))

        monkeypatch.setattr(faults, "hook", discard)
        with frames_kept(member.pid, area, discarded):
            # What is left of a run that fell apart has mappings in the next pass.
            merge(settings(), [member], passes=3)
        zeroes = [bytes(PAGE_BYTES)] * len(discarded)
        assert seen == zeroes
        assert read_memory(member.pid, discarded) == zeroes
        merged = [m for m in inside(member.pid, area) if m.is_store]
        assert all(any(m.start <= each < m.end for m in merged) for each in addresses[1::2])
    member.vm.wait_passes(1)
    assert member.vm.errors == 0


def test_what_is_discarded_before_the_first_look_stays_away(
    settings: MakeSettings, boot: Boot
) -> None:
    """The first look goes by what was read at attaching, some seconds ago."""
    (member,) = boot_fleet(boot, [Backend("memfd", mib=48)], parameters=HELD)
    area = member.areas[0]
    with frozen([member]):
        addresses = fill_absent(member.pid, area, 64, b"\xa5" * PAGE_BYTES)
        with attached(settings(), [member]) as dedup:
            for address in addresses[::2]:
                punch(member.pid, area, address)
            time.sleep(2)
            assert dedup.run(passes=1).host.pages_sharing > 0
            assert set(addresses[::2]) <= set(absent_pages(member.pid, area, area.pages))
            moved = [m for m in inside(member.pid, area) if m.is_ours]
            assert not any(m.start <= each < m.end for m in moved for each in addresses[::2])
            assert all(any(m.start <= each < m.end for m in moved) for each in addresses[1::2])
    member.vm.wait_passes(1)
    assert member.vm.errors == 0


def test_what_has_changed_since_the_only_look_before_a_merge_stays(
    settings: MakeSettings, boot: Boot
) -> None:
    """Where a first merge is awaited: what it became is nothing to share, nor what it was."""
    backend = Backend("memfd", mib=48)
    fleet = boot_fleet(boot, [backend, backend], parameters=HELD)
    with frozen(fleet), attached(settings(), fleet) as dedup:
        engine = dedup._attached().engine
        # With gaps: what is left of a run that falls to pieces waits for the next pass.
        filled = [absent_pages(member.pid, member.areas[0], 128)[::2] for member in fleet]
        contents = [number.to_bytes(8, "little") * 512 for number in range(1 << 40, (1 << 40) + 64)]
        for member, addresses in zip(fleet, filled, strict=True):
            write_memory(member.pid, dict(zip(addresses, contents, strict=True)))
        engine.begin_pass(everywhere=True)
        engine.looks.look_some(1 << 20)
        assert engine.looks.compares_next
        assert [vm.scan.dirty_tracking for vm in engine.vms] == [None, None]
        written = {each: content[::-1] for each, content in zip(filled[0], contents, strict=True)}
        written = {each: written[each] for each in filled[0][::2]}
        write_memory(fleet[0].pid, written)
        assert engine.finish_pass().merged_pages > 64
        assert not engine.looks.compares_next
        for member, addresses in zip(fleet, filled, strict=True):
            stores = [m for m in inside(member.pid, member.areas[0]) if m.is_store]
            merged = [any(m.start <= each < m.end for m in stores) for each in addresses]
            assert merged == [False, True] * 32
        assert read_memory(fleet[0].pid, list(written)) == list(written.values())
        assert read_memory(fleet[1].pid, filled[1]) == contents
        assert dedup.verify().ok
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_the_thread_that_is_kept_between_gates_is_not_kept_for_long(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever we do there: a page may have to come from a slow swap to be compared."""
    (member,) = boot_fleet(boot, [Backend("ram", share=False, mib=48)], parameters=QUICK)
    thread = find_idle_thread(member.pid, list).tid
    waits: list[bool] = []

    def dawdle(step: str) -> None:
        if step == "held" and current_call(member.pid, thread) == RECVMSG:
            waits.append(becomes_true(lambda: current_call(member.pid, thread) == NR.FUTEX))

    monkeypatch.setattr(faults, "hook", dawdle)
    report = merge(settings(gate_runs=8, mask=frozenset({"compiled-gates"})), [member])
    assert waits
    assert all(waits)
    assert report.host.stopped_ms == 0
    member.vm.wait_passes(1)
    assert member.vm.errors == 0


def test_neighbours_of_one_content_share_mappings(settings: MakeSettings, boot: Boot) -> None:
    """Also those that come later, with what the store has by then."""
    backends = [Backend("memfd", mib=48), Backend("ram", share=False, mib=48)]
    members = boot_fleet(boot, backends, parameters=HELD)
    with frozen(members), attached(settings(), members) as dedup:
        for count in (1024, 512):
            filled = [fill_absent(m.pid, m.areas[0], count, b"\xcc" * PAGE_BYTES) for m in members]
            before = [member.snapshot() for member in members]
            report = dedup.run(passes=3)
            assert_report_is_true(report, members)
            for member, addresses in zip(members, filled, strict=True):
                span = range(addresses[0], addresses[-1])
                pieces = [m for m in inside(member.pid, member.areas[0]) if m.start in span]
                assert all("vmdedup" in piece.path for piece in pieces)
                assert len(pieces) <= count // 8
            assert 0 < report.host.stable_node_dups <= 2 * 64
            assert dedup.verify().ok
            assert all(map(Member.still_holds, members, before))
        assert dedup.unmerge().store_removed
        assert all(map(Member.still_holds, members, before))
    for member in members:
        assert_nothing_of_ours(member)


def test_broken_pages_are_counted_and_merge_again(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, [Backend(mib=16), Backend("ram", share=False, mib=16)])
    with attached(settings(), fleet) as dedup:
        first = dedup.run(until_converged=True)
        for member in fleet:
            member.vm.wait_status(lambda now, then: now.rewrites > then.rewrites + 100)
            member.vm.hold()
        with frozen(fleet):
            broken = assert_report_is_true(dedup.report(), fleet)
            assert min(broken.broken_pages.values()) > 10
            before = [member.snapshot() for member in fleet]
            again = dedup.run(until_converged=True)
            truth = assert_report_is_true(again, fleet)
            assert all(map(Member.still_holds, fleet, before))
            assert sum(truth.broken_pages.values()) < sum(broken.broken_pages.values())
            assert saved_share(truth, most_saved_pages(before)) >= 0.99
            assert again.host.pages_scanned is not None
        assert again.host.pages_scanned > (first.host.pages_scanned or 0)
    assert [member.vm.errors for member in fleet] == [0, 0]


def test_a_page_broken_by_writing_the_same_shares_its_page_again(
    settings: MakeSettings, boot: Boot
) -> None:
    (member,) = boot_fleet(boot, [Backend("file", mib=16)], parameters=HELD)
    with frozen([member]), attached(settings(), [member]) as dedup:
        dedup.run(until_converged=True)
        merged = [m for m in member.mappings() if m.is_store or m.path == "/dev/zero"]
        addresses = [m.start for m in merged]
        write_memory(
            member.pid, dict(zip(addresses, read_memory(member.pid, addresses), strict=True))
        )
        report = dedup.report()
        assert report.host.cow_broken_pages == len(addresses)
        assert assert_report_is_true(dedup.run(passes=9), [member]).broken_pages == {member.name: 0}
        assert [m for m in member.mappings() if m.is_store or m.path == "/dev/zero"] == merged


def test_scanning_takes_no_memory(settings: MakeSettings, boot: Boot) -> None:
    fleet = boot_fleet(boot, EVERY_BACKEND, parameters=HELD)
    with frozen(fleet):
        tables = [PageTable(m.pid, m.areas[0]).present for m in fleet]
        resident = [rss_pages(m.pid) for m in fleet]
        assert all(not table.all() for table in tables)
        with Deduplicator(settings()) as dedup:
            dedup.attach(paths(fleet), merging=False)
            plan = dedup.plan()
            dedup.explain(fleet[0].name)
            dedup.report()
        assert plan.saved_bytes > 0
        for member, table, pages in zip(fleet, tables, resident, strict=True):
            assert (PageTable(member.pid, member.areas[0]).present == table).all()
            assert abs(rss_pages(member.pid) - pages) < 256
            assert [m for m in member.mappings() if m.is_ours] == []
        before = [member.snapshot() for member in fleet]
        merge(settings(), fleet)
        for member, was in zip(fleet, before, strict=True):
            absent = ~was.held[0]
            now = PageTable(member.pid, member.areas[0])
            assert not (now.anonymous & absent).any()
            assert all(map(Member.still_holds, fleet, before))


def rss_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def test_digests_of_a_store_that_went_are_forgotten(settings: MakeSettings, boot: Boot) -> None:
    """As when the one VM that stood on it was unmerged: the next store has another seed."""
    fleet = boot_fleet(boot, EVERY_BACKEND[:2], parameters={"mib": 2, "hold": 1})
    with attached(settings(), fleet) as dedup:
        dedup.run(passes=1)
        engine = dedup._attached().engine
        vm = engine.vms[1]
        known = np.count_nonzero(vm.scan.columns.flags & KNOWN)
        assert known > 0
        vm.use_seed(engine.stores.of("uid:0").seed)
        assert np.count_nonzero(vm.scan.columns.flags & KNOWN) == known
        dedup.unmerge([fleet[0].name])
        vm.use_seed(1)
        assert not vm.scan.columns.flags.any()
        report = dedup.run(passes=2)
        assert [row.merged_pages > 0 for row in report.vms] == [True, True]
        assert dedup.verify().ok
        dedup.unmerge()


def test_what_is_left_of_a_round_at_leisure_is_hurried_once_somebody_waits(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both VMs at a time, each on a thread of its own, from the next slice on."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    fleet = boot_fleet(boot, [Backend(mib=16), Backend(mib=16)], parameters=QUICK)
    looked: list[tuple[str, str]] = []
    look = PageScan.look

    def noted(scan: PageScan, *arguments: Any, **options: Any) -> None:
        looked.append((scan.vm.name, threading.current_thread().name))
        time.sleep(0.1)  # the other thread begins meanwhile
        look(scan, *arguments, **options)

    with attached(settings(workers=2), fleet) as dedup:
        engine = dedup._attached().engine
        monkeypatch.setattr(PageScan, "look", noted)
        engine.served.is_foreground = lambda: False
        engine.begin_pass(everywhere=False)
        first = engine.looks.look_some(100)
        assert first == 100
        (at_leisure,) = looked
        engine.served.is_foreground = lambda: True
        engine.looks.look_some(1 << 18)
        assert engine.looks.is_done
    hurried = looked[1:]
    assert at_leisure[1] == threading.current_thread().name
    assert {name for name, _ in hurried} == {vm.vm.name for vm in fleet}
    assert len({thread for _, thread in hurried}) == 2
    assert at_leisure[1] not in {thread for _, thread in hurried}


def test_a_round_leaves_alone_what_was_unmerged_meanwhile(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is looked at as if for the first time once that is asked for."""
    fleet = boot_fleet(boot, [Backend(mib=16), Backend(mib=16)], parameters=QUICK)
    looked: list[str] = []
    look = PageScan.look

    def noted(scan: PageScan, *arguments: Any, **options: Any) -> None:
        looked.append(scan.vm.name)
        look(scan, *arguments, **options)

    with attached(settings(workers=1), fleet) as dedup:
        attached_fleet = dedup._attached()
        engine = attached_fleet.engine
        monkeypatch.setattr(PageScan, "look", noted)
        engine.begin_pass(everywhere=True)
        engine.looks.look_some(10)
        (first,) = looked
        resting = next(vm for vm in engine.vms if vm.name == first)
        attached_fleet.rest({resting.pid})
        assert resting.scan.dirty_tracking is None
        while not engine.looks.is_done:
            engine.looks.look_some(1 << 18)
        assert first not in looked[1:]
        attached_fleet.wake({resting.pid})
        merged = dedup.run(passes=3)
        assert all(row.merged_pages for row in merged.vms)
        assert dedup.verify().ok
