"""Launched calls against the death of the engine that launched them.

A batch runs by itself. When its engine dies, the kernel closes the userfaultfd
and lets the waiting writers go on; a call that began after that would remap
pages that were written meanwhile. The sharpest moment is right after the
thread's registers were set: the kernel lets go of the thread, and so starts the
calls, only after it has closed the dead engine's files.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.engines import Driver
from tests.chaos.fleet import Fleet
from tests.harness.vm import Backend

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

_ROUNDS = int(os.environ.get("VMDEDUP_CHAOS_KILLS", "8"))
_QUICK = {"mib": 1, "rewrite_per_s": 20000, "check_per_s": 4096, "run_pages": 1}
"""Bursts of 400 rewrites, 50 times a second, all over the 256 pages that are merged."""


@pytest.mark.parametrize(
    ("settings", "launch"),
    [
        ({}, "inject-guarded"),
        ({"mask": ["in-place"]}, "inject-regs-set"),
        ({"mask": ["userfaultfd-wp"]}, "inject-regs-set"),
        ({"mask": ["stub"]}, "inject-regs-set"),
    ],
    ids=["kept", "live", "stopped", "chain"],
)
def test_calls_launched_before_a_kill_remap_nothing_that_was_written_after(
    driver: Driver, tmp_path: Path, settings: dict[str, Any], launch: str
) -> None:
    ram = Backend("ram", share=False, mib=32)
    with Fleet(tmp_path, first_look_ms=5) as fleet:
        fleet.boot({"parameters": _QUICK}, {"parameters": _QUICK, "backend": ram})
        for round_ in range(_ROUNDS):
            step, after = ((launch, "verified"), ("launched", ""))[round_ % 4 == 3]
            job = fleet.job(step=step, after=after, occurrence=round_ % 3, settings=settings)
            engine = driver.run(job)
            assert engine.exit_code == -signal.SIGKILL, driver.log.read_text()
            fleet.require_released()
            fleet.require_unharmed()
        fleet.require_takeover()
