"""The daemon on VMs as Proxmox VE, KubeVirt and Incus start them, by the documented settings.

Each with real QEMUs in a world of its own (`world.py`); `python -m tests.soak --platforms`
has all of them for long.
"""

from __future__ import annotations

import json

import pytest

from tests.harness.libvirtd import missing
from tests.harness.tool import TOLERANCE_S
from tests.platforms.course import Figures
from tests.platforms.world import run_inside, world_missing
from tests.qemu.conftest import Need

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def _needs_a_world(need: Need) -> None:
    need(world_missing())


def course(platform: str) -> Figures:
    """A short course of one platform."""
    code, said, log = run_inside("tests.platforms", platform)
    assert code == 0, said + log
    figures = Figures(**json.loads(said.splitlines()[-1]))
    print(figures)
    assert figures.problems() == []
    assert min(figures.merged_pages.values()) > 200
    return figures


def test_proxmox(need: Need) -> None:
    figures = course("proxmox")
    assert figures.monitors == {"pve101": "shared", "pve102": "shared"}
    assert figures.tool_answers > 0
    assert figures.tool_longest_s < TOLERANCE_S
    assert_zero_pages_only(figures, "pve101", "pve102")


def test_kubevirt_by_a_second_socket(need: Need) -> None:
    need(missing())
    figures = course("kubevirt")
    names = ["default_vm1", "default_vm2"]
    assert figures.monitors == dict.fromkeys(names, "kept")
    assert_zero_pages_only(figures, *names)


def test_kubevirt_by_the_libvirt_of_a_pod(need: Need) -> None:
    need(missing())
    figures = course("kubevirt-libvirt")
    assert list(figures.merged_pages) == ["default_vm1"]
    assert "only zero pages" in str(figures.hints["default_vm1"])


def test_incus() -> None:
    figures = course("incus")
    assert figures.monitors == {"incus1": "shared"}
    assert figures.tool_answers > 0
    assert figures.store_pages["incus1"] > 0


def assert_zero_pages_only(figures: Figures, by_default: str, with_page_poison_off: str) -> None:
    """Free page reporting leaves zero pages, unless the device has page-poison=off."""
    assert figures.store_pages[by_default] == 0
    assert "only zero pages" in str(figures.hints[by_default])
    assert figures.store_pages[with_page_poison_off] > 0
    assert figures.hints[with_page_poison_off] is None
