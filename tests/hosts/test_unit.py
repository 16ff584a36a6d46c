"""The shipped systemd unit, run by a real systemd: merged, killed, stopped, frozen, out of memory.

Whatever happens to the unit, the VMs beside it run on with right memory, and the next start
finds what is merged.
"""

from __future__ import annotations

import pytest

from tests.hosts.inner import InnerVm
from tests.hosts.unit import Unit

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]


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
