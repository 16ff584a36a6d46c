"""The VMA budget on a real VM: kept, told, and enough when raised as told."""

from __future__ import annotations

import threading

import pytest

from tests.harness.kernel import mappings
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import (
    Member,
    assert_nothing_of_ours,
    assert_report_is_true,
    attached,
    boot_fleet,
    frozen,
    merge,
)

pytestmark = pytest.mark.qemu

HELD = {"mib": 4, "hold": 1, "run_pages": 2, "check_per_s": 8192}
SCRATCH_VMAS = 5
"""Of a session, beside guest RAM: stub, table, and the store between two pages of ours."""


class Watch:
    """The most mappings that a VM has had, looked at all the time by a thread."""

    def __init__(self, member: Member) -> None:
        self._pid = member.pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most = 0

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, len(mappings(self._pid)))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize(
    "backend", [Backend("memfd", mib=16), Backend("ram", share=False, mib=16)], ids=["memfd", "ram"]
)
def test_budget_is_kept_and_the_need_is_told(
    settings: MakeSettings, boot: Boot, backend: Backend
) -> None:
    (member,) = boot_fleet(boot, [backend], parameters=HELD)
    budget = len(mappings(member.pid)) + 150
    with frozen([member]):
        before = member.snapshot()
        with Watch(member) as watch:
            scarce = merge(settings(controls={"vma_budget": budget}), [member])
        print(budget, watch.most, scarce.vms)
        assert watch.most <= budget + SCRATCH_VMAS
        (vm,) = scarce.vms
        assert vm.deferred_pages
        assert vm.needed_max_map_count
        assert vm.merged_pages + vm.zero_pages > 300
        assert_report_is_true(scarce, [member])

        enough = vm.needed_max_map_count - settings().vma_headroom
        assert enough > budget
        with Watch(member) as watch:
            ample = merge(settings(controls={"vma_budget": enough}), [member])
        print(enough, watch.most, ample.vms)
        assert watch.most <= enough + SCRATCH_VMAS
        (vm,) = ample.vms
        assert (vm.deferred_pages, vm.needed_max_map_count) == (0, None)
        assert ample.host.saved_bytes > scarce.host.saved_bytes
        assert_report_is_true(ample, [member])
        assert member.still_holds(before)

        # Unmerged and merged again: pieces that the kernel does not join are reckoned with.
        with (
            attached(settings(controls={"vma_budget": budget}), [member]) as dedup,
            Watch(member) as watch,
        ):
            assert dedup.unmerge().vms[0].remaining_pages == 0
            home = len(mappings(member.pid))
            dedup.run(until_converged=True)
        print("home", home, "most", watch.most)
        assert len(mappings(member.pid)) <= max(budget, home)
        with attached(settings(), [member]) as dedup:
            dedup.unmerge()
        assert member.still_holds(before)
    assert_nothing_of_ours(member)
    member.vm.wait_passes(1)
    assert member.vm.errors == 0
