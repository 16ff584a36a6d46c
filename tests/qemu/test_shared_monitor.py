"""A monitor used in turns (`monitor = "shared"`), beside a tool that needs it as Proxmox's do.

The machine may be busy, so what is asserted is the engine's own account of its turns, and
that no command of the tool failed or came to its end of 5 s.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.hanging import Storage, server_missing
from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.tool import TOLERANCE_S, Tool, ask
from tests.qemu.conftest import Boot, MakeSettings, Need
from tests.qemu.fleet import (
    EVERY_BACKEND,
    assert_nothing_of_ours,
    assert_report_is_true,
    boot_fleet,
    frozen,
    open_files,
    paths,
)
from tests.qemu.machine import Machine, alone, backend
from vmdedup.attach.discover import Attachment, Candidate, attach, running_qemus
from vmdedup.attach.identity import identify
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.shared_qmp import MOST_HELD_S, SharedQmpMonitor
from vmdedup.deduplicator import Deduplicator
from vmdedup.errors import AttachError, MonitorError, VmGoneError
from vmdedup.linux.process import Process
from vmdedup.linux.unix_sockets import sockets_with_clients
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import AttachedVm

pytestmark = [pytest.mark.qemu, pytest.mark.both_qemus]


@pytest.fixture
def loop() -> Iterator[MonitorLoop]:
    with MonitorLoop() as running:
        yield running


def turns(dedup: Deduplicator) -> list[SharedQmpMonitor]:
    monitors = [vm.monitor for vm in dedup._attached().engine.vms]
    assert all(isinstance(each, SharedQmpMonitor) for each in monitors)
    return [each for each in monitors if isinstance(each, SharedQmpMonitor)]


def is_left(pid: int, path: Path) -> bool:
    return str(path) not in sockets_with_clients(pid)


@pytest.mark.parametrize("mask", [frozenset(), frozenset({"userfaultfd-wp"})], ids=["live", "stop"])
def test_everything_is_merged_and_unmerged_while_a_tool_uses_the_monitors(
    settings: MakeSettings, boot: Boot, mask: frozenset[str]
) -> None:
    members = boot_fleet(boot, EVERY_BACKEND)
    with ExitStack() as exits:
        tools = [exits.enter_context(Tool(member.vm.qmp_path)) for member in members]
        dedup = exits.enter_context(Deduplicator(settings(monitor="shared", mask=mask)))
        listed = dedup.attach(paths(members))
        assert [(row.mergeable, row.monitor) for row in listed.vms] == [(True, "shared")] * 6
        dedup.run(until_converged=True, timeout_s=60)
        with frozen(members):
            assert_report_is_true(dedup.report(), members)
        assert dedup.report().host.pages_sharing > 0
        used = turns(dedup)
        unmerged = dedup.unmerge()
        assert [each.remaining_pages for each in unmerged.vms] == [0] * 6
        assert max(each.longest_turn_s for each in used) < TOLERANCE_S
    for tool in tools:
        assert tool.failures == []
        assert tool.answered > 0
    for member in members:
        assert_nothing_of_ours(member)
        assert member.run_state() == "running"
        assert member.vm.errors == 0


def test_between_turns_the_socket_is_free(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path) as machine, SharedQmpMonitor.connect(machine.qmp, loop) as monitor:
        assert monitor.status() in ("running", "prelaunch")
        assert becomes_true(lambda: monitor.connection == -1)
        assert becomes_true(lambda: is_left(machine.pid, machine.qmp))
        assert ask(machine.qmp, "tool") == "running"
        with monitor.turn():
            first = monitor.connection
            monitor.status()
            time.sleep(0.1)  # longer than a turn waits for its next command
            monitor.status()
            assert monitor.connection == first
            assert not is_left(machine.pid, machine.qmp)
        assert becomes_true(lambda: is_left(machine.pid, machine.qmp))
        monitor.status()
        assert monitor.connection > first


def test_a_client_that_came_meanwhile_is_served_before_the_next_turn(
    tmp_path: Path, loop: MonitorLoop
) -> None:
    with (
        Machine(tmp_path) as machine,
        SharedQmpMonitor.connect(machine.qmp, loop) as monitor,
        Tool(machine.qmp, pause_s=0) as tool,
    ):
        until = time.monotonic() + 3
        while time.monotonic() < until:
            monitor.status()  # one command after the other: no turn ends by itself
        assert tool.answered > 0
        assert tool.failures == []
        assert monitor.longest_turn_s < TOLERANCE_S


def test_a_block_that_takes_too_long_loses_its_turn(tmp_path: Path, loop: MonitorLoop) -> None:
    """QEMU may have closed what it was lent by then, which `LentFds.copies` sees: test_lent."""
    lent = tmp_path / "lent"
    lent.touch()
    memory = ["-object", backend("memfd", 0, 64), "-machine", "pc,memory-backend=ram0"]
    with Machine(tmp_path, *memory) as machine, lent.open("rb") as file:
        vm = attached_vm(machine, loop)
        try:
            with Tool(machine.qmp, pause_s=0.2) as tool:
                with vm.lent.lending() as lend, vm.monitor.turn():
                    lend(file.fileno(), "test")
                    assert str(lent) in open_files(machine.pid)
                    assert becomes_true(lambda: vm.monitor.connection == -1)
                assert tool.failures == []
        finally:
            vm.close()
        assert becomes_true(lambda: str(lent) not in open_files(machine.pid))


def attached_vm(machine: Machine, loop: MonitorLoop) -> AttachedVm:
    monitor = SharedQmpMonitor.connect(machine.qmp, loop)
    process = Process(monitor.vm, monitor.peer_pid)
    found = Attachment(monitor, process, identify(monitor, process, socket_path=machine.qmp))
    return AttachedVm(found, Settings(), refuse=False)


def test_a_drain_that_does_not_end_is_left_behind(
    tmp_path: Path, loop: MonitorLoop, need: Need
) -> None:
    need(server_missing("nbd"))
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with Storage("nbd", disk, tmp_path) as storage:
        drive = f"file=nbd:unix:{storage.path},format=raw,if=none,id=d0"
        with (
            Machine(tmp_path, "-S", "-drive", drive, "-device", "virtio-blk,drive=d0") as machine,
            SharedQmpMonitor.connect(machine.qmp, loop) as monitor,
        ):
            with storage.hung():
                monitor.hmp('qemu-io d0 "aio_read 0 4k"')
                with pytest.raises(MonitorError, match="no answer within") as raised:
                    monitor.drain()
                assert raised.value.unanswered
                assert monitor.connection == -1
                assert monitor.outage is not None
                assert "transaction" in monitor.outage
                assert monitor.longest_turn_s < TOLERANCE_S
                with socket.socket(socket.AF_UNIX) as other:
                    # The next client's turn: QEMU greets it, though it can do nothing for it yet.
                    other.settimeout(TOLERANCE_S)
                    other.connect(str(machine.qmp))
                    assert b"QMP" in other.recv(16)
            assert becomes_true(lambda: monitor.outage is None)
            assert becomes_true(lambda: answers(monitor))
            assert monitor.drain() > 0


def answers(monitor: SharedQmpMonitor) -> bool:
    try:
        return monitor.status() != ""
    except MonitorError:
        return False


def test_somebody_who_stays_is_waited_for(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path) as machine, SharedQmpMonitor.connect(machine.qmp, loop) as monitor:
        assert becomes_true(lambda: is_left(machine.pid, machine.qmp))
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(machine.qmp))
            assert other.recv(16)
            assert not is_left(machine.pid, machine.qmp)
            with pytest.raises(MonitorError, match="others use its monitor") as raised:
                monitor.status()
            assert raised.value.unanswered
            assert "others use its monitor" in (monitor.outage or "")
        assert becomes_true(lambda: answers(monitor))


def test_a_vm_that_ended_between_turns_is_gone(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path) as machine, SharedQmpMonitor.connect(machine.qmp, loop) as monitor:
        assert becomes_true(lambda: is_left(machine.pid, machine.qmp))
        machine.close()
        with pytest.raises(VmGoneError):
            monitor.status()


def test_another_vm_behind_the_same_path_is_not_taken_for_it(
    tmp_path: Path, loop: MonitorLoop
) -> None:
    with Machine(tmp_path) as machine, Machine(tmp_path, name="other") as other:
        with SharedQmpMonitor.connect(machine.qmp, loop) as monitor:
            assert becomes_true(lambda: is_left(machine.pid, machine.qmp))
            machine.qmp.unlink()
            machine.qmp.symlink_to(other.qmp)
            with pytest.raises(VmGoneError):
                monitor.status()
        assert ask(other.qmp, "tool") == "running"


def test_a_device_replaced_between_turns_is_seen_before_a_gate(
    tmp_path: Path, loop: MonitorLoop
) -> None:
    """Same name and type, so no short look tells; the event came while nobody listened."""
    port = ["-machine", "q35", "-device", "pcie-root-port,id=rp0,chassis=1"]
    port += ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]
    memory = ["-object", backend("memfd", 0, 64), "-machine", "memory-backend=ram0"]
    with Machine(tmp_path, "-S", *port, *memory) as machine:
        qmp(machine.own, "device_add", driver="virtio-balloon-pci", id="b0", bus="rp0")
        vm = attached_vm(machine, loop)
        try:
            assert not vm.has_news_for_gates()
            assert becomes_true(lambda: vm.monitor.connection == -1)
            qmp(machine.own, "device_del", id="b0")
            again = {"driver": "virtio-balloon-pci", "id": "b0", "bus": "rp0"}
            qmp(machine.own, "device_add", **again, **{"free-page-reporting": True})
            assert not vm.has_news()
            assert vm.has_news_for_gates()
        finally:
            vm.close()


def only(machine: Machine) -> Candidate:
    (found,) = [each for each in running_qemus() if each.pid == machine.pid]
    return found


def test_the_socket_that_is_ours_or_free_comes_first(tmp_path: Path, loop: MonitorLoop) -> None:
    ours = tmp_path / "x" / "vmdedup.qmp"
    ours.parent.mkdir()
    extra = ["-qmp", f"unix:{ours},server=on,wait=off"]
    with Machine(tmp_path, *extra) as machine:
        found = attach(only(machine), loop, use="shared")
        try:
            assert found.identity.socket_path == ours
            assert found.identity.keeps_monitor
        finally:
            found.close()
        with SharedQmpMonitor.connect(ours, loop) as monitor, monitor.turn():
            other = attach(only(machine), loop)
            try:
                assert other.identity.socket_path == machine.qmp
            finally:
                other.close()


def test_the_socket_of_a_manager_is_used_in_turns_only(tmp_path: Path, loop: MonitorLoop) -> None:
    folder = tmp_path / "qemu-server"
    folder.mkdir()
    command = ["-chardev", f"socket,id=qmp,path={folder}/100.qmp,server=on,wait=off"]
    command += ["-mon", "chardev=qmp,mode=control"]
    with Machine(tmp_path, *command) as machine:
        assert folder / "100.qmp" not in only(machine).sockets
    with alone(folder / "100.qmp") as pid:
        (found,) = [each for each in running_qemus() if each.pid == pid]
        assert found.sockets == ()
        with pytest.raises(AttachError, match=r"Proxmox VE's: use it in turns"):
            attach(found, loop)
        attachment = attach(found, loop, use="shared")
        try:
            assert not attachment.identity.keeps_monitor
        finally:
            attachment.close()
        assert ask(found.foreign[0], "tool") == "prelaunch"


def test_the_bound_is_below_what_tools_tolerate() -> None:
    assert MOST_HELD_S < TOLERANCE_S
