"""Memory that is short: a real daemon, real VMs in a memory cgroup, and sharers that write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.limits import memory_group_missing
from tests.harness.monitor import qmp
from tests.qemu.conftest import Need
from tests.service.daemon import Directories, assert_unharmed
from tests.service.storm import MIB, SHARED_MIB, SLOW_PER_S, SPARE_MIB, Storm, runs, storm

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root", "_grouped")]


@pytest.fixture
def _grouped(need: Need) -> None:
    need(memory_group_missing())


def assert_all_well(held: Storm) -> None:
    assert held.group.kills == 0
    assert all(vm.alive for vm in held.vms)
    assert_unharmed(*held.vms)
    assert not list(held.daemon.directories.runtime.glob("stopped-*"))


def test_the_report_says_beforehand_what_happens_without_the_steps(
    directories: Directories,
) -> None:
    with storm(directories) as held:
        assert not held.place().is_lacking
        held.tighten()
        place = held.place()
        pages = sum(
            row.merged_pages + row.zero_pages for row in held.daemon.client.report(fresh=True).vms
        )
        assert place.needed_bytes == pages * 4096
        assert place.needed_bytes > 3 * SHARED_MIB * MIB
        assert abs(place.available_bytes - SPARE_MIB * MIB) < 8 * MIB
        assert place.is_lacking
        assert sorted(place.vms) == ["s0", "s1", "s2"]
        host = held.daemon.client.report(fresh=True).memory[0]
        assert (host.place, host.needed_bytes) == ("host", place.needed_bytes)
        checks = json.loads(directories.verb("doctor", "--json").stdout)["checks"]
        said = [check for check in checks if "if all is written" in check["found"]]
        assert [check["verdict"] for check in said] == ["fine", "note"]
        assert place.place.rsplit("/", 1)[1] in said[1]["name"]
        assert held.group.kills == 0
        held.break_loose()
        assert becomes_true(lambda: held.group.kills > 0, 60), held.place()


def test_no_vm_is_killed_with_pausing_on(directories: Directories) -> None:
    with storm(directories, "shortage_pause=1") as held:
        held.tighten()
        held.break_loose()
        assert becomes_true(lambda: bool(held.daemon.happened("paused")), 60)
        assert becomes_true(lambda: len(held.paused()) == len(held.vms), 60)
        assert held.group.kills == 0
        directories.verb("doctor", code=3)
        assert sorted(held.place().paused_vms) == ["s0", "s1", "s2"]
        held.group.set_limit(None)
        assert becomes_true(lambda: not held.paused(), 60)
        assert held.daemon.happened("memory-enough")
        assert_all_well(held)


def test_what_a_user_stopped_stays_stopped_and_what_he_resumed_runs(
    directories: Directories,
) -> None:
    with storm(directories, "shortage_pause=1") as held:
        stopped, resumed = held.vms[0], held.vms[1]
        qmp(stopped.test_qmp_path, "stop")
        held.tighten(40)
        for vm in held.vms[1:]:
            vm.set_rewrite_rate(SLOW_PER_S)
            vm.go()
        assert becomes_true(lambda: resumed in held.paused(), 60)
        qmp(resumed.test_qmp_path, "cont")
        assert becomes_true(lambda: "by somebody else" in str(held.daemon.happened("resumed")), 10)
        assert becomes_true(lambda: held.vms[2] in held.paused(), 60)
        assert runs(resumed), "it is the user's now"
        qmp(resumed.test_qmp_path, "stop")
        held.group.set_limit(None)
        assert becomes_true(lambda: runs(held.vms[2]), 60)
        assert held.paused() == [stopped, resumed]
        for vm in (stopped, resumed):
            qmp(vm.test_qmp_path, "cont")
        assert_all_well(held)


def test_turning_it_off_and_the_end_of_the_daemon_resume(directories: Directories) -> None:
    with storm(directories, "shortage_pause=1") as held:
        held.tighten(40)
        held.break_loose(SLOW_PER_S)
        assert becomes_true(lambda: bool(held.paused()), 60)
        held.daemon.client.set(shortage_pause=0)
        assert becomes_true(lambda: not held.paused(), 10)
        held.daemon.client.set(shortage_pause=1)
        assert becomes_true(lambda: bool(held.paused()), 60)
        held.group.set_limit(None)
        held.daemon.end()
        assert not held.paused()
        assert_all_well(held)


HOOK = """#!/bin/sh
cat > {folder}/$$.json
env > {folder}/$$.env
{then}
"""


@pytest.mark.parametrize("then", ["exit 3", "sleep 600 & wait"])
def test_the_program_is_told_and_holds_nobody_up(
    directories: Directories, tmp_path: Path, then: str
) -> None:
    program = tmp_path / "hook"
    program.write_text(HOOK.format(folder=tmp_path, then=then))
    program.chmod(0o700)
    directories.write(f'memory_hook = ["{program}"]\nmemory_hook_timeout_s = 2\n')
    with storm(directories, "shortage_hook=1") as held:
        held.tighten(40)
        assert becomes_true(lambda: bool(held.daemon.happened("hook")), 60)
        (ended,) = held.daemon.happened("hook")
        assert ended == f"{program} " + (
            "ended with 3" if then == "exit 3" else "was killed after 2 s"
        )
        (told,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
        assert told["event"] == "memory-short"
        (place,) = told["memory"]
        assert place["place"] == str(held.group.folder)
        assert place["short"]
        (environment,) = tmp_path.glob("*.env")
        names = {line.partition("=")[0] for line in environment.read_text().splitlines()}
        assert names <= {"PATH", "PWD", "SHLVL", "_"}
        held.group.set_limit(None)
        assert becomes_true(lambda: len(list(tmp_path.glob("*.json"))) == 2, 60)
        assert not held.paused()
        assert_all_well(held)


def test_a_program_must_be_named_before_it_can_be_turned_on(directories: Directories) -> None:
    with storm(directories) as held:
        done = directories.verb("set", "shortage_hook=1", code=1)
        assert "memory_hook" in done.stderr
        directories.write('memory_hook = ["/bin/true"]\n')
        held.daemon.signal(1)
        assert becomes_true(lambda: bool(held.daemon.happened("reloaded")), 10)
        directories.verb("set", "shortage_hook=1")
