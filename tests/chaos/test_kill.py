"""`kill -9` of the engine at every step and at any moment harms no guest."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.engines import Driver
from tests.chaos.fleet import Fleet, becomes_true, is_running
from tests.harness.capabilities import kvm_missing

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

_KILLS = int(os.environ.get("VMDEDUP_CHAOS_KILLS", "6"))
"""Kills at random moments."""
_UNMERGE_EVERY = 3

_STEPS = [
    "userfaultfd-created",
    "registered",
    "armed",
    "drained",
    "held",
    "gate-closed",
    "launched",
    "gate-done",
    "published",
    "merged",
    "punched",
]
_INJECTION_STEPS = [
    "seized",
    "stopped",
    "frames-written",
    "regs-set",
    "detached",
    "copied",
    "opened",
    "table-filled",
    "completed",
    "removed",
]
_UNMERGE_STEPS = ["scratch-filled", "gate-closed", "launched", "inject-completed"]
_PAUSED_STEPS = ["noted", "stopped", "launched", "resumed"]

_PAUSING = {"mask": ["userfaultfd-wp"]}


def _kill_at(driver: Driver, fleet: Fleet, step: str, occurrence: int, **choices: object) -> None:
    engine = driver.run(fleet.job(step=step, occurrence=occurrence, **choices))
    assert engine.exit_code == -signal.SIGKILL, driver.log.read_text()
    fleet.require_released()
    assert becomes_true(lambda: not is_running(engine.guardian)), "the guardian goes on for ever"


@pytest.mark.parametrize("step", _STEPS)
def test_killed_at_a_step_of_a_merge(driver: Driver, fleet: Fleet, step: str) -> None:
    _kill_at(driver, fleet, step, occurrence=2)
    fleet.require_all_well()


def test_killed_at_every_step_of_injection(driver: Driver, fleet: Fleet) -> None:
    for occurrence, step in enumerate(_INJECTION_STEPS):
        _kill_at(driver, fleet, f"inject-{step}", occurrence)
        fleet.require_unharmed()
    fleet.require_all_well()


@pytest.mark.parametrize("step", _UNMERGE_STEPS)
def test_killed_at_a_step_of_an_unmerge(driver: Driver, fleet: Fleet, step: str) -> None:
    fleet.require_takeover(unmerge=False)
    for occurrence in (0, 5):
        _kill_at(driver, fleet, step, occurrence, unmerge=True, merge=False)
    fleet.require_all_well()


@pytest.mark.parametrize("step", _PAUSED_STEPS)
def test_killed_around_a_pause(driver: Driver, fleet: Fleet, step: str) -> None:
    for occurrence in (0, 3):
        _kill_at(driver, fleet, step, occurrence, settings=_PAUSING)
    fleet.require_all_well()


def test_killed_at_random_moments(driver: Driver, fleet: Fleet) -> None:
    moments = random.Random(7)
    for kill in range(_KILLS):
        pausing = _PAUSING if kill % 4 == 3 else {}
        engine = driver.start(fleet.job(unmerge=True, settings=pausing))
        driver.wait_attached()
        time.sleep(moments.uniform(0, 1.5))
        os.kill(engine.pid, signal.SIGKILL)
        assert driver.wait_exit() == -signal.SIGKILL, driver.log.read_text()
        fleet.require_all_well(unmerge=kill % _UNMERGE_EVERY == _UNMERGE_EVERY - 1)
    fleet.require_all_well()


def test_killed_with_a_guest_under_kvm(
    driver: Driver, need: Callable[[str | None], None], tmp_path: Path
) -> None:
    need(kvm_missing())
    slow = {"mib": 1, "rewrite_per_s": 60, "check_per_s": 250}  # its instructions are emulated
    with Fleet(tmp_path) as fleet:
        fleet.boot({"accel": "kvm", "parameters": slow}, {})
        for step in ("gate-closed", "launched", "inject-regs-set", "merged"):
            _kill_at(driver, fleet, step, 1)
        fleet.require_all_well()
