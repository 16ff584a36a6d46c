"""An engine that hangs, with or without its guardian, holds no guest for long."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.driver import EXIT_CODE, guardian_pid
from tests.chaos.engines import Driver
from tests.chaos.fleet import (
    BOUND_S,
    HANG_LIMIT_MS,
    Fleet,
    becomes_true,
    held_threads,
    is_running,
    run_state,
)
from tests.chaos.lost import vm_at_hand
from tests.harness.capabilities import root_missing
from tests.harness.disk import Disk, write_image
from tests.harness.monitor import qmp
from tests.harness.throttle import slow_disk, throttle_missing
from tests.harness.vm import Backend
from tests.service.daemon import Directories
from vmdedup import faults
from vmdedup.deduplicator import Deduplicator
from vmdedup.guardian.guardian import Guardian
from vmdedup.guardian.runtime_dir import read_notes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

_GUESTS_MAY_WAIT = {
    "thread held": [
        f"inject-{step}" for step in ("stopped", "frames-written", "table-filled", "copied")
    ],
    "armed": ["registered", "armed", "drained", "looked", "held"],
    "gate": ["gate-closed", "verified", "launched", "gate-done", "compared"],
    "burst": ["burst-closed", "burst-verified", "burst-launched", "burst-completed"],
}
"""Steps after which a guest, or a thread of QEMU, stands still or soon may."""

_PAUSING = {"mask": ["userfaultfd-wp"]}


@pytest.fixture
def no_hook() -> Iterator[None]:
    yield
    faults.hook = None


def _stop_at(driver: Driver, fleet: Fleet, step: str, **choices: Any) -> None:
    """The engine stops itself at `step`; its guardian must kill it soon."""
    engine = driver.start(fleet.job(step=step, action="STOP", **choices))
    assert driver.wait_exit() == -signal.SIGKILL, driver.log.read_text()
    assert becomes_true(lambda: not is_running(engine.guardian))
    assert f"the guardian killed vmdedup (pid {engine.pid})" in driver.log.read_text()
    fleet.require_released()
    fleet.require_unharmed()


@pytest.mark.parametrize("stage", _GUESTS_MAY_WAIT)
def test_a_hanging_engine_is_killed_and_its_guests_go_on(
    driver: Driver, fleet: Fleet, stage: str
) -> None:
    for number, step in enumerate(_GUESTS_MAY_WAIT[stage]):
        _stop_at(driver, fleet, step, occurrence=number % 3)
    fleet.require_all_well()


def test_an_engine_that_hangs_in_an_unmerge_is_killed_too(driver: Driver, fleet: Fleet) -> None:
    for step in ("inject-stopped", "scratch-filled", "checked", "launched"):
        fleet.require_takeover(unmerge=False)
        _stop_at(driver, fleet, step, unmerge=True, merge=False)
    fleet.require_all_well()


def test_an_engine_that_hangs_in_publishing_is_killed_too(driver: Driver, fleet: Fleet) -> None:
    """The VM is armed then: what is copied may not change."""
    for step in ("sums-written", "published"):
        _stop_at(driver, fleet, step, unmerge=True)
    fleet.require_all_well()


def test_where_nobody_waits_a_hanging_engine_is_left_alone(driver: Driver, fleet: Fleet) -> None:
    for step in ("lent", "handed-over", "merged"):
        engine = driver.start(fleet.job(step=step, action="STOP", settings={"workers": 1}))
        assert becomes_true(lambda pid=engine.pid: str(pid) in held_threads(pid))  # type: ignore[misc]
        fleet.require_unharmed()
        time.sleep(2 * HANG_LIMIT_MS / 1000)
        assert is_running(engine.pid)
        driver.end()
    fleet.require_all_well()


@pytest.mark.parametrize("step", ["stopped", "launched"])
def test_an_engine_that_hangs_while_a_vm_is_paused_is_killed_and_the_vm_resumed(
    driver: Driver, fleet: Fleet, step: str
) -> None:
    engine = driver.start(fleet.job(step=step, occurrence=2, action="STOP", settings=_PAUSING))
    assert driver.wait_exit(BOUND_S) == -signal.SIGKILL, driver.log.read_text()
    assert becomes_true(lambda: not is_running(engine.guardian))
    assert read_notes(fleet.settings.runtime_dir) == []
    fleet.require_all_well()


def test_without_engine_and_guardian_the_next_engine_resumes_exactly_the_noted_vm(
    driver: Driver, tmp_path: Path
) -> None:
    with Fleet(tmp_path, **_PAUSING) as fleet:
        fleet.boot({}, {"backend": Backend("ram", share=False, mib=32)})
        paused_by_user, other = fleet.vms
        qmp(paused_by_user.test_qmp_path, "stop")
        driver.run(fleet.job(step="stopped", occurrence=1, action="KILL_BOTH"))
        assert run_state(other) == "paused", "nobody is there to resume it"
        ((_, note),) = read_notes(fleet.settings.runtime_dir)
        assert note.pid == other.pid
        with Deduplicator(fleet.settings) as dedup:
            dedup.attach(fleet.sockets)
            assert run_state(other) == "running"
            assert read_notes(fleet.settings.runtime_dir) == []
            dedup.run(passes=2)
            # Not `ok`: a VM that does not run keeps descriptors that were lent to it.
            assert [row.wrong_pages for row in dedup.verify().vms] == [0, 0]
            assert run_state(paused_by_user) == "paused"
        assert run_state(paused_by_user) == "paused"
        qmp(paused_by_user.test_qmp_path, "cont")
        fleet.require_all_well()


def test_who_was_left_paused_is_told_by_every_verb_and_resumed_by_one(
    driver: Driver, tmp_path: Path
) -> None:
    with Fleet(tmp_path, **_PAUSING) as fleet, Directories() as directories:
        fleet.boot({}, {})
        one_by_one = {"workers": 1}
        driver.run(fleet.job(step="stopped", action="KILL_BOTH", settings=one_by_one))
        (paused,) = [vm for vm in fleet.vms if run_state(vm) == "paused"]
        directories.runtime = fleet.settings.runtime_dir
        for verb in ("vms", "report"):  # only read: the next engine would resume it
            told = directories.verb(verb, "--qmp", str(tmp_path / "none"), code=1).stderr
            assert f"{paused.name} (pid {paused.pid})" in told
            assert "`vmdedup resume`" in told
        done = directories.verb("resume")
        assert done.stdout == f"{paused.name}: not paused by vmdedup any more\n"
        assert done.stderr == ""
        assert [run_state(vm) for vm in fleet.vms] == ["running", "running"]
        assert directories.verb("resume").stdout == ""
        fleet.require_all_well()


@pytest.mark.usefixtures("no_hook")
def test_a_vm_that_does_not_answer_in_a_pause_is_left_to_the_guardian(tmp_path: Path) -> None:
    """The engine lives and goes on; the VM is resumed once it can be."""
    with Fleet(tmp_path, **_PAUSING) as fleet:
        fleet.boot({}, {})
        silent: list[int] = []

        def silence(step: str) -> None:
            if step == "stopped" and not silent:
                attached = vm_at_hand()
                assert attached is not None
                silent.append(attached.pid)
                os.kill(attached.pid, signal.SIGSTOP)

        with Deduplicator(fleet.settings) as dedup:
            dedup.attach(fleet.sockets)
            faults.hook = silence
            try:
                report = dedup.run(passes=2)
                faults.hook = None
                assert len(silent) == 1
                told = [row.reason or "" for row in report.vms if row.pid == silent[0]]
                assert [("answer" in line or "SIGSTOP" in line) for line in told] == [True], told
                ((_, note),) = read_notes(fleet.settings.runtime_dir)
                assert (note.pid, note.engine_pid) == (silent[0], 0)
                others = [row for row in report.vms if row.pid != silent[0]]
                assert all(row.merged_pages for row in others)
            finally:
                os.kill(silent[0], signal.SIGCONT)
            # By the guardian, or where we have the only monitor by us: a daemon looks by itself.
            assert becomes_true(lambda: _is_noted_no_more(dedup, fleet))
            assert {run_state(vm) for vm in fleet.vms} == {"running"}
        fleet.require_all_well()


def _is_noted_no_more(dedup: Deduplicator, fleet: Fleet) -> bool:
    dedup.run(passes=1)
    return read_notes(fleet.settings.runtime_dir) == []


@pytest.mark.usefixtures("no_hook")
def test_a_guardian_goes_on_after_an_engine_that_ended_in_order(tmp_path: Path) -> None:
    """Its VM does not answer when the engine closes: nobody waits, and it is resumed later."""
    with Fleet(tmp_path, **_PAUSING) as fleet:
        fleet.boot({})
        (vm,) = fleet.vms

        def silence(step: str) -> None:
            if step == "stopped":
                os.kill(vm.pid, signal.SIGSTOP)

        try:
            with Deduplicator(fleet.settings) as dedup:
                dedup.attach(fleet.sockets)
                guardian = guardian_pid(dedup)
                faults.hook = silence
                dedup.run(passes=2)
                faults.hook = None
            assert is_running(guardian), "it has a VM to resume"
        finally:
            os.kill(vm.pid, signal.SIGCONT)
        assert becomes_true(lambda: not is_running(guardian))
        assert run_state(vm) == "running"
        fleet.require_all_well()


@pytest.mark.usefixtures("no_hook")
def test_a_vm_that_is_resumed_by_others_in_the_middle_is_paused_anew(tmp_path: Path) -> None:
    """Whoever resumes a VM that we count on to stand still must not harm its guest."""
    with Fleet(tmp_path, gate_runs=4, stop_budget_ms=1000, **_PAUSING) as fleet:
        fleet.boot({})
        (vm,) = fleet.vms
        qmp(vm.test_qmp_path, "stop")
        held: list[str] = []

        def resume(step: str) -> None:
            if step == "gate-done":
                held.append(run_state(vm))
                qmp(vm.test_qmp_path, "cont")

        with Deduplicator(fleet.settings) as dedup:
            dedup.attach(fleet.sockets)
            faults.hook = resume
            report = dedup.run(passes=1)
        assert len(held) > 2
        assert set(held) == {"paused"}
        assert len(report.vms) == 1
        assert (report.vms[0].stops or 0) > 2
        fleet.require_all_well()


def test_a_pause_that_waits_for_a_slow_disk_is_no_hang(
    driver: Driver, tmp_path: Path, need: Callable[[str | None], None]
) -> None:
    """QEMU's `stop` answers after the slowest request: here long after the hang limit."""
    need(root_missing() or throttle_missing(tmp_path))
    disk = Disk(write_image(tmp_path / "image", mib=4))
    reading = {"dma": 1, "dma_mib": 1, "dma_depth": 64, "dma_hold_ms": 10, "check_per_s": 2048}
    with slow_disk(tmp_path, iops=40) as slow, Fleet(tmp_path, **_PAUSING) as fleet:
        backend = Backend(mib=96)
        fleet.boot({"guest": "tiny", "backend": backend, "disk": disk, "parameters": reading})
        (vm,) = fleet.vms
        slow.write_text(str(vm.pid))
        read = vm.status().dma_reads
        vm.wait_status(lambda now, start: now.dma_reads > start.dma_reads + 64)
        began = time.monotonic()
        qmp(vm.test_qmp_path, "stop")
        assert (time.monotonic() - began) * 1000 > 2 * HANG_LIMIT_MS
        qmp(vm.test_qmp_path, "cont")
        engine = driver.run(fleet.job(step="resumed", occurrence=2, action="EXIT"))
        assert engine.exit_code == EXIT_CODE, "the guardian killed it"
        assert vm.status().dma_reads > read
        fleet.require_released()
        assert vm.errors == 0, vm.serial.complaints()


def test_a_guardian_that_does_not_listen_is_replaced_and_ended(tmp_path: Path) -> None:
    with Guardian(tmp_path, 1000) as guardian:
        deaf = guardian.pid
        os.kill(deaf, signal.SIGSTOP)
        for _ in range(1 << 17):  # more than its pipe holds
            with guardian.watching():
                pass
            if guardian.pid != deaf:
                break
        assert guardian.pid != deaf
        assert not is_running(deaf)
        os.kill(guardian.pid, signal.SIGSTOP)
        last = guardian.pid
    assert not is_running(last)


def test_a_killed_guardian_is_replaced_before_the_next_arm(fleet: Fleet) -> None:
    with Deduplicator(fleet.settings) as dedup:
        dedup.attach(fleet.sockets)
        for passes in (1, 2):
            killed = guardian_pid(dedup)
            os.kill(killed, signal.SIGKILL)
            report = dedup.run(passes=passes)
            assert {row.status for row in report.vms} <= {"scanning", "merged"}
            assert guardian_pid(dedup) != killed
            assert is_running(guardian_pid(dedup))
    fleet.require_all_well()
