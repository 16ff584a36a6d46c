"""A remap that fails and has unmapped the old page before, as kernels up to 6.11 do.

What such a kernel does is done here by a munmap in place of the call, whose result is then
ENOMEM: the page is mapped back before its gate is opened. And what else ends a gate early:
its deadline, and a resolver that serves no more faults.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.kernel import becomes_true, write_memory
from tests.harness.limits import limited
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import EVERY_BACKEND, Member, attached, boot_fleet, frozen, name_of, paths
from tests.qemu.serving import merged_pages
from tests.service.daemon import assert_unharmed
from vmdedup import faults
from vmdedup.guest.vm_readv import page_buffer, read_runs, write_runs
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.smaps import FlaggedVma, flagged_vmas
from vmdedup.linux.syscalls import NR
from vmdedup.linux.userfaultfd import Userfault
from vmdedup.remap import burst
from vmdedup.remap.burst import Burst, Means, Prepared
from vmdedup.remap.live import LiveSession
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.qemu

HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
MOST = 3
"""Remaps that fail."""


class UnmapsFirst:
    """In place of some remaps in gates: munmap, and ENOMEM or another error as the result."""

    def __init__(self, patch: pytest.MonkeyPatch, error: int = errno.ENOMEM) -> None:
        self.failed = self.mended = 0
        self._row: int | None = None
        launch, wait, run_burst = RemoteThread.launch, RemoteThread.wait, burst.run_burst

        def launch_unmapping(remote: RemoteThread, calls: Any, *rest: Any, **how: Any) -> None:
            launch(remote, self._spoilt(calls) if how.get("guard") else calls, *rest, **how)

        def wait_failing(remote: RemoteThread, timeout_s: float) -> Any:
            results = wait(remote, timeout_s)
            if self._row is not None:
                results[self._row] = -error
                self._row = None
            return results

        def burst_unmapping(means: Means, batches: list[Prepared], *, deadline_s: float) -> Burst:
            first = replace(batches[0], calls=self._spoilt(batches[0].calls))
            found = run_burst(means, [first], deadline_s=deadline_s)
            if found.state == burst.BurstState.CAREFUL:
                self._row = None
            return found

        def reached(step: str) -> None:
            self.mended += step == "mended"

        patch.setattr(RemoteThread, "launch", launch_unmapping)
        patch.setattr(RemoteThread, "wait", wait_failing)
        patch.setattr(burst, "run_burst", burst_unmapping)
        patch.setattr(faults, "hook", reached)

    def _spoilt(self, calls: Any) -> Any:
        remaps = np.flatnonzero((calls[:, 0] == NR.MMAP) | (calls[:, 0] == NR.MREMAP))
        if self.failed >= MOST or self._row is not None or not len(remaps):
            return calls
        self.failed += 1
        self._row = int(remaps[len(remaps) // 2])
        spoilt = calls.copy()
        call = spoilt[self._row].copy()
        moves = call[0] == NR.MREMAP
        address, length = (call[5], call[3]) if moves else (call[1], call[2])
        spoilt[self._row] = [NR.MUNMAP, address, length, 0, 0, 0, 0]
        return spoilt


def forked_ram(member: Member) -> list[FlaggedVma]:
    """Mappings of guest RAM that a child of QEMU would have."""
    return [
        vma
        for vma in flagged_vmas(member.name, member.pid)
        if "dc" not in vma.flags
        and any(vma.start < area.end and area.start < vma.end for area in member.areas)
    ]


def unbound_ram(member: Member) -> list[str]:
    """Mappings of guest RAM that have lost their NUMA policy."""
    lines = Path(f"/proc/{member.pid}/numa_maps").read_text().splitlines()
    return [
        line
        for line in lines
        if any(area.start <= int(line.split()[0], 16) < area.end for area in member.areas)
        and line.split()[1] != "bind:0"
    ]


@pytest.mark.parametrize("mask", [(), ("compiled-gates",)], ids=["bursts", "one-by-one"])
@pytest.mark.parametrize("backend", EVERY_BACKEND, ids=name_of)
def test_a_hole_is_mapped_back(
    settings: MakeSettings,
    boot: Boot,
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
    mask: tuple[str, ...],
) -> None:
    bound = replace(backend, options="policy=bind,host-nodes=0")
    (member,) = boot_fleet(boot, [bound], parameters=HELD)
    own = settings(mask=mask, gate_runs=16)
    with frozen([member]), attached(own, [member]) as dedup:
        before = member.snapshot()
        for work in (lambda: dedup.run(passes=2), dedup.unmerge):
            with monkeypatch.context() as patch:
                unmaps = UnmapsFirst(patch)
                work()
                assert unmaps.failed
                assert unmaps.mended >= unmaps.failed
            assert not forked_ram(member)
            assert not unbound_ram(member)
            assert member.vm.alive
            assert member.still_holds(before)
            dedup.run(passes=2)
            assert merged_pages(member) > 500
            assert dedup.verify().ok
            assert member.still_holds(before)
    member.vm.wait_passes(1)
    assert member.vm.errors == 0, member.vm.serial.complaints()


def test_the_limit_that_is_met_is_named(settings: MakeSettings, boot: Boot) -> None:
    """Looked at before anything is mapped: RLIMIT_AS leaves next to nothing."""
    (member,) = boot_fleet(boot, [Backend(mib=16)], parameters=HELD)
    status = Path(f"/proc/{member.pid}/status").read_text()
    size = int(status.split("VmSize:")[1].split()[0]) << 10
    with attached(settings(), [member]) as dedup:
        with limited(member.pid, resource.RLIMIT_AS, size + (1 << 20)):
            (row,) = dedup.run(passes=2).vms
            assert "RLIMIT_AS" in (row.reason or ""), row
            assert merged_pages(member) == 0
        dedup.run(passes=2)
        assert merged_pages(member) > 500
        assert dedup.unmerge().store_removed
    member.vm.wait_passes(1)
    assert member.vm.errors == 0


def test_a_remap_that_is_not_permitted_is_told(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (member,) = boot_fleet(boot, [Backend(mib=16)], parameters=HELD)
    with frozen([member]), attached(settings(), [member]) as dedup:
        before = member.snapshot()
        with monkeypatch.context() as patch:
            unmaps = UnmapsFirst(patch, errno.EACCES)
            reasons = [dedup.run(passes=1).vms[0].reason or "" for _ in range(2)]
            assert unmaps.failed
        assert any("mmap inside QEMU: Permission denied" in reason for reason in reasons), reasons
        assert dedup.run(passes=2).vms[0].reason is None
        assert merged_pages(member) > 500
        assert member.still_holds(before)


def test_a_gate_that_misses_its_deadline_leaves_its_pages_to_a_later_one(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (member,) = boot_fleet(boot, [Backend(mib=16)], parameters=HELD)
    own = settings(mask=("compiled-gates",), controls={"gate_deadline_ms": 20})

    def late(step: str) -> None:
        if step == "verified":
            time.sleep(0.04)

    with frozen([member]), attached(own, [member]) as dedup:
        before = member.snapshot()
        with monkeypatch.context() as patch:
            patch.setattr(faults, "hook", late)
            assert dedup.run(passes=3).host.stopped_ms == 0
            assert merged_pages(member) == 0
        assert member.still_holds(before)
        assert becomes_true(lambda: bool(dedup.run(passes=1)) and merged_pages(member) > 500)
        assert member.still_holds(before)
    assert_unharmed(member.vm)


@pytest.mark.parametrize("backend", EVERY_BACKEND, ids=name_of)
def test_what_late_calls_have_remapped_has_all_settings_of_qemu(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """At the deadline no further page is remapped. Flags and policy follow even then."""
    bound = replace(backend, options="policy=bind,host-nodes=0")
    (member,) = boot_fleet(boot, [bound], parameters=HELD)
    own = settings(mask=("compiled-gates",), controls={"gate_deadline_ms": 20})
    waits: list[threading.Timer] = []
    late: list[str] = []

    def stopped(step: str) -> None:
        if step == "settings-late":
            late.append(step)
        if step == "launched":
            os.kill(member.pid, signal.SIGSTOP)
            waits.append(threading.Timer(0.1, os.kill, (member.pid, signal.SIGCONT)))
            waits[-1].start()

    def merge() -> None:
        dedup.run(passes=3)

    def unmerge() -> None:
        dedup.unmerge()

    with frozen([member]), attached(own, [member]) as dedup:
        before = member.snapshot()
        for work, back in ((merge, unmerge), (unmerge, merge)):
            late.clear()
            while not late:  # a batch may end before it is stopped
                with monkeypatch.context() as patch:
                    patch.setattr(faults, "hook", stopped)
                    work()
                    for wait in waits:
                        wait.join()
                assert dedup.report().vms[0].reason is None
                assert not forked_ram(member)
                assert not unbound_ram(member)
                assert member.still_holds(before)
                back()
                assert member.still_holds(before)  # and all its pages are in its page table
            merge()
            assert merged_pages(member) > 200
            assert dedup.verify().ok
    assert_unharmed(member.vm)


KILLED = """
import os, signal, sys, threading
from vmdedup import Deduplicator, Settings, faults

def hook(step):
    if step == "launched":
        os.kill(int(sys.argv[2]), signal.SIGSTOP)
        threading.Timer(0.1, os.kill, (int(sys.argv[2]), signal.SIGCONT)).start()
    if step == "settings-late":
        os.kill(os.getpid(), signal.SIGKILL)

with Deduplicator(Settings.model_validate_json(sys.argv[1])) as dedup:
    dedup.attach(sys.argv[3:])
    while True:
        faults.hook = hook
        dedup.run(passes=3)
        faults.hook = None
        dedup.unmerge()
"""


def test_killed_before_late_settings_are_set_again(settings: MakeSettings, boot: Boot) -> None:
    backend = Backend("memfd", mib=16, options="policy=bind,host-nodes=0")
    (member,) = boot_fleet(boot, [backend], parameters=HELD)
    own = settings(mask=("compiled-gates",), controls={"gate_deadline_ms": 20})
    with frozen([member]):
        before = member.snapshot()
        words = [own.model_dump_json(), str(member.pid), *paths([member])]
        ended = subprocess.run([sys.executable, "-c", KILLED, *words], check=False, timeout=120)
        os.kill(member.pid, signal.SIGCONT)
        assert ended.returncode == -signal.SIGKILL
        assert member.still_holds(before)
        with attached(settings(), [member]) as dedup:
            assert dedup.verify().ok
            assert dedup.unmerge().store_removed
        assert not forked_ram(member)
        assert not unbound_ram(member)
        assert member.still_holds(before)
    assert_unharmed(member.vm)


def test_a_merge_whose_resolver_has_ended_is_given_up(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would serve a guest's writes any more: the protection is lifted at once."""
    (member,) = boot_fleet(boot, [Backend(mib=16)], parameters=HELD)
    (area,) = member.areas
    pages = range(area.start, area.end, PAGE_BYTES)
    faults_of, failed = Userfault.faults, threading.Event()
    writers: list[threading.Thread] = []

    def failing(userfault: Userfault) -> Any:
        if threading.current_thread().name == "vmdedup-resolver" and not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "made up")
        return faults_of(userfault)

    def write_again() -> None:
        """Each page as it is: the first one that is armed waits for the resolver."""
        for address in pages:
            page = np.array([address]), np.array([1])
            content = read_runs(member.name, member.pid, *page, page_buffer(1))
            write_runs(member.name, member.pid, *page, content)

    def reached(step: str) -> None:
        if step == "drained" and not writers:
            writers.append(threading.Thread(target=write_again))
            writers[0].start()
            assert failed.wait(30)

    with frozen([member]), attached(settings(), [member]) as dedup:
        before = member.snapshot()
        with monkeypatch.context() as patch:
            patch.setattr(Userfault, "faults", failing)
            patch.setattr(faults, "hook", reached)
            (row,) = dedup.run(passes=1).vms
            if not writers:
                (row,) = dedup.run(passes=1).vms
            assert "the fault resolver ended: [Errno 5] made up" in (row.reason or ""), row
            writers[0].join(30)
            assert not writers[0].is_alive()
        assert member.still_holds(before)
        assert dedup.run(passes=2).vms[0].reason is None
        assert merged_pages(member) > 500
        assert member.still_holds(before)
    assert_unharmed(member.vm)


def test_scratch_memory_that_was_touched_is_filled_by_copies(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UFFDIO_COPY fills untouched pages only."""
    (member,) = boot_fleet(boot, [Backend("ram", share=False, mib=16)], parameters=HELD)
    rooms: list[int] = []
    filled: list[bool] = []
    room, fill = RemoteThread.room, LiveSession.fill

    def noted_room(remote: RemoteThread, pages: int) -> int:
        rooms.append(room(remote, pages))
        return rooms[-1]

    def noted_fill(session: LiveSession, *rest: Any) -> bool:
        filled.append(fill(session, *rest))
        return filled[-1]

    def touch(step: str) -> None:
        if step == "scratch-mapped" and rooms:
            for page in range(4096):
                try:
                    write_memory(member.pid, {rooms[-1] + page * PAGE_BYTES: b"t"})
                except OSError:
                    break

    with frozen([member]), attached(settings(), [member]) as dedup:
        dedup.run(passes=2)
        assert merged_pages(member) > 500
        before = member.snapshot()
        with monkeypatch.context() as patch:
            patch.setattr(RemoteThread, "room", noted_room)
            patch.setattr(LiveSession, "fill", noted_fill)
            patch.setattr(faults, "hook", touch)
            assert dedup.unmerge().vms[0].remaining_pages == 0
        assert filled
        assert not any(filled)
        assert member.still_holds(before)
    assert_unharmed(member.vm)
