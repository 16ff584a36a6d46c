"""The guardian and an engine that gets no processor: a busy host is no hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.process.victims import fork_and
from vmdedup.guardian import Guardian

pytestmark = pytest.mark.process

HANG_LIMIT_MS = 300
STARVED_S = 2.0


@pytest.fixture
def one_processor() -> int:
    """A processor on which a real-time thread can keep others waiting."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        pytest.skip("real-time scheduling is not permitted here")
    return max(os.sched_getaffinity(0))


def beating(runtime: Path, processor: int, report: int) -> None:
    """An armed engine on that processor that shows every 10 ms that it lives."""
    with Guardian(runtime, HANG_LIMIT_MS) as guardian, guardian.watching():
        os.sched_setaffinity(0, {processor})
        os.write(report, b"x")
        longest_s, last = 0.0, time.monotonic()
        until = last + STARVED_S
        while last < until:
            guardian.beat()
            time.sleep(0.01)
            now = time.monotonic()
            longest_s, last = max(longest_s, now - last), now
        os.write(report, b"%d" % (longest_s * 1000))


def hog(processor: int) -> None:
    os.sched_setaffinity(0, {processor})
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    until = time.monotonic() + STARVED_S
    while time.monotonic() < until:
        pass


def test_an_engine_without_a_processor_is_not_killed(tmp_path: Path, one_processor: int) -> None:
    hear, report = os.pipe()
    engine = fork_and(lambda: beating(tmp_path, one_processor, report))
    hogs = []
    try:
        assert os.read(hear, 1) == b"x"
        hogs.append(fork_and(lambda: hog(one_processor)))
        assert os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1]) == 0
        assert int(os.read(hear, 16)) > HANG_LIMIT_MS, "it was never kept waiting"
    finally:
        for child in hogs:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(hear)
        os.close(report)


def test_an_engine_that_spins_is_killed(tmp_path: Path) -> None:
    def spin() -> None:
        with Guardian(tmp_path, HANG_LIMIT_MS) as guardian, guardian.watching():
            while True:
                pass

    engine = fork_and(spin)
    assert os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1]) == -signal.SIGKILL
