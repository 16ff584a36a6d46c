"""What a session finds in a process is not looked for again, and never trusted blindly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.process.victims import Victim
from vmdedup.errors import InjectionError
from vmdedup.inject import borrow
from vmdedup.inject.gadgets import find_gadgets
from vmdedup.inject.remote import Landmarks, RemoteThread
from vmdedup.linux.maps import read_maps
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process


def _use(victim: Victim, landmarks: Landmarks) -> None:
    with RemoteThread("victim", victim.pid, victim.worker, landmarks=landmarks) as remote:
        assert remote.call(NR.GETPID) == victim.pid
    victim.require_no_scratch()


def test_the_second_session_does_not_search(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    landmarks = Landmarks()
    _use(victim, landmarks)
    found = replace(landmarks)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("it was searched again")

    monkeypatch.setattr(borrow, "read_maps", refuse)
    monkeypatch.setattr(borrow, "find_gadgets", refuse)
    RemoteThread("victim", victim.pid, victim.worker, landmarks=landmarks).survey()
    _use(victim, landmarks)
    assert landmarks == found
    victim.require_healthy()


def test_the_same_library_is_searched_once(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Landmarks(), Landmarks()
    _use(victim, first)
    monkeypatch.setattr(borrow, "find_gadgets", lambda *_: pytest.fail("it was searched again"))
    _use(victim, second)
    assert (second.gadgets, second.code) == (first.gadgets, first.code)
    victim.require_healthy()


def test_what_was_found_is_kept_for_so_many_files(
    programs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(borrow, "_found_in", {})
    monkeypatch.setattr(borrow, "_MOST_FILES", 1)
    for kind in ("dynamic", "static", "dynamic"):
        with Victim(programs[kind]) as each:
            _use(each, landmarks := Landmarks())
            assert [code for _, code in borrow._found_in.values()] == [landmarks.code]


def test_code_that_a_chain_runs_is_told_by_its_address() -> None:
    """At an instruction of it, or right behind."""
    filler = b"\x90" * 16
    call, back, store = b"\x0f\x05\xc3", bytes.fromhex("48c7c00f0000000f05"), b"\x48\x89\x03\xc3"
    without = find_gadgets(0x1000, filler + call + filler + back + filler)
    assert without is not None
    assert without.store is None
    runs = [rip for rip in range(0x1000, 0x1100) if without.in_chain(rip)]
    assert runs == [*range(0x1010, 0x1014), *range(0x1023, 0x102D)]
    gadgets = find_gadgets(0x1000, filler + call + filler + back + filler + store + filler)
    assert gadgets is not None
    assert gadgets.addresses() == [0x1010, 0x1023, 0x103C]
    assert gadgets.in_chain(0x103C)
    for missing in (filler + call, filler + back):
        assert find_gadgets(0x1000, missing) is None


@pytest.mark.parametrize("lie", ["address", "code"])
def test_what_another_process_showed_counts_only_where_it_is_true(
    victim: Victim, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    right, landmarks = Landmarks(), Landmarks()
    _use(victim, right)
    lies = {
        file: (gadgets.moved(64), code) if lie == "address" else (gadgets, (b"\xcc" * 48,) * 3)
        for file, (gadgets, code) in borrow._found_in.items()
    }
    assert lies
    monkeypatch.setattr(borrow, "_found_in", lies)
    _use(victim, landmarks)
    assert (landmarks.gadgets, landmarks.code) == (right.gadgets, right.code)
    victim.require_healthy()


def test_code_that_is_not_there_any_more_is_looked_for_anew(victim: Victim) -> None:
    landmarks = Landmarks()
    _use(victim, landmarks)
    assert landmarks.gadgets is not None
    right = replace(landmarks)
    landmarks.gadgets = landmarks.gadgets.moved(4096)
    _use(victim, landmarks)
    assert (landmarks.gadgets, landmarks.code) == (right.gadgets, right.code)
    victim.require_healthy()


def test_an_address_that_was_taken_meanwhile_is_left_alone(victim: Victim) -> None:
    landmarks = Landmarks()
    _use(victim, landmarks)
    maps = read_maps("victim", victim.pid)
    assert landmarks.stack is not None
    landmarks.gap = landmarks.stack.start
    with pytest.raises(InjectionError, match="could not be mapped"):
        _use(victim, landmarks)
    victim.require_no_scratch()
    assert read_maps("victim", victim.pid).start.tolist() == maps.start.tolist()
    _use(victim, landmarks)
    victim.require_healthy()
