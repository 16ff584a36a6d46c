"""The guardian and an engine that gets no processor: a busy host is no hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.chaos.fleet import becomes_true, is_running
from tests.process.victims import fork_and
from vmdedup.guardian.guardian import Guardian
from vmdedup.guardian.process import LANES

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


@pytest.mark.alone  # so does all else on that processor
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


def spin(runtime: Path, stderr: int, report: int) -> None:
    """An armed engine that shows no sign of life; it reports its guardian's pid."""
    os.dup2(stderr, 2)
    with Guardian(runtime, HANG_LIMIT_MS) as guardian, guardian.watching():
        os.write(report, b"%d" % guardian.pid)
        while True:
            pass


@pytest.mark.parametrize("is_full", [False, True], ids=["read", "full"])
def test_an_engine_that_spins_is_killed_and_its_stderr_says_why(
    tmp_path: Path, is_full: bool
) -> None:
    """Nobody has to read it, and it ends before the guardian may."""
    (hear, report), (errors, stderr) = os.pipe(), os.pipe()
    if is_full:
        os.set_blocking(stderr, False)
        with suppress(BlockingIOError):
            while True:
                os.write(stderr, b"." * 4096)
        os.set_blocking(stderr, True)
    engine = fork_and(lambda: spin(tmp_path, stderr, report))
    os.close(stderr)
    try:
        guardian = int(os.read(hear, 16))
        assert os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1]) == -signal.SIGKILL
        assert becomes_true(lambda: not is_running(guardian))
        with open(errors, "rb", closefd=False) as file:
            said = file.read().lstrip(b".").decode()
        assert said.startswith(f"vmdedup: the guardian killed vmdedup (pid {engine}): one of")
        assert f"(hang_limit_ms = {HANG_LIMIT_MS})" in said
        assert said.endswith("the next vmdedup goes on\n")
    finally:
        for fd in (hear, report, errors):
            os.close(fd)


def test_a_thread_that_hangs_is_not_hidden_by_one_that_lives(tmp_path: Path) -> None:
    """Nor by what it does itself on another's behalf, or does no more."""

    def hang(report: int) -> None:
        with Guardian(tmp_path, HANG_LIMIT_MS) as guardian:

            def live() -> None:
                while True:
                    with guardian.watching() as lane, guardian.watching():
                        lane.beat()
                        guardian.beat()
                        time.sleep(0.01)

            threading.Thread(target=live, daemon=True).start()
            time.sleep(HANG_LIMIT_MS / 1000 * 2)
            os.write(report, b"x")
            with guardian.watching():
                time.sleep(30)

    assert_killed_after_its_report(hang, "while all lived it was let live")


def test_a_patient_lane_may_be_silent_for_longer_but_not_for_ever(tmp_path: Path) -> None:
    def hang(report: int) -> None:
        with (
            Guardian(tmp_path, HANG_LIMIT_MS) as guardian,
            guardian.watching(apart=True, patience_ms=4 * HANG_LIMIT_MS),
        ):
            time.sleep(HANG_LIMIT_MS / 1000 * 2.5)
            os.write(report, b"x")
            time.sleep(30)

    assert_killed_after_its_report(hang, "it was killed before its patience was over")


def assert_killed_after_its_report(hang: Callable[[int], None], message: str) -> None:
    """The guardian kills this engine, but not before it has written to the pipe it is given."""
    hear, report = os.pipe()
    engine = fork_and(lambda: hang(report))
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1]) == -signal.SIGKILL
        os.set_blocking(hear, False)
        assert os.read(hear, 1) == b"x", message
    finally:
        os.close(hear)
        os.close(report)


def test_lanes_are_used_again(tmp_path: Path) -> None:
    """More threads than there are lanes, one after the other, and one that ends elsewhere."""
    with Guardian(tmp_path, 10_000) as guardian:
        for _ in range(3 * LANES):
            watch = guardian.watching()
            lane = watch.__enter__()
            ends = threading.Thread(target=watch.__exit__, args=(None, None, None))
            ends.start()
            ends.join()
            assert not lane.is_armed
            guardian.beat()
        with guardian.watching() as first, guardian.watching() as second:
            assert first is second
            assert first.is_armed
        assert not first.is_armed
