"""Pauses for lack of memory: QEMUs that migrate or are silent, and a guardian that was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.process.victims import fork_and
from tests.qemu.machine import Machine
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.daemon import vm_pauses
from vmdedup.daemon.vm_pauses import Pausable, VmPauses
from vmdedup.errors import VmError
from vmdedup.guardian.guardian import Guardian
from vmdedup.guardian.resume import Resumed, resume_noted
from vmdedup.guardian.runtime_dir import RuntimeDirectory, StopNote, read_notes
from vmdedup.linux.process import read_process_id

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

HANG_LIMIT_MS = 1000

Start = Callable[..., "Qemu"]


class Qemu(Machine):
    """A machine that can be paused."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.name = name
        super().__init__(folder, *arguments, name=name)

    @property
    def status(self) -> str:
        return str(qmp(self.own, "query-status")["status"])

    def pausable(self, loop: MonitorLoop) -> Pausable:
        monitor = QmpMonitor.connect(self.qmp, loop)
        us = read_process_id(os.getpid())
        ticks = read_process_id(self.pid).start_ticks
        note = StopNote(self.name, self.pid, ticks, str(self.qmp), 0, us.pid, us.start_ticks)
        return Pausable(self.name, self.pid, 0, monitor, note)


def closed(vm: Pausable) -> None:
    assert isinstance(vm.monitor, QmpMonitor)
    vm.monitor.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as exits:
        yield lambda name, *arguments: exits.enter_context(Qemu(tmp_path, name, *arguments))


def engine(runtime: Path, work: Callable[[VmPauses, Guardian, MonitorLoop], None]) -> int:
    """An engine with pauses, in a child; its pid."""

    def run() -> None:
        with (
            MonitorLoop() as loop,
            Guardian(runtime, HANG_LIMIT_MS) as guardian,
            VmPauses(RuntimeDirectory(runtime), guardian) as pauses,
        ):
            work(pauses, guardian, loop)

    return fork_and(run)


def test_a_vm_that_migrates_is_not_paused_and_a_paused_one_is_resumed(
    start: Start, tmp_path: Path
) -> None:
    there = f"unix:{tmp_path}/there"
    with (
        MonitorLoop() as loop,
        Guardian(tmp_path / "run", 10 * HANG_LIMIT_MS) as guardian,
        VmPauses(RuntimeDirectory(tmp_path / "run"), guardian) as pauses,
    ):
        source = start("source")
        vm = source.pausable(loop)

        start("target", "-incoming", there)
        qmp(source.own, "migrate-set-parameters", **{"max-bandwidth": 1000})
        assert becomes_true((tmp_path / "there").exists, 30)
        qmp(source.own, "migrate", uri=there)
        assert not pauses.pause(vm)
        assert source.status == "running"

        qmp(source.own, "migrate_cancel")
        assert becomes_true(lambda: qmp(source.own, "query-migrate")["status"] == "cancelled", 30)
        assert pauses.pause(vm)
        assert (pauses.migrating(), source.status) == ([], "paused")
        (tmp_path / "there").unlink(missing_ok=True)
        target = start("other", "-incoming", there)
        assert becomes_true((tmp_path / "there").exists, 30)
        qmp(source.own, "migrate", uri=there)
        assert pauses.migrating() == [vm.pid]
        pauses.resume(vm.pid)
        qmp(source.own, "migrate-set-parameters", **{"max-bandwidth": 1 << 30})
        assert becomes_true(lambda: source.status == "postmigrate", 30)
        assert becomes_true(lambda: target.status == "running", 30)
        closed(vm)


def test_a_libvirt_that_comes_back_ends_no_pause_for_memory(start: Start, tmp_path: Path) -> None:
    """The daemon then resumes what it could not resume while libvirt was away, by the notes."""
    runtime = RuntimeDirectory(tmp_path / "run")
    with (
        MonitorLoop() as loop,
        Guardian(tmp_path / "run", 10 * HANG_LIMIT_MS) as guardian,
        VmPauses(runtime, guardian) as pauses,
    ):
        qemu = start("paused")
        vm = qemu.pausable(loop)
        vm = replace(vm, note=replace(vm.note, monitor_path=str(qemu.own)))
        assert pauses.pause(vm)
        assert resume_noted(runtime.path, pauses=runtime.pauses) == Resumed()
        assert (len(read_notes(runtime.path)), qemu.status) == (1, "paused")
        assert resume_noted(runtime.path).settled == ["paused"], "else it would be one of them"
        assert qemu.status == "running"
        pauses.close()
        closed(vm)


def test_a_silent_vm_beside_a_paused_one_costs_no_engine(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_pauses, "_PATIENCE_MS", 0)
    paused, silent = start("paused"), start("silent")

    def work(pauses: VmPauses, _guardian: Guardian, loop: MonitorLoop) -> None:
        first, second = paused.pausable(loop), silent.pausable(loop)
        assert pauses.pause(first)
        os.kill(second.pid, signal.SIGSTOP)
        with pytest.raises(VmError):
            pauses.pause(second)

    child = engine(tmp_path / "run", work)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert paused.status == "running"
    finally:
        os.kill(silent.pid, signal.SIGCONT)


def test_a_vm_that_falls_silent_in_its_pause_costs_no_engine(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_pauses, "_PATIENCE_MS", 0)
    qemu = start("paused")

    def work(pauses: VmPauses, _guardian: Guardian, loop: MonitorLoop) -> None:
        vm = qemu.pausable(loop)
        assert pauses.pause(vm)
        os.kill(vm.pid, signal.SIGSTOP)
        with pytest.raises(VmError):
            pauses.resume(vm.pid)
        os.kill(vm.pid, signal.SIGCONT)

    child = engine(tmp_path / "run", work)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert becomes_true(lambda: qemu.status == "running", 30)


def test_a_guardian_that_is_killed_in_a_long_pause_is_replaced(
    start: Start, tmp_path: Path
) -> None:
    qemu = start("paused")
    hear, report = os.pipe()

    def work(pauses: VmPauses, guardian: Guardian, loop: MonitorLoop) -> None:
        assert pauses.pause(qemu.pausable(loop))
        first = guardian.pid
        os.kill(first, signal.SIGKILL)
        while guardian.pid == first:
            pauses.beat()
            time.sleep(0.01)
        os.write(report, b"x")
        while True:
            pauses.beat()
            time.sleep(0.01)

    child = engine(tmp_path / "run", work)
    try:
        assert os.read(hear, 1) == b"x"
        assert qemu.status == "paused"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert becomes_true(lambda: qemu.status == "running", 30)
    finally:
        os.close(hear)
        os.close(report)
