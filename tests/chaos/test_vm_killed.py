"""QEMU killed in the middle of a batch: dropped, the others go on, nothing leaks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.chaos.fleet import Fleet, open_files
from tests.harness.vm import Backend
from vmdedup import faults
from vmdedup.deduplicator import Deduplicator

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

_STEPS = ["registered", "armed", "held", "gate-closed", "launched", "merged", "inject-regs-set"]


@pytest.mark.parametrize("step", _STEPS)
def test_a_vm_killed_in_the_middle_is_dropped_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.boot({}, {"backend": Backend("ram", share=False, mib=32)}, {})
        victim, *others = fleet.vms

        def kill(reached: str) -> None:
            if reached == step:
                # Not waited for: a thread that we hold ends only when we let it.
                os.kill(victim.pid, signal.SIGKILL)

        before = open_files(os.getpid())
        with Deduplicator(fleet.settings) as dedup:
            dedup.attach(fleet.sockets)
            monkeypatch.setattr(faults, "hook", kill)
            report = dedup.run(passes=2)
            monkeypatch.setattr(faults, "hook", None)
            status = {row.name: row.status for row in report.vms}
            assert status.pop(victim.name) == "gone"
            assert set(status.values()) <= {"scanning", "merged"}
            assert all(row.merged_pages for row in report.vms if row.name != victim.name)
            assert dedup.verify().ok
            assert dedup.unmerge().store_removed
        assert open_files(os.getpid()) == before
        victim.kill()
        fleet.vms.remove(victim)
        fleet.require_released(others)
        fleet.require_unharmed(others)
        fleet.require_takeover()
