"""A VM lost in the middle of anything: dropped, the others go on, nothing leaks."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.fleet import Fleet, becomes_true, open_files, run_state
from tests.chaos.lost import Lose, Loser, disconnect, end, hooked, kill
from tests.harness.vm import Backend, Vm
from vmdedup.deduplicator import Deduplicator
from vmdedup.guardian.runtime_dir import read_notes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

_MERGING = [
    *("userfaultfd-created", "userfaultfd-taken", "tracked", "lent", "handed-over", "registered"),
    *("armed", "drained", "looked", "held", "gate-closed", "verified", "launched", "gate-done"),
    *("session-closed", "taken-back", "merged", "hole-punched", "punched", "released"),
    *(f"inject-{step}" for step in ("seized", "stopped", "frames-written", "regs-set", "copied")),
    *(f"inject-{step}" for step in ("detached", "opened", "table-filled", "guarded", "completed")),
]
_SOME = [
    *("lent", "armed", "gate-closed", "launched", "merged"),
    "inject-table-filled",
]
_UNMERGING = [
    "scratch-mapped",
    "scratch-filled",
    "gate-closed",
    "checked",
    "launched",
    "came-home",
]
_PAUSING = ["noted", "stopped", "held", "launched", "gate-done", "resumed"]
_SOME_PAUSING = ["stopped", "launched", "resumed"]
_PAUSED = {"mask": ["userfaultfd-wp"]}

_MOST_PASSES = 20
_KEPT = Counter(["/dev/zero", *["/memfd:vmdedup-loop (deleted)"] * 2])
"""Opened once for good."""

_SMALL: dict[str, Any] = {"parameters": {"mib": 1}}
_BACKENDS = [
    Backend("memfd", mib=16),
    Backend("ram", share=False, mib=16),
    Backend("file", share=False, mib=16),
    Backend("memfd", mib=16),
]


def _boot(fleet: Fleet, victims: int, first: Backend | None = None) -> tuple[list[Vm], list[Vm]]:
    """VMs to be lost, and two that must stay."""
    options = [{"backend": _BACKENDS[n % len(_BACKENDS)], **_SMALL} for n in range(victims + 2)]
    if first is not None:
        options = [{"backend": first, **_SMALL}] * (victims + 2)
    fleet.boot(*options)
    return fleet.vms[2:], fleet.vms[:2]


def _lose_all(fleet: Fleet, lose: Lose, steps: Sequence[str], *, unmerge: bool = False) -> None:
    """One VM lost at each step, in one run; the two others are well throughout."""
    victims, others = _boot(fleet, len(steps), Backend("ram", share=False) if unmerge else None)
    before, threads = Counter(open_files(os.getpid())), threading.active_count()
    loser = Loser(lose, steps, victims)
    with Deduplicator(fleet.settings) as dedup:
        dedup.attach(fleet.sockets)
        if unmerge:
            dedup.run(passes=2)
            with hooked(loser):
                dedup.unmerge([vm.name for vm in victims])
            report = dedup.run(passes=1)
        else:
            with hooked(loser):
                for _ in range(_MOST_PASSES):
                    report = dedup.run(passes=1)
                    if not loser.left:
                        break
        print(
            {step: vm.name for step, vm in loser.lost.items()}, [row.status for row in report.vms]
        )
        assert loser.left == [], "not reached"
        names = {vm.name for vm in loser.lost.values()}
        for row in report.vms:
            if row.name in names and lose is not disconnect:
                assert row.status == "gone", row
            elif row.name not in names:
                assert row.status in ("scanning", "merged"), row
                assert row.merged_pages > 0, row
        if lose is disconnect:
            return
        assert dedup.verify().ok
        for vm in loser.lost.values():
            assert becomes_true(lambda vm=vm: not vm.alive)  # type: ignore[misc]
        fleet.vms = others
        assert dedup.unmerge().store_removed
    assert Counter(open_files(os.getpid())) - before <= _KEPT
    assert becomes_true(lambda: threading.active_count() == threads)
    fleet.require_released()
    fleet.require_unharmed()
    fleet.require_takeover()


@pytest.mark.parametrize("lose", [kill, end])
def test_vms_that_end_in_the_middle_are_dropped_and_the_others_go_on(
    tmp_path: Path, lose: Lose
) -> None:
    with Fleet(tmp_path) as fleet:
        _lose_all(fleet, lose, _MERGING if lose is kill else _SOME)


def test_vms_that_are_killed_while_they_are_unmerged(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        _lose_all(fleet, kill, _UNMERGING, unmerge=True)


@pytest.mark.parametrize("lose", [kill, end])
def test_vms_that_end_around_a_pause(tmp_path: Path, lose: Lose) -> None:
    with Fleet(tmp_path, **_PAUSED) as fleet:
        _lose_all(fleet, lose, _PAUSING)
        assert read_notes(fleet.settings.runtime_dir) == []


@pytest.mark.parametrize("steps", [_SOME, _SOME_PAUSING], ids=["live", "pausing"])
def test_monitors_that_disconnect_harm_nobody_and_are_connected_to_again(
    tmp_path: Path, steps: list[str]
) -> None:
    with Fleet(tmp_path, **(_PAUSED if steps is _SOME_PAUSING else {})) as fleet:
        _lose_all(fleet, disconnect, steps)
        fleet.require_all_well()


def test_a_vm_whose_monitor_is_lost_while_it_is_paused_is_resumed_at_once(tmp_path: Path) -> None:
    with Fleet(tmp_path, **_PAUSED) as fleet:
        fleet.boot(_SMALL, _SMALL)
        loser = Loser(disconnect, ["stopped"], fleet.vms[:1])
        with Deduplicator(fleet.settings) as dedup:
            dedup.attach(fleet.sockets)
            with hooked(loser):
                dedup.run(passes=2)
            assert loser.lost
            assert run_state(fleet.vms[0]) == "running"
            assert read_notes(fleet.settings.runtime_dir) == []
        fleet.require_all_well()
