"""A control that changes has done again only what it makes void, on the engine at work."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import boot_fleet, frozen
from tests.qemu.serving import Serving, serving
from vmdedup.controls import Controls
from vmdedup.daemon.steering import apply_controls
from vmdedup.policy.invalidation import REDONE, Redo

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

OTHERS: dict[str, Any] = {
    "run": 0,
    "pages_to_scan": 77,
    "sleep_millisecs": 77,
    "max_kernel_pages": 1 << 20,
    "max_page_sharing": 77,
    "use_zero_pages": 0,
    "smart_scan": 0,
    "advisor_mode": "none",
    "advisor_target_scan_time": 77,
    "advisor_max_cpu": 77,
    "advisor_min_pages_to_scan": 77,
    "advisor_max_pages_to_scan": 7777,
    "vma_budget": 7777,
    "gate_deadline_ms": 77,
    "huge_page_density": 77,
    "pressure_threshold_percent": 7,
    "pressure_hysteresis_percent": 7,
    "reserve_bytes": 77,
    "reserve_percent": 7,
    "shortage_say": 0,
    "shortage_page_out": 1,
    "shortage_hook": 1,
    "shortage_pause": 1,
    "cold_after_s": 777,
    "cold_max_refaults": 77,
    "cold_max_cpu": 77,
    "merge_across_nodes": 0,
}
"""Another value than the default, for each control."""


def test_each_control_redoes_what_it_is_said_to(settings: MakeSettings, boot: Boot) -> None:
    assert OTHERS.keys() == Controls.model_fields.keys()
    members = boot_fleet(boot, [Backend("memfd", mib=16)] * 2)
    own = settings()
    with serving(own, members) as served:
        apply_controls(served.fleet, own, Controls())
        with frozen(members):
            served.merge()
            for name, value in OTHERS.items():
                changed = Controls().model_copy(update={name: value})
                assert redone(served, changed) is REDONE[name], name
                apply_controls(served.fleet, own, Controls())
                served.merge(1)


def redone(served: Serving, changed: Controls) -> Redo:
    """What the engine forgets when these controls are applied."""
    engine = served.fleet.engine
    merges, stores = engine._merges, engine.stores
    left, is_open = dict(merges._left), dict(stores._open)
    assert left
    assert is_open
    apply_controls(served.fleet, served.fleet.settings, changed)
    if stores._open != is_open:
        assert not merges._left
        return Redo.DIGESTS
    return Redo.NOTHING if merges._left == left else Redo.NOMINATION


def test_a_vm_that_is_attached_gets_the_budget_that_is_set(
    settings: MakeSettings, boot: Boot
) -> None:
    own = settings()
    with serving(own, boot_fleet(boot, [Backend("memfd", mib=16)])) as served:
        served.merge(1)
        engine = served.fleet.engine
        (vm,) = engine.vms
        before = engine.vma_budget(vm)
        apply_controls(served.fleet, own, Controls(vma_budget=before - 1000))
        assert engine.vma_budget(vm) < before - 900
