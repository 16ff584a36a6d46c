"""The shipped systemd unit, run by a real systemd: merged, killed, stopped, frozen, out of memory.

Whatever happens to the unit, the VMs beside it run on with right memory, and the next start
finds what is merged.
"""

from __future__ import annotations

import pytest

from tests.hosts.inner import InnerVm
from tests.hosts.unit import UNIT, Unit

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]

_PAUSES = 'mask = ["userfaultfd-wp"]'
"""Merges in pauses."""
_PATIENT = "hang_limit_ms = 10000"
"""Long enough for a command to the unit, while the engine waits at a fault point."""


def assert_all_unharmed(vms: list[InnerVm]) -> None:
    for vm in vms:
        vm.assert_unharmed()


def test_vms_are_merged_under_the_unit(unit: Unit, vms: list[InnerVm]) -> None:
    unit.start()
    unit.wait_merged(*vms)
    rows = {row["name"]: row for row in unit.verb("vms")["vms"]}
    assert [rows[vm.name]["mergeable"] for vm in vms] == [True, True]
    assert_all_unharmed(vms)
    said = unit.journal()
    assert "Traceback" not in said
    assert "without CAP_" not in said


def test_a_killed_engine_is_started_again(unit: Unit, vms: list[InnerVm]) -> None:
    unit.start()
    unit.wait_merged(*vms)
    engine = unit.main_pid
    unit.host.run(f"kill -9 {engine}")
    unit.wait_restarted(engine)
    assert_all_unharmed(vms)
    unit.wait_followed(*vms)
    assert unit.properties("NRestarts") == {"NRestarts": "1"}


def test_stop_and_restart_keep_the_merges(unit: Unit, vms: list[InnerVm]) -> None:
    unit.start()
    unit.wait_merged(*vms)
    unit.systemctl("stop")
    ended = {"Result": "success", "ExecMainStatus": "0"}
    assert unit.properties(*ended) == ended
    unit.wait_all_gone()
    unit.wait_merged(*vms)
    unit.start()
    engine = unit.main_pid
    unit.systemctl("restart")
    unit.wait_restarted(engine)
    assert_all_unharmed(vms)
    unit.wait_merged(*vms)
    unit.wait_followed(*vms)


def test_all_killed_in_one_moment(unit: Unit, vms: list[InnerVm]) -> None:
    """`systemctl kill` takes what is in the unit; the guardian, which is not, goes with it."""
    unit.start()
    unit.wait_merged(*vms)
    engine = unit.main_pid
    everyone = " ".join(map(str, unit.processes()))
    unit.host.run(f"kill -9 {everyone}; systemctl kill --signal=KILL vmdedup || true")
    assert_all_unharmed(vms)
    unit.wait_restarted(engine)
    unit.wait_merged(*vms)
    assert_all_unharmed(vms)


@pytest.mark.parametrize("step", ["armed", "gate-closed"])
def test_a_frozen_unit_holds_no_guest(unit: Unit, vms: list[InnerVm], step: str) -> None:
    """A guest that waits for an engine of a frozen unit goes on: the guardian is not frozen."""
    unit.install(settings=_PATIENT)
    unit.set_trap(step, "wait")
    unit.systemctl("start")
    unit.wait_trapped()
    engine = unit.main_pid
    unit.host.run(f"systemctl freeze {UNIT} && kill -0 {engine}")
    assert_all_unharmed(vms)
    assert unit.main_pid != engine
    unit.open_trap()
    # Refused as long as the unit waits to be started again, with nothing left to thaw.
    unit.host.run(f"systemctl thaw {UNIT} || true")
    unit.wait_answers()
    unit.wait_merged(*vms)
    assert_all_unharmed(vms)


@pytest.mark.parametrize("restart", ["on-failure", "no"])
def test_all_killed_in_a_pause(unit: Unit, vms: list[InnerVm], restart: str) -> None:
    """Engine and guardian die while a VM is paused: ExecStopPost resumes it, or the next engine."""
    unit.install(settings=_PAUSES, service=f"Restart={restart}")
    unit.set_trap("stopped", "kill")
    unit.systemctl("start")
    unit.wait_trapped()
    if restart == "no":
        unit.wait(lambda: unit.main_pid == 0, "it was started again")
    else:
        unit.wait_answers()
        unit.wait_merged(*vms)
    unit.wait(lambda: all(vm.run_state() == "running" for vm in vms), "a VM stays paused")
    assert_all_unharmed(vms)


def test_out_of_memory(unit: Unit, vms: list[InnerVm]) -> None:
    """The kernel kills the engine at the unit's limit, in the middle of its work."""
    unit.start()
    unit.wait_merged(*vms)
    engine = unit.main_pid
    unit.limit_memory("8M")
    unit.wait(lambda: unit.main_pid != engine, "the engine outlived its limit")
    unit.limit_memory("infinity")
    assert_all_unharmed(vms)
    assert "oom-kill" in unit.journal()
    unit.wait_restarted(engine)
    unit.wait_merged(*vms)
    assert_all_unharmed(vms)
