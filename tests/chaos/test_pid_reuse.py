"""A VM's process id that belongs to another process by now: that one is never touched."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.engines import Driver
from tests.chaos.fleet import Fleet, run_state
from tests.chaos.lost import Loser, hooked
from tests.harness.kernel import mappings
from tests.harness.monitor import qmp
from tests.harness.pids import VmWithPid, imposters, set_tid_missing, traces
from tests.harness.vm import Backend, Vm
from vmdedup.deduplicator import Deduplicator
from vmdedup.guardian.runtime_dir import read_notes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

Need = Callable[[str | None], None]

_STEPS = ["userfaultfd-taken", "armed", "drained", "session-closed", "merged"]
_SMALL = {"backend": Backend(mib=16), "parameters": {"mib": 1}}
_RESTING = {**_SMALL, "parameters": {"mib": 1, "rewrite_per_s": 60}}
"""Pages rest for some seconds, so that one VM in pauses also merges some on a busy host."""


def _end(vm: Vm) -> list[int]:
    """Kill a VM and wait for it; the ids of all its threads, free from now on."""
    threads = [int(name) for name in os.listdir(f"/proc/{vm.pid}/task")]
    os.kill(vm.pid, signal.SIGKILL)
    vm.kill()
    return threads


@pytest.mark.parametrize("step", _STEPS)
def test_a_process_that_got_the_id_in_the_middle_of_a_merge(
    tmp_path: Path, need: Need, step: str
) -> None:
    """All ids of the VM's threads are reused at once, in the worst moment."""
    need(set_tid_missing())
    with Fleet(tmp_path) as fleet, ExitStack() as exits:
        fleet.boot(_SMALL, _SMALL)
        victim, other = fleet.vms
        untouched: dict[int, tuple[str, ...]] = {}

        def reuse(vm: Vm) -> None:
            for pid in exits.enter_context(imposters(_end(vm))):
                untouched[pid] = traces(pid)

        with Deduplicator(fleet.settings) as dedup:
            dedup.attach(fleet.sockets)
            with hooked(Loser(reuse, [step], [victim])):
                report = dedup.run(passes=3)
            assert untouched
            status = {row.name: row.status for row in report.vms}
            assert status.pop(victim.name) == "gone"
            assert set(status.values()) <= {"scanning", "merged"}
            assert dedup.verify().ok
            fleet.vms = [other]
            dedup.unmerge()
        assert {pid: traces(pid) for pid in untouched} == untouched
        fleet.require_unharmed()


def test_another_vm_with_the_id_of_one_that_ended(tmp_path: Path, need: Need) -> None:
    need(set_tid_missing())
    with Fleet(tmp_path) as fleet:
        fleet.boot(_SMALL, _SMALL)
        victim, other = fleet.vms
        with Deduplicator(fleet.settings) as dedup:
            dedup.attach(fleet.sockets)
            dedup.run(passes=2)
            _end(victim)
            with VmWithPid(
                "bare", name="reborn", wanted=victim.pid, **{**_SMALL, "parameters": {"mib": 2}}
            ) as reborn:
                reborn.wait_ready()
                report = dedup.run(passes=2)
                status = {row.name: row.status for row in report.vms}
                assert status.pop(victim.name) == "gone"
                assert set(status.values()) <= {"scanning", "merged"}
                assert [m.path for m in mappings(reborn.pid) if m.is_ours] == []
                fleet.vms = [other]
                fleet.require_unharmed([other, reborn])
                dedup.attach([str(reborn.qmp_path)])
                assert {row.name for row in dedup.run(passes=2).vms if row.merged_pages} == {
                    other.name,
                    "reborn",
                }
                fleet.require_unharmed([other, reborn])
                dedup.unmerge()


def test_a_stop_note_does_not_resume_another_process(
    driver: Driver, tmp_path: Path, need: Need
) -> None:
    """The noted VM is gone; who has its id now was paused by its user."""
    need(set_tid_missing())
    with Fleet(tmp_path, mask=["userfaultfd-wp"]) as fleet:
        fleet.boot(_RESTING, _RESTING)
        driver.run(fleet.job(step="stopped", action="KILL_BOTH", settings={"workers": 1}))
        ((_, note),) = read_notes(fleet.settings.runtime_dir)
        (noted,) = (vm for vm in fleet.vms if vm.pid == note.pid)
        _end(noted)
        fleet.vms.remove(noted)
        with VmWithPid("bare", name="reborn", wanted=noted.pid, **_SMALL) as reborn:
            reborn.wait_ready()
            qmp(reborn.test_qmp_path, "stop")
            with Deduplicator(fleet.settings) as dedup:
                dedup.attach(fleet.sockets)
                dedup.run(passes=2)
            assert read_notes(fleet.settings.runtime_dir) == []
            assert run_state(reborn) == "paused"
            fleet.require_all_well()
