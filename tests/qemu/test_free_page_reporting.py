"""Guests that report their free pages: never a page that is not as the guest takes it to be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import frozen
from tests.qemu.reporting import (
    EVERY_BACKEND,
    KINDS,
    MIB,
    POISONS,
    give_back,
    number,
    rebooting_vm,
    reporting_vm,
    run_rounds,
    stale_pages,
    start,
    when_ready,
)
from tests.qemu.serving import Serving, serving
from tests.service.daemon import assert_unharmed, store_pages

pytestmark = pytest.mark.qemu

SHARED, OFF = EVERY_BACKEND[0], ",page-poison=off"
ROUNDS = int(os.environ.get("VMDEDUP_REPORTING_ROUNDS", "3"))


def test_what_it_would_do(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why not all is merged: in spite of it, free memory comes back with old content."""
    member = reporting_vm(boot, SHARED, "init_on_free=1")
    assert stale_pages([member]) == 0
    monkeypatch.setattr("vmdedup.vm.attached_vm.examine", lambda *_, **__: [])
    with serving(settings(), [member]) as served:
        number(member.vm, "take 16", "taken=")
        assert served.merge() > 1000
    member.vm.ask("drop", "dropped")
    assert becomes_true(lambda: stale_pages([member]) > 0, 20)


def test_only_zero_pages_are_merged_by_default(settings: MakeSettings, boot: Boot) -> None:
    members = when_ready([start(boot, backend, "init_on_free=1") for backend in EVERY_BACKEND])
    with serving(settings(), members) as served:
        for _ in range(2):
            assert served.merge() > 1000 * len(members)
            assert [store_pages(member.vm) for member in members] == [0] * len(members)
            give_back(members)
            assert stale_pages(members) == 0
            served.merge()
            assert stale_pages(members) == 0
    assert_unharmed(*(member.vm for member in members))


def test_without_page_poison_all_is_merged(settings: MakeSettings, boot: Boot) -> None:
    """The guest is not told that it may rely on zeroes, and does not report if it would."""
    kernels = {SHARED: "init_on_free=1", EVERY_BACKEND[2]: "init_on_alloc=1"}
    members = when_ready([start(boot, backend, kernel, OFF) for backend, kernel in kernels.items()])
    with serving(settings(), members) as served:
        for _ in range(2):
            assert served.merge() > 1000 * len(members)
            assert min(store_pages(member.vm) for member in members) > 0
            give_back(members)
            assert stale_pages(members) == 0
    assert_unharmed(*(member.vm for member in members))


def test_merged_pages_that_the_guest_may_have_given_back(
    settings: MakeSettings, boot: Boot
) -> None:
    member = reporting_vm(boot, SHARED, "init_on_alloc=1", OFF)
    number(member.vm, "take 16", "taken=")

    def at_most(served: Serving) -> int:
        return served.fleet.report(converged=None).vms[0].perhaps_discarded_pages

    with serving(settings(), [member]) as served:
        assert served.merge() > 4000
        with frozen([member]):
            member.snapshot()  # touches every page, so that the page tables show it
            touched = at_most(served)
        member.vm.ask("drop", "dropped")
        assert becomes_true(lambda: at_most(served) > touched + 3000, 20)
    assert_unharmed(member.vm)


@pytest.mark.both_qemus
@pytest.mark.timeout(300 + 120 * ROUNDS)
@pytest.mark.parametrize("device", ["", OFF], ids=["default", "page-poison=off"])
def test_rounds_of_freeing_and_rebooting(
    settings: MakeSettings, boot: Boot, tmp_path: Path, device: str
) -> None:
    """While merging runs, the guest also boots from one kind of kernel to the other and back."""
    backends = EVERY_BACKEND if ROUNDS > 3 else EVERY_BACKEND[::2]
    guests = [
        rebooting_vm(boot, tmp_path, backend, KINDS[:: 1 if place % 2 == 0 else -1], device)
        for place, backend in enumerate(backends)
    ]
    members = when_ready([each.vm for each in guests])
    with serving(settings(), members) as served:
        figures = run_rounds(served, guests, ROUNDS)
        print(figures)
        has_stores = [store_pages(each.vm) > 0 for each in guests]
    assert (figures.rounds, figures.wrong_pages) == (ROUNDS * len(guests), 0)
    assert has_stores == [device == OFF] * len(guests)
    assert min(figures.kexecs, figures.resets) >= len(guests)
    assert figures.discarded_bytes > ROUNDS * 16 * MIB
    assert figures.most_merged_pages > 1000 * len(guests)
    assert_unharmed(*(each.vm for each in guests))


@pytest.mark.timeout(300 + 120 * ROUNDS)
def test_rounds_with_kernels_that_poison_free_pages(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """They check what they filled; only QEMU's default device tells it to keep that."""
    chosen = [(SHARED, (POISONS, "")), (EVERY_BACKEND[2], ("", POISONS))]
    guests = [rebooting_vm(boot, tmp_path, backend, kinds) for backend, kinds in chosen]
    members = when_ready([each.vm for each in guests])
    with serving(settings(), members) as served:
        figures = run_rounds(served, guests, ROUNDS)
        print(figures)
    assert (figures.rounds, figures.wrong_pages) == (ROUNDS * len(guests), 0)
    assert min(figures.kexecs, figures.resets) >= len(guests)
    assert figures.most_merged_pages > 1000 * len(guests)
    assert_unharmed(*(each.vm for each in guests))
