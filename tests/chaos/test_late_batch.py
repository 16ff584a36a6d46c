"""Calls that a killed engine has launched run late: what they will map is not discarded.

The VM in which they were launched cannot run just then. The next engine sees store pages
that nobody maps. Whether it follows that VM or only others: it must keep them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import halting
from tests.chaos.engines import Driver, Halt
from tests.chaos.fleet import Fleet, becomes_true, is_running, merged_pages
from tests.harness.vm import Backend
from vmdedup.deduplicator import Deduplicator
from vmdedup.remap.domain_store import remove_unused_stores

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

_ONE_BY_ONE = {"mask": ["compiled-gates"], "workers": 1}
_IN_BURSTS = {"workers": 1, "gate_runs": 4}
_LAUNCHES = {
    "inject-guarded": ("verified", _ONE_BY_ONE),
    "burst-launched": ("burst-filled", _IN_BURSTS),
}
"""The step after which the engine dies, and that at which its VM was halted before."""


@pytest.mark.parametrize("launch", _LAUNCHES)
@pytest.mark.parametrize("follows", ["other", "same"])
@pytest.mark.parametrize("how", ["stop", "freeze", pytest.param("starve", marks=pytest.mark.alone)])
def test_what_a_late_batch_maps_is_still_there(
    driver: Driver,
    need: Callable[[str | None], None],
    tmp_path: Path,
    how: Halt,
    follows: str,
    launch: str,
) -> None:
    need(halting.missing(how))
    halt_at, settings = _LAUNCHES[launch]
    with Fleet(tmp_path) as fleet:
        fleet.boot(*({"backend": Backend("memfd", share=share, mib=32)} for share in (True, False)))
        with halting.busy_processor(how):
            engine = driver.run(
                fleet.job(step=launch, halt_at=halt_at, halt=how, settings=settings)
            )
            halted = engine.halted_pid
            assert halted, driver.log.read_text()
            try:
                assert engine.exit_code == -signal.SIGKILL, driver.log.read_text()
                assert becomes_true(lambda: not is_running(engine.guardian))
                before = merged_pages(halted)
                sockets = fleet.sockets
                if follows == "other":
                    sockets = [str(vm.qmp_path) for vm in fleet.vms if vm.pid != halted]
                with Deduplicator(fleet.settings) as dedup:
                    rows = dedup.attach(sockets).vms
                    assert [row.pid for row in rows if row.mergeable] == [
                        vm.pid for vm in fleet.vms if vm.pid != halted
                    ]
                    dedup.run(passes=3)
                    assert not dedup.unmerge().store_removed, "the batch is still to come"
                assert not remove_unused_stores(fleet.settings.store_dir)
                assert merged_pages(halted) == before, "it was not halted"
            finally:
                halting.end(halted, how)
        assert becomes_true(lambda: merged_pages(halted) > before), "nothing ran late"
        fleet.require_all_well()
