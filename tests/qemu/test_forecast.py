"""What is needed if all is written: it follows a merge as it goes, not only its end."""

from __future__ import annotations

import pytest

from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import boot_fleet, frozen
from tests.qemu.serving import serving
from vmdedup import faults

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

PARAMETERS = {"mib": 28, "shared_mib": 4, "repeat_mib": 1, "zero_mib": 20}
"""So many zero pages that a VM's merge takes several stretches."""


def test_the_need_grows_with_each_stretch_that_is_merged(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = [Backend("memfd", mib=40), Backend("ram", share=False, mib=40)]
    members = boot_fleet(boot, backends, parameters=PARAMETERS)
    with serving(settings(workers=1), members) as served, frozen(members):
        fleet = served.fleet
        fleet.report(converged=None)
        host = fleet.places[0]
        assert (host.name, host.needed_bytes) == ("host", 0)
        seen: list[tuple[str, int]] = []
        monkeypatch.setattr(faults, "hook", lambda step: seen.append((step, host.needed_bytes)))
        served.merge()
        monkeypatch.undo()

        first = next(needed for step, needed in seen if step == "merged")
        before = [needed for step, needed in seen if step == "compared" and needed < first]
        assert any(before), "a part of the first VM's pages was counted while others were left"
        needs = [needed for _, needed in seen]
        assert needs == sorted(needs)
        assert first < needs[-1] == host.needed_bytes

        counted = fleet.report(converged=None).memory[0].needed_bytes
        assert counted == host.needed_bytes, "counted by page tables it is the same"
        assert fleet.places[0].needed_bytes == counted, "and nothing counts twice from then on"
