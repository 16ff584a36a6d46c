"""`kill -9` of the daemon around a pause for lack of memory leaves no VM paused."""

from __future__ import annotations

import signal

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.limits import memory_group_missing
from tests.qemu.conftest import Need
from tests.service.daemon import Directories, assert_unharmed, killed_at
from tests.service.storm import SLOW_PER_S, next_daemon, storm

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

STEPS = ("shortage-noted", "shortage-stopped", "shortage-resumed")


@pytest.mark.parametrize("step", STEPS)
def test_killed_around_a_pause_for_memory(need: Need, step: str) -> None:
    need(memory_group_missing())
    with (
        Directories() as directories,
        storm(directories, "shortage_pause=1", program=killed_at(step)) as held,
    ):
        held.tighten(40)
        held.break_loose(SLOW_PER_S)
        if step == "shortage-resumed":
            assert becomes_true(lambda: bool(held.paused()), 60)
            held.group.set_limit(None)
        assert held.daemon.process.wait(60) == -signal.SIGKILL
        held.group.set_limit(None)
        assert becomes_true(lambda: not held.paused(), 30)
        assert becomes_true(lambda: not list(directories.runtime.glob("stopped-*")), 30)
        assert_unharmed(*held.vms)
        with next_daemon(held, directories) as after:
            assert after.daemon.client.merge(timeout_s=60).vms
            assert not after.paused()
            assert_unharmed(*after.vms)
        assert held.group.kills == 0
