"""`kill -9` of the engine at every step and at any moment harms no guest."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.driver import EXIT_CODE
from tests.chaos.engines import Driver
from tests.chaos.fleet import Fleet, becomes_true, is_running, open_files, scratch_rooms
from tests.chaos.test_shortage import STEPS as SHORTAGE_STEPS
from tests.harness.capabilities import kvm_missing
from tests.harness.images import REPOSITORY
from tests.harness.kernel import mappings
from tests.harness.monitor import connected
from tests.harness.vm import Backend, Vm
from vmdedup.deduplicator import Deduplicator

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

_KILLS = int(os.environ.get("VMDEDUP_CHAOS_KILLS", "6"))
"""Kills at random moments."""
_UNMERGE_EVERY = 3

_MERGE_STEPS = {
    "attach": ["userfaultfd-created", "userfaultfd-taken", "tracked"],
    "publish": ["sums-written", "published", "discarded"],
    "arm": ["lent", "handed-over", "registered", "armed", "drained", "looked"],
    "in place": ["store-mapped", "reading"],
    "gate": ["compared", "held", "gate-closed", "verified", "launched", "gate-done"],
    "burst": [
        "burst-closed",
        "burst-verified",
        "burst-filled",
        "burst-launched",
        "burst-completed",
    ],
    "release": ["session-closed", "taken-back", "merged", "hole-punched", "punched", "released"],
}
_INJECTION_STEPS = [
    "seized",
    "stopped",
    "running",
    "frames-written",
    "regs-set",
    "detached",
    "copied",
    "opened",
    "owned",
    "table-filled",
    "guarded",
    "completed",
    "removed",
]
_CHAIN_STEPS = ["entry-written"]
"""Where there is no stub."""
_UNMERGE_STEPS = {
    "fill": [
        "scratch-mapped",
        "missing-registered",
        "blocks-allocated",
        "scratch-filled",
        "gate-closed",
        "checked",
        "launched",
    ],
    "burst": ["burst-closed", "burst-filled", "burst-launched", "burst-completed"],
    "end": ["came-home", "inject-completed", "joined", "store-emptied", "sums-unlinked"],
}
_FEW = ["missing-registered", "blocks-allocated", "joined", "store-emptied", "sums-unlinked"]
_ELSEWHERE = ["mended", "settings-late", "collapsed", "paged-out"]
"""Reached after a remap that failed (tests/qemu/test_failed_remap.py): killed as at gate-done.
After a late one (killed there). After a huge page was made
(tests/qemu/test_huge_page_density.py). And in a daemon that pages out
(tests/service/test_cold_pages.py), which is killed there."""
_PAUSED_STEPS = ["note-drafted", "noted", "stopped", "launched", "resumed"]

_PAUSING = {"mask": ["userfaultfd-wp"]}
_ONE_BY_ONE = {"mask": ["compiled-gates"]}
"""Every gate in Python, as where nothing was compiled."""
_MANY_GATES = {"gate_runs": 4}
"""More than one in a VM, and so a burst, however little is merged in it."""


def _kill_at(driver: Driver, fleet: Fleet, step: str, occurrence: int, **choices: Any) -> None:
    engine = driver.run(fleet.job(step=step, occurrence=occurrence, **choices))
    assert engine.exit_code == -signal.SIGKILL, driver.log.read_text()
    fleet.require_released()
    assert becomes_true(lambda: not is_running(engine.guardian)), "the guardian goes on for ever"


def test_every_step_of_the_source_is_one_at_which_we_kill() -> None:
    named, injected = set(), set()
    for path in (REPOSITORY / "vmdedup").rglob("*.[cp]*"):
        if path.suffix not in (".c", ".py"):
            continue
        text = path.read_text()
        named |= set(re.findall(r'\b(?:reached\(|step\(gates, )"([^"]+)"\)', text))
        injected |= set(re.findall(r'_fault\("([^"]+)"\)', text))
    tried = {step for steps in (_MERGE_STEPS, _UNMERGE_STEPS) for s in steps.values() for step in s}
    tried |= {*_PAUSED_STEPS, *_ELSEWHERE, *SHORTAGE_STEPS}
    assert named == {step for step in tried if not step.startswith("inject-")}
    assert injected == {*_INJECTION_STEPS, *_CHAIN_STEPS}


@pytest.mark.parametrize("stage", _MERGE_STEPS)
def test_killed_at_each_step_of_a_merge(driver: Driver, fleet: Fleet, stage: str) -> None:
    for number, step in enumerate(_MERGE_STEPS[stage]):
        # What stands merged needs no publishing: there, unmerge and merge again.
        again = stage == "publish"
        settings = _ONE_BY_ONE if stage == "gate" else {}
        occurrence = 0 if again else 2
        _kill_at(driver, fleet, step, occurrence, unmerge=again, settings=settings)
        if step != "published":  # the next kill is while that is swept
            fleet.require_unharmed()
            fleet.require_takeover(unmerge=number % 2 == 1)
    fleet.require_all_well()


def test_killed_at_every_step_of_injection(driver: Driver, fleet: Fleet) -> None:
    for occurrence, step in enumerate(_INJECTION_STEPS):
        _kill_at(driver, fleet, f"inject-{step}", occurrence)
        fleet.require_unharmed()
        fleet.require_takeover(unmerge=False)
    for step in _CHAIN_STEPS:
        _kill_at(driver, fleet, f"inject-{step}", 2, settings={"mask": ["stub"]})
    fleet.require_all_well()


def _keeps_no_descriptor(vm: Vm) -> bool:
    """Whether its QEMU has shared memory that it cannot map anew (`ram`, up to QEMU 9): there
    alone the pieces do not join by themselves."""
    return any(mapping.path == "/dev/zero (deleted)" for mapping in mappings(vm.pid))


@pytest.mark.parametrize("stage", _UNMERGE_STEPS)
def test_killed_at_each_step_of_an_unmerge(driver: Driver, fleet: Fleet, stage: str) -> None:
    for step in _UNMERGE_STEPS[stage]:
        if step == "joined" and not any(map(_keeps_no_descriptor, fleet.vms)):
            continue
        fleet.require_takeover(unmerge=False)
        # There may be one only, where earlier kills have left little to do.
        few = stage == "burst" or step in _FEW
        for occurrence in (0,) if few else (0, 3):
            choices = {"unmerge": True, "merge": step == "joined"}
            settings = {"fill": _ONE_BY_ONE, "burst": _MANY_GATES}.get(stage, {})
            _kill_at(driver, fleet, step, occurrence, settings=settings, **choices)
            fleet.require_unharmed()
    fleet.require_all_well()


def test_scratch_memory_of_a_killed_unmerge_is_found_and_unmapped(
    driver: Driver, tmp_path: Path
) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.boot(
            {"backend": Backend("ram", share=False, mib=32)},
            {"backend": Backend("file", share=False, mib=32)},
        )
        fleet.require_takeover(unmerge=False)
        left = 0
        # Each VM has scratch memory filled at least once, and several gates after that.
        for step, occurrence in [
            ("scratch-filled", 0),
            ("scratch-filled", 1),
            ("came-home", 0),
        ] * 2:
            job = {"occurrence": occurrence, "unmerge": True, "merge": False}
            _kill_at(driver, fleet, step, **job)
            left += sum(len(scratch_rooms(vm.pid)) for vm in fleet.vms)
            fleet.require_takeover(unmerge=False)
        assert left >= 6, "nothing was left that could be found"
        fleet.require_all_well()


@pytest.mark.parametrize("step", ["lent", "gate-closed"])
def test_what_a_killed_engine_had_lent_is_taken_back_beside_another_monitor(
    driver: Driver, tmp_path: Path, step: str
) -> None:
    """QEMU closes what was lent to it by itself only when its last monitor disconnects."""
    third = tmp_path / "third.sock"
    with Fleet(tmp_path) as fleet:
        fleet.boot({"extra": ["-qmp", f"unix:{third},server=on,wait=off"]})
        (vm,) = fleet.vms
        with connected(third):
            before = open_files(vm.pid)
            for _ in range(3):
                _kill_at(driver, fleet, step, occurrence=1)
            assert open_files(vm.pid) != before, "nothing was lent"
            with Deduplicator(fleet.settings) as dedup:
                dedup.attach(fleet.sockets)
                assert dedup.unmerge().store_removed
            assert becomes_true(lambda: open_files(vm.pid) == before)
        fleet.require_unharmed()


@pytest.mark.parametrize("unmerge", [False, True])
def test_killed_while_two_vms_are_held(driver: Driver, fleet: Fleet, unmerge: bool) -> None:
    """A thread for each of them is in the middle of a gate, or has just let its calls run."""
    # Gates of some runs, all of them in Python: that each VM has several.
    settings = {"workers": 2, "gate_runs": 4, "mask": ["compiled-gates"]}
    for step in ("gate-closed", "launched"):
        fleet.require_takeover(unmerge=not unmerge)
        job = fleet.job(
            step=step,
            occurrence=3,
            together=2,
            action="EXIT",
            merge=not unmerge,
            unmerge=unmerge,
            settings=settings,
        )
        engine = driver.run(job)
        assert engine.exit_code == EXIT_CODE, "never two of them at once"
        fleet.require_released()
        fleet.require_unharmed()
    fleet.require_all_well()


def test_killed_before_a_pause_was_noted(driver: Driver, fleet: Fleet) -> None:
    """The next engine pauses nobody, and so writes no note over the draft."""
    _kill_at(driver, fleet, "note-drafted", 0, settings=_PAUSING)
    fleet.require_all_well()


def test_killed_around_a_pause(driver: Driver, fleet: Fleet) -> None:
    for step in _PAUSED_STEPS:
        for occurrence in (0, 3):
            _kill_at(driver, fleet, step, occurrence, settings=_PAUSING)
        fleet.require_unharmed()
        fleet.require_takeover(unmerge=False)
    fleet.require_all_well()


def test_killed_at_random_moments(driver: Driver, fleet: Fleet) -> None:
    moments = random.Random(7)
    for kill in range(_KILLS):
        pausing = _PAUSING if kill % 4 == 3 else {}
        engine = driver.start(fleet.job(unmerge=True, settings=pausing))
        driver.wait_attached()
        time.sleep(moments.uniform(0, 1.5))
        with_guardian = kill % 5 == 4
        if with_guardian:
            os.kill(engine.guardian, signal.SIGKILL)
        os.kill(engine.pid, signal.SIGKILL)
        assert driver.wait_exit() == -signal.SIGKILL, driver.log.read_text()
        if with_guardian:  # a VM that was paused is resumed by the next engine
            fleet.require_takeover(unmerge=False)
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
