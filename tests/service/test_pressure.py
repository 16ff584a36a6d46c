"""Merging under memory pressure: the real daemon at the memory this host has now."""

from __future__ import annotations

import time

import pytest

from tests.harness.kernel import becomes_true
from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import (
    Daemon,
    Directories,
    assert_unharmed,
    monitors,
    running,
    store_pages,
)
from vmdedup.linux.meminfo import memory_bytes

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

BUSY = ["advisor_mode=none", "sleep_millisecs=1", "pages_to_scan=100000"]
"""Passes follow each other at once, so that a pause of some turns is one of merging."""
MOST_PERCENT = 90


def available_percent() -> float:
    available_bytes, total_bytes = memory_bytes()
    return 100 * available_bytes / total_bytes


def passes(daemon: Daemon) -> int:
    return daemon.client.health().engine.passes


def goes_on(daemon: Daemon) -> bool:
    before = passes(daemon)
    return becomes_true(lambda: passes(daemon) > before + 1, 10)


def pauses(daemon: Daemon) -> bool:
    time.sleep(0.6)
    before = passes(daemon)
    time.sleep(1)
    return passes(daemon) == before


def test_merging_follows_the_thresholds(directories: Directories, start: Start) -> None:
    """Both edges, crossed by moving them over the memory that is available."""
    vms = [start(SHARED), start(PRIVATE)]
    # A host that is all but empty gets some use, for an edge above what it has.
    available_bytes, total_bytes = memory_bytes()
    used = bytearray(max(0, available_bytes - total_bytes * MOST_PERCENT // 100))
    used[::4096] = b"x" * len(used[::4096])
    percent = int(available_percent())
    above, below = percent + 5, percent - 40
    if below < 1:
        pytest.skip(f"only {percent}% of memory is available: no room for a threshold below")
    controls = [word for control in BUSY for word in ("--controls", control)]
    first = ["--controls", f"pressure_threshold_percent={below}"]
    with running(directories, *controls, *first, *monitors(*vms)) as daemon:
        assert becomes_true(lambda: len(daemon.names()) == len(vms), 10)
        assert pauses(daemon)
        assert passes(daemon) == 0
        daemon.client.set(pressure_threshold_percent=above, pressure_hysteresis_percent=0)
        assert becomes_true(lambda: min(map(store_pages, vms)) > 200, 30)

        # Above the threshold, below the upper edge: what was begun goes on.
        daemon.client.set(pressure_threshold_percent=below, pressure_hysteresis_percent=45)
        assert goes_on(daemon)
        daemon.client.set(pressure_hysteresis_percent=5)
        assert pauses(daemon)
        # The same edges again: what paused does not begin between them.
        daemon.client.set(pressure_hysteresis_percent=45)
        assert pauses(daemon)
        assert min(map(store_pages, vms)) > 200, "what is merged stays merged"

        assert daemon.client.merge(timeout_s=60).converged, "whoever asks for it is served"
        assert pauses(daemon)
        daemon.client.set(pressure_threshold_percent=0)
        assert goes_on(daemon)
        said = daemon.happened("pressure")
        assert [line.split(": ")[1] for line in said] == [
            *("merging pauses", "merging goes on") * 2,
        ]
        assert_unharmed(*vms)
    del used


def test_the_density_of_huge_pages_follows_memory(directories: Directories, start: Start) -> None:
    """Half of it below the threshold, and an event that tells so."""
    vm = start(PRIVATE)
    controls = [word for control in BUSY for word in ("--controls", control)]
    controls += ["--controls", "huge_page_density=300"]
    with running(directories, *controls, *monitors(vm)) as daemon:
        assert becomes_true(lambda: passes(daemon) > 2, 20)
        host = daemon.client.report().host
        assert host.huge_pages is not None
        assert host.huge_pages_split is not None
        # 99: more than any host has available; half of that, most hosts have.
        daemon.client.set(pressure_threshold_percent=99, pressure_hysteresis_percent=0)
        assert becomes_true(lambda: bool(daemon.happened("pressure")), 10)
        daemon.client.set(pressure_threshold_percent=0, huge_page_density=0)
        assert goes_on(daemon)
        said = [line for line in daemon.happened("pressure") if "huge pages" in line]
        assert "huge pages are split from 150 savable pages on" in said[0]
        assert_unharmed(vm)
