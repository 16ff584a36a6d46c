"""A hazard that comes at any step before the first gate is seen in time.

For merge and unmerge alike, live and in pauses. COLO stands for all that is refused
outright, as in `test_hazard_reactions`: no device here can pin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, boot_fleet, paths
from tests.qemu.serving import merged_pages, serving, set_capability
from tests.service.daemon import assert_unharmed
from vmdedup import faults
from vmdedup.deduplicator import Deduplicator

pytestmark = pytest.mark.qemu

BUSY = {"mib": 4, "rewrite_per_s": 64, "check_per_s": 8192}
LIVE_STEPS = [
    "lent",
    "inject-opened",
    "userfaultfd-created",
    "userfaultfd-taken",
    "inject-owned",
    "registered",
    "armed",
    "drained",
]
PAUSED_STEPS = ["inject-opened", "noted", "stopped"]
PAUSING: dict[str, Any] = {"mask": ("userfaultfd-wp",)}
WAYS: list[tuple[dict[str, Any], str]] = [({}, step) for step in LIVE_STEPS] + [
    (PAUSING, step) for step in PAUSED_STEPS
]
GATES = ("gate-closed", "held", "launched", "burst-closed")


@pytest.fixture(autouse=True)
def no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what a test sets."""
    monkeypatch.setattr(faults, "hook", None)


def hazard_at(member: Member, step: str) -> Callable[[str], None]:
    """A hook: the hazard comes at that step, once; no gate may be closed after it."""
    came: list[str] = []

    def hook(reached: str) -> None:
        if reached == step and not came:
            came.append(step)
            set_capability(member.vm, "x-colo")
        assert not (came and reached in GATES), f"{reached} after a hazard at {step}"

    return hook


@pytest.mark.parametrize("backend", [Backend("ram", share=False, mib=16), Backend(mib=16)])
def test_a_hazard_that_comes_while_a_merge_is_prepared(
    settings: MakeSettings, boot: Boot, backend: Backend
) -> None:
    (member,) = boot_fleet(boot, [backend], parameters=BUSY)
    for way, step in WAYS:
        with serving(settings(**way), [member]) as served:
            faults.hook = hazard_at(member, step)
            for _ in range(3):
                served.pass_once()
            faults.hook = None
            assert "examined again" in (served.troubles()[0] or ""), (way, step)
            assert merged_pages(member) == 0, (way, step)
            ((_, reason),) = served.fleet.follow_changes()
            assert "COLO" in reason, (way, step)
            set_capability(member.vm, "x-colo", False)
    with serving(settings(), [member]) as served:
        assert served.merge() > 500
    member.vm.wait_passes(1)
    assert member.vm.errors == 0, member.vm.serial.complaints()


@pytest.mark.parametrize("backend", [Backend("ram", share=False, mib=16), Backend(mib=16)])
def test_a_hazard_that_comes_while_an_unmerge_is_prepared(
    settings: MakeSettings, boot: Boot, backend: Backend
) -> None:
    """The VM was examined long before: what was found then says nothing of now."""
    (member,) = boot_fleet(boot, [backend], parameters=BUSY)
    with serving(settings(), [member]) as served:
        assert served.merge() > 500
    standing = merged_pages(member)
    for way, step in [({}, ""), *WAYS]:
        with Deduplicator(settings(**way)) as dedup:
            dedup.attach(paths([member]), refuse=False)
            if step:
                faults.hook = hazard_at(member, step)
            else:
                set_capability(member.vm, "x-colo")
            (left,) = dedup.unmerge().vms
            faults.hook = None
            assert "COLO replication is set up" in (left.reason or ""), (way, step)
            assert left.restored_pages == 0, (way, step)
            set_capability(member.vm, "x-colo", False)
        assert merged_pages(member) == standing, (way, step)
    with Deduplicator(settings()) as dedup:
        dedup.attach(paths([member]))
        assert dedup.unmerge().store_removed
    member.vm.wait_passes(1)
    assert member.vm.errors == 0, member.vm.serial.complaints()


@pytest.mark.parametrize(("changes", "is_unmerged"), [(1, True), (100, False)])
def test_an_unmerge_goes_on_after_a_change_that_is_no_hazard(
    settings: MakeSettings, boot: Boot, changes: int, is_unmerged: bool
) -> None:
    """And not for ever where changes never end: the next one unmerges it."""
    (member,) = boot_fleet(boot, [Backend("ram", share=False, mib=16)], parameters=BUSY)
    with serving(settings(), [member]) as served:
        assert served.merge() > 500
    came: list[str] = []

    def hook(step: str) -> None:
        if step == "drained" and len(came) < changes:
            came.append(step)
            set_capability(member.vm, "auto-converge", len(came) % 2 == 1)

    with Deduplicator(settings()) as dedup:
        dedup.attach(paths([member]))
        faults.hook = hook
        (left,) = dedup.unmerge().vms
        faults.hook = None
        if is_unmerged:
            assert (left.remaining_pages, len(came)) == (0, 1)
        else:
            assert "have just changed; it is examined again first" in (left.reason or ""), left
            assert left.restored_pages == 0
            assert 1 < len(came) < 20
            assert dedup.unmerge().store_removed
    assert_unharmed(member.vm)
