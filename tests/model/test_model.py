"""The merge protocol (merge.pml) is right in every order of its steps, each safeguard needed.

What is checked whole, and each variant without one safeguard, names what happens in it. A
variant must go wrong in just the way that its safeguard prevents.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness.skips import require
from tests.model.checker import DISCARDS, MODEL, READS, WAITS, WORLD, check, spin_missing

pytestmark = pytest.mark.model

WHOLE = {
    "disk, device, kill, hang": "DISKS DEVICES KILLS WRITES=2",
    "balloon, merge and unmerge": "BALLOONS KILLS WRITES=2 ROUNDS=2",
    "descriptors of a dead engine": "MONITORS KILLS ROUNDS=2",
    "next engine on the same VM": "ENGINES=2 KILLS",
    "next engine on another VM": "ENGINES=2 VMS=2 KILLS",
    "two VMs at a time": "ENGINES=2 VMS=2 WORKERS",
    "pause: disk, user": "PAUSES=1 DISKS USERS KILLS",
    "pause: 9p, user": "PAUSES=1 SLOW_9P USERS KILLS",
    "pause: device, user": "PAUSES=1 DEVICES USERS KILLS",
    "pause: next engine": "PAUSES=1 ENGINES=2 KILLS",
    "unprotected pause: disk, 9p": "PAUSES=2 DISKS SLOW_9P KILLS",
    "unprotected pause: balloon": "PAUSES=2 BALLOONS KILLS",
    "unprotected pause: next engine": "PAUSES=2 ENGINES=2 KILLS",
}

WITHOUT = {
    # safeguard: what has to happen besides, what goes wrong
    "DRAIN": ("DISKS", READS),
    "LOOK_AFTER_ARMING": ("DEVICES", READS),
    "LOOK_BEFORE_GATE": ("DISKS", WAITS),
    "COMPARISON": ("", READS),
    "COMPARISON_UNDER_PROTECTION": ("", READS),
    "RECHECK": ("", READS),
    "GATE": ("", READS),
    "RESOLVER": ("DISKS", WAITS),
    "WAKE": ("", WAITS),
    "END_OF_BATCH": ("", READS),
    "CONFIRMATION": ("", READS),
    "GUARD": ("KILLS", READS),
    "LAUNCH_BEFORE_GUARD": ("KILLS", WAITS),
    "HANG_LIMIT": ("KILLS", WAITS),
    "HELD_DISCARDS": ("BALLOONS", READS),
    "OWN_NUMBERS": ("MONITORS KILLS", READS),
    "VM_LOCK": ("ENGINES=2", READS),
    "STORE_LOCK": ("ENGINES=2 VMS=2 WRITES=0", DISCARDS),
    "WAIT": ("ENGINES=2 KILLS", READS),
    "WAIT_ELSEWHERE": ("ENGINES=2 VMS=2 WRITES=0 KILLS", DISCARDS),
    "WHOLE_MAPPINGS": ("", DISCARDS),
    "FRESH_SLOTS": ("ENGINES=2 VMS=2 WORKERS WRITES=0", READS),
    "PROTECTION_IN_PAUSE": ("PAUSES=1 SLOW_9P", READS),
    "NOTE_FIRST": ("PAUSES=1 KILLS", WAITS),
    "GUARDIAN": ("PAUSES=1 KILLS", WAITS),
    "WAIT_TO_RESUME": ("PAUSES=2 KILLS", READS),
    "WAIT_BEFORE_RESUMING": ("PAUSES=2 ENGINES=2 KILLS", READS),
    "GUARDIAN_LOCK": ("PAUSES=2 ENGINES=2 KILLS", READS),
    "REFUSAL": ("PAUSES=2 SLOW_9P", READS),
}

LIMITS = {
    "in an unprotected pause a device is plugged": "PAUSES=2 DEVICES",
    "in an unprotected pause a user says cont": "PAUSES=2 USERS",
}
"""What the protocol cannot hold; docs/algorithm.md says so."""

ENDS = {
    "live": "DISKS BALLOONS KILLS",
    "next engine": "ENGINES=2 WRITES=0 KILLS",
    "pause": "PAUSES=1 SLOW_9P KILLS",
}


@pytest.fixture(autouse=True)
def _spin() -> None:
    require(spin_missing())


@pytest.mark.parametrize("what", WHOLE)
def test_the_protocol_is_right(what: str, tmp_path: Path) -> None:
    verdict = check(tmp_path, *WHOLE[what].split(), compiler=("-O1", "-DSAFETY"))
    print(f"{what}: {verdict.states} states")
    assert verdict.error is None
    # What is never reached would be right whatever it does.
    assert not [each for each in verdict.unreached if _matters(*each)]


def _matters(process: str, line: int, statement: str) -> bool:
    first = MODEL.read_text().splitlines().index("proctype Engine(byte me, v) {")
    only_elsewhere = any(words in statement for words in ("dead[me]", "store_lock"))
    return process == "Engine" and line > first and not only_elsewhere


@pytest.mark.parametrize("safeguard", WITHOUT)
def test_without_a_safeguard_it_is_wrong(safeguard: str, tmp_path: Path) -> None:
    happens, wrong = WITHOUT[safeguard]
    defines = [f"WITHOUT_{safeguard}", *happens.split()]
    verdict = check(tmp_path, *defines, compiler=("-O0", "-DSAFETY"), shortest=True)
    print(f"without {safeguard}: {verdict.error} after {verdict.steps} steps")
    assert verdict.error == wrong
    assert verdict.steps


def test_each_safeguard_has_its_variant() -> None:
    named = re.findall(r"WITHOUT_(\w+)", MODEL.read_text() + WORLD.read_text())
    assert set(named) - {""} == set(WITHOUT)


@pytest.mark.parametrize("what", WITHOUT)
def test_what_else_happens_is_checked_whole(what: str) -> None:
    """So that it is the missing safeguard that goes wrong, and nothing else."""
    happens = dict(_define(each) for each in WITHOUT[what][0].split())
    assert any(_covers(happens, whole) for whole in WHOLE.values())


def _define(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value or 1)


def _covers(happens: dict[str, int], whole: str) -> bool:
    checked = dict(_define(each) for each in whole.split())
    same = ("PAUSES", "VMS", "ENGINES", "WORKERS")
    return all(happens.get(name) == checked.get(name) for name in same) and all(
        value <= checked.get(name, int(name == "WRITES")) for name, value in happens.items()
    )


@pytest.mark.parametrize("what", LIMITS)
def test_limits_are_as_documented(what: str, tmp_path: Path) -> None:
    verdict = check(tmp_path, *LIMITS[what].split(), compiler=("-O0", "-DSAFETY"), shortest=True)
    print(f"{what}: {verdict.error} after {verdict.steps} steps")
    assert verdict.error == READS


@pytest.mark.parametrize("what", ENDS)
def test_every_run_ends(what: str, tmp_path: Path) -> None:
    """No order of steps goes round for ever: so "waits at the end" is "waits for ever"."""
    verdict = check(tmp_path, *ENDS[what].split(), compiler=("-O1", "-DNP", "-DNOFAIR"))
    assert verdict.error is None
