"""A remap that fails and has unmapped the old page before, as kernels up to 6.11 do.

What such a kernel does is done here by a munmap in place of the call, whose result is then
ENOMEM: the page is mapped back before its gate is opened.
"""

from __future__ import annotations

import errno
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.limits import limited
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import EVERY_BACKEND, Member, attached, boot_fleet, frozen, name_of
from tests.qemu.serving import merged_pages
from vmdedup import faults
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.smaps import FlaggedVma, flagged_vmas
from vmdedup.linux.syscalls import NR
from vmdedup.remap import burst
from vmdedup.remap.burst import Burst, Means, Prepared

pytestmark = pytest.mark.qemu

HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
MOST = 3
"""Remaps that fail."""


class UnmapsFirst:
    """In place of some remaps in gates: munmap, and ENOMEM as the result."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.failed = self.mended = 0
        self._row: int | None = None
        launch, wait, run_burst = RemoteThread.launch, RemoteThread.wait, burst.run_burst

        def launch_unmapping(remote: RemoteThread, calls: Any, *rest: Any, **how: Any) -> None:
            launch(remote, self._spoilt(calls) if how.get("guard") else calls, *rest, **how)

        def wait_failing(remote: RemoteThread, timeout_s: float) -> Any:
            results = wait(remote, timeout_s)
            if self._row is not None:
                results[self._row] = -errno.ENOMEM
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
