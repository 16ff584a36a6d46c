"""Attaching to real QEMUs: monitors, identity, and where guest RAM lies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.harness.capabilities import object_missing
from tests.harness.kernel import becomes_true
from tests.qemu.fleet import open_files
from tests.qemu.machine import Machine, backend
from vmdedup.attach.discover import Attachment, attach, attach_all, expand, running_qemus
from vmdedup.attach.lent_fds import take_back_stale
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.attach.ranges import Region, find_regions
from vmdedup.errors import AttachError, MonitorError, VmGoneError
from vmdedup.linux.process import Process
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import AttachedVm

pytestmark = [pytest.mark.qemu, pytest.mark.both_qemus]

MIB = 1 << 20
TIMEOUT_S = 0.5


@pytest.fixture
def loop() -> Iterator[MonitorLoop]:
    with MonitorLoop() as running:
        yield running


def attached(machine: Machine, loop: MonitorLoop) -> Attachment:
    (found,) = attach_all([str(machine.qmp)], loop).attached
    return found


def regions_of(machine: Machine, loop: MonitorLoop) -> tuple[dict[str, Region], dict[str, str]]:
    found = attached(machine, loop)
    try:
        regions, refused = find_regions(found.monitor, found.process)
    finally:
        found.close()
    return {one.backend: one for one in regions}, dict(refused)


def assert_same_memory(
    machine: Machine, loop: MonitorLoop, region: Region, gpa: int, tmp_path: Path
) -> None:
    """What QEMU calls guest memory at `gpa` is what the process holds at the region's start.

    The machine is not started, so nothing else writes there.
    """
    dump = tmp_path / "dump"
    for offset in (0, region.size_bytes // 2, region.size_bytes - 4096):
        pattern = os.urandom(4096)
        with open(f"/proc/{machine.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(region.start + offset)
            memory.write(pattern)
        with QmpMonitor.connect(machine.own, loop) as monitor:
            monitor.hmp(f'pmemsave {gpa + offset:#x} 4096 "{dump}"')
        assert dump.read_bytes() == pattern


def four_backends(tmp_path: Path) -> list[str]:
    kinds = [
        backend("memfd", 0, 32, "share=on"),
        backend("file", 1, 32, "share=off", path=tmp_path / "vmdedup-private"),
        backend("ram", 2, 32, "share=off"),
        backend("ram", 3, 32, "share=on"),
        backend("memfd", 4, 32, "share=off"),
        backend("file", 5, 32, "share=on", path=tmp_path),
    ]
    arguments = ["-S", "-m", "192", "-smp", str(len(kinds))]
    for number, spec in enumerate(kinds):
        arguments += ["-object", spec, "-numa", f"node,memdev=ram{number},cpus={number}"]
    return arguments


def test_every_kind_of_backend_is_found_where_it_is(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, *four_backends(tmp_path)) as machine:
        regions, refused = regions_of(machine, loop)
        assert refused == {}
        # Newer QEMUs have a memfd behind shared memory of no file.
        keeps_ram3 = any(link.startswith("/memfd:ram3") for link in open_files(machine.pid))
        assert {
            name: (one.kind, one.share, one.ram_file is not None, one.ram_fd is not None)
            for name, one in regions.items()
        } == {
            "ram0": ("memfd", True, True, True),
            "ram1": ("file", False, True, True),
            "ram2": ("ram", False, False, False),
            "ram3": ("ram", True, True, keeps_ram3),
            "ram4": ("memfd", False, True, True),
            "ram5": ("file", True, True, True),
        }
        assert regions["ram0"].filesystem == regions["ram3"].filesystem == "memfd"
        assert regions["ram2"].filesystem == ""
        for number in range(6):
            region = regions[f"ram{number}"]
            assert region.size_bytes == 32 * MIB
            if region.ram_fd is not None:
                found = os.stat(f"/proc/{machine.pid}/fd/{region.ram_fd}")
                assert (found.st_dev, found.st_ino) == region.ram_file
            assert_same_memory(machine, loop, region, number * 32 * MIB, tmp_path)


def test_posix_shared_memory_is_found(tmp_path: Path, loop: MonitorLoop) -> None:
    if (missing := object_missing("memory-backend-shm")) is not None:
        pytest.skip(missing)
    memory = ["-S", "-object", backend("shm", 0, 32), "-machine", "pc,memory-backend=ram0"]
    with Machine(tmp_path, *memory, memory_mib=32) as machine:
        regions, refused = regions_of(machine, loop)
        assert refused == {}
        region = regions["ram0"]
        assert (region.kind, region.share, region.filesystem) == ("shm", True, "tmpfs")
        assert region.ram_fd is not None
        found = os.stat(f"/proc/{machine.pid}/fd/{region.ram_fd}")
        assert (found.st_dev, found.st_ino) == region.ram_file
        assert_same_memory(machine, loop, region, 0, tmp_path)


def test_addresses_told_and_looked_up_are_the_same(
    tmp_path: Path, loop: MonitorLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `info ramblock` has addresses, the way around them finds the same ones."""
    with Machine(tmp_path, *four_backends(tmp_path)) as machine:
        found = attached(machine, loop)
        try:
            told, _ = find_regions(found.monitor, found.process)
            hmp = found.monitor.hmp
            if (blocks := hmp("info ramblock")) == without_addresses(blocks):
                pytest.skip("this QEMU's `info ramblock` has no addresses")
            monkeypatch.setattr(found.monitor, "hmp", lambda line: without_addresses(hmp(line)))
            looked_up, refused = find_regions(found.monitor, found.process)
        finally:
            found.close()
    assert (looked_up, refused) == (told, [])


def test_what_qemu_lists_is_asked_for_once_in_each_look(
    tmp_path: Path, loop: MonitorLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()
    with Machine(tmp_path, *four_backends(tmp_path)) as machine:
        found = attached(machine, loop)
        execute = found.monitor.execute

        def counted(command: str, arguments: Any = None, **more: Any) -> object:
            asked[f"{command} {(arguments or {}).get('path', '')}"] += 1
            return execute(command, arguments, **more)

        monkeypatch.setattr(found.monitor, "execute", counted)
        with closing(AttachedVm(found, Settings(store_dir=tmp_path), refuse=False)) as vm:
            assert len(vm.backends) == 6
            assert (asked["query-memdev "], asked["qom-list /objects"]) == (1, 1)
            assert vm.changed() is None
            assert (asked["query-memdev "], asked["qom-list /objects"]) == (2, 2)


def without_addresses(text: str) -> str:
    """`info ramblock` as older QEMUs print it; other answers as they are."""
    if not re.match(r" *Block Name .* HVA +RO\n", text):
        return text
    return re.sub(r" +(HVA|0x[0-9a-f]{16}) +(RO|ro|rw)$", "", text, flags=re.MULTILINE)


def test_hot_plugged_memory_is_found(tmp_path: Path, loop: MonitorLoop) -> None:
    arguments = ["-S", "-m", "64,slots=2,maxmem=1G", "-object", backend("memfd", 0, 64, "share=on")]
    with Machine(tmp_path, *arguments, "-machine", "pc,memory-backend=ram0") as machine:
        assert set(regions_of(machine, loop)[0]) == {"ram0"}
        with QmpMonitor.connect(machine.own, loop) as monitor:
            monitor.execute(
                "object-add", {"qom-type": "memory-backend-ram", "id": "more", "size": 128 * MIB}
            )
            assert "not plugged" in regions_of(machine, loop)[1]["more"]
            monitor.execute("device_add", {"driver": "pc-dimm", "memdev": "more", "id": "d"})
            devices = monitor.execute("query-memory-devices")
        assert isinstance(devices, list)
        regions, refused = regions_of(machine, loop)
        assert (set(regions), refused) == ({"ram0", "more"}, {})
        assert_same_memory(machine, loop, regions["more"], devices[0]["data"]["addr"], tmp_path)


def test_default_memory_is_a_backend_too(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S") as machine:
        regions, refused = regions_of(machine, loop)
        assert (set(regions), refused) == ({"pc.ram"}, {})
        assert regions["pc.ram"].kind == "ram"
        assert_same_memory(machine, loop, regions["pc.ram"], 0, tmp_path)


def test_memory_split_by_the_firmware_is_one_region(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(
        tmp_path, "-object", backend("memfd", 0, 64), "-machine", "pc,memory-backend=ram0"
    ) as machine:
        with QmpMonitor.connect(machine.own, loop) as monitor:
            deadline = time.monotonic() + 60
            while "rom): ram0" not in monitor.hmp("info mtree -f"):
                assert time.monotonic() < deadline, "the firmware did not protect its memory"
                time.sleep(0.05)
        regions, refused = regions_of(machine, loop)
        assert (set(regions), refused) == ({"ram0"}, {})
        assert regions["ram0"].size_bytes == 64 * MIB


@pytest.mark.parametrize(
    ("options", "extra", "reason"),
    [
        ("merge=off", [], "merge=off"),
        ("prealloc=on", [], "prealloc=on"),
        ("", ["-overcommit", "mem-lock=on"], "mem-lock=on"),
    ],
)
def test_a_backend_that_can_not_be_merged_says_why(
    options: str, extra: list[str], reason: str, tmp_path: Path, loop: MonitorLoop
) -> None:
    memory = ["-object", backend("memfd", 0, 64, options), "-machine", "pc,memory-backend=ram0"]
    with Machine(tmp_path, "-S", *memory, *extra) as machine:
        regions, refused = regions_of(machine, loop)
        assert regions == {}
        assert reason in refused["ram0"]


def test_machine_wide_merge_off(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S", "-machine", "pc,mem-merge=off") as machine:
        assert regions_of(machine, loop) == ({}, {"pc.ram": "merge=off"})


@pytest.fixture
def huge_pages() -> Iterator[None]:
    control = Path("/proc/sys/vm/nr_hugepages")
    before = control.read_text()
    try:
        control.write_text(str(int(before) + 40))
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved: {error}")
    if int(control.read_text()) < int(before) + 40:
        control.write_text(before)
        pytest.skip("the host has no 40 free huge pages")
    yield
    control.write_text(before)


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_are_refused(tmp_path: Path, loop: MonitorLoop) -> None:
    memory = ["-object", backend("memfd", 0, 64, "hugetlb=on,hugetlbsize=2M")]
    with Machine(tmp_path, "-S", *memory, "-machine", "pc,memory-backend=ram0") as machine:
        regions, refused = regions_of(machine, loop)
        assert regions == {}
        assert "huge pages of 2048 KiB" in refused["ram0"]


def test_a_vm_is_identified(tmp_path: Path, loop: MonitorLoop) -> None:
    arguments = ["-S", "-smp", "2", "-object", "iothread,id=io0", "-name", "guest=web,,1"]
    with Machine(tmp_path, *arguments) as machine:
        found = attached(machine, loop)
        try:
            who = found.identity
            assert (who.name, who.pid, who.uid) == ("web,1", machine.pid, os.geteuid())
            assert who.start_ticks == found.process.identity.start_ticks
            assert who.qemu_version >= (7, 0, 0)
            assert machine.pid in who.excluded_thread_ids
            assert len(who.excluded_thread_ids) == 1 + 2 + 1
            assert who.excluded_thread_ids < set(map(int, os.listdir(f"/proc/{machine.pid}/task")))
            assert found.monitor.vm == "web,1"
        finally:
            found.close()


def test_a_nameless_vm_is_named_after_its_socket(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S", name="x-") as machine:
        found = attached(machine, loop)
        found.close()
        assert found.identity.name == "x-qmp.sock"


def test_a_busy_monitor_does_not_hang_and_is_free_again(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S") as machine:
        with QmpMonitor.connect(machine.qmp, loop):
            for _ in range(3):
                began = time.monotonic()
                with pytest.raises(AttachError, match="busy"):
                    QmpMonitor.connect(machine.qmp, loop, timeout_s=TIMEOUT_S)
                assert time.monotonic() - began < 10 * TIMEOUT_S
        with QmpMonitor.connect(machine.qmp, loop) as monitor:
            assert monitor.status() == "prelaunch"


def test_a_second_socket_is_used_when_the_first_is_busy(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S") as machine, QmpMonitor.connect(machine.qmp, loop):
        (candidate,) = (one for one in running_qemus() if one.pid == machine.pid)
        assert candidate.sockets == (machine.qmp, machine.own)
        found = attach(candidate, loop, timeout_s=TIMEOUT_S)
        found.close()
        assert found.identity.socket_path == machine.own


def test_two_sockets_of_one_vm_are_one_vm(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S") as machine:
        found = attach_all([str(tmp_path / "*.sock")], loop)
        for one in found.attached:
            one.close()
        assert [one.identity.pid for one in found.attached] == [machine.pid]
        assert found.unreachable == []


def test_vms_that_can_not_be_reached_have_a_row(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S") as machine, QmpMonitor.connect(machine.own, loop):
        patterns = [str(tmp_path / "nothing*"), str(machine.own), str(machine.qmp)]
        found = attach_all(patterns, loop, timeout_s=TIMEOUT_S)
        for one in found.attached:
            one.close()
        assert [one.identity.pid for one in found.attached] == [machine.pid]
        missing, busy = found.unreachable
        assert "no socket there" in missing.reason
        assert "busy" in busy.reason


def test_a_qemu_without_monitor_is_listed_with_the_reason(tmp_path: Path) -> None:
    command = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-m", "32"]
    process = subprocess.Popen([*command, "-name", "mute"], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 30
        while not (rows := [one for one in running_qemus() if one.pid == process.pid]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert rows[0].name == "mute"
        assert rows[0].sockets == ()
        assert rows[0].reason is not None
        assert "no QMP monitor" in rows[0].reason
    finally:
        process.kill()
        process.wait()


def test_a_relative_socket_is_found(tmp_path: Path) -> None:
    command = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-m", "32"]
    command += ["-qmp", "unix:here.sock,server=on,wait=off"]
    process = subprocess.Popen(command, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "here.sock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (row,) = (one for one in running_qemus() if one.pid == process.pid)
        assert row.sockets == (tmp_path / "here.sock",)
    finally:
        process.kill()
        process.wait()


def test_globs_name_sockets_only(tmp_path: Path) -> None:
    (tmp_path / "a.sock").write_text("")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "b.sock"))
        found = [one.sockets[0].name for one in expand([str(tmp_path / "*.sock")] * 2)]
    assert found == ["b.sock"]


def test_a_storage_daemon_is_not_a_vm(tmp_path: Path, loop: MonitorLoop) -> None:
    path = tmp_path / "qsd.sock"
    chardev = f"socket,id=c,path={path},server=on,wait=off"
    process = subprocess.Popen(
        ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "chardev=c"]
    )
    try:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found = attach_all([str(path)], loop)
        assert found.attached == []
        assert "not a virtual machine" in found.unreachable[0].reason
    finally:
        process.kill()
        process.wait()


def test_commands_of_the_merge(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path) as machine, QmpMonitor.connect(machine.qmp, loop) as monitor:
        monitor.events()
        monitor.stop()
        assert monitor.status() == "paused"
        assert monitor.drain() >= 0.0
        monitor.cont()
        assert monitor.status() == "running"
        assert monitor.drain() >= 0.0
        assert [one["event"] for one in monitor.events()] == ["STOP", "RESUME"]
        with pytest.raises(MonitorError) as caught:
            monitor.execute("no-such-command")
        assert caught.value.error_class == "CommandNotFound"


def test_a_descriptor_is_passed_and_taken_back(tmp_path: Path, loop: MonitorLoop) -> None:
    file = tmp_path / "passed"
    file.write_text("x")
    with Machine(tmp_path) as machine, QmpMonitor.connect(machine.qmp, loop) as monitor:
        fd = os.open(file, os.O_RDONLY)
        try:
            fdset, number = monitor.add_fd(fd, "vmdedup test")
        finally:
            os.close(fd)
        assert os.readlink(f"/proc/{machine.pid}/fd/{number}") == str(file)
        monitor.remove_fds([fdset])
        assert not os.path.lexists(f"/proc/{machine.pid}/fd/{number}")


def test_another_clients_set_is_never_ours(tmp_path: Path, loop: MonitorLoop) -> None:
    """It numbers its sets from 0 on, and takes for its own what has such a number."""
    with (
        Machine(tmp_path) as machine,
        QmpMonitor.connect(machine.own, loop) as other,
        QmpMonitor.connect(machine.qmp, loop) as monitor,
    ):
        ours = [monitor.add_fd(0, "vmdedup test") for _ in range(3)]
        again, number = monitor.add_fd(0, "vmdedup test", ours[0][0])
        assert again == ours[0][0]
        assert len({fdset for fdset, _ in ours}) == 3
        theirs = [other.add_fd(0, "theirs", number) for number in range(4)]
        monitor.remove_fds([fdset for fdset, _ in ours])
        for _, number in theirs:
            assert os.path.lexists(f"/proc/{machine.pid}/fd/{number}")
        for _, number in ours:
            assert not os.path.lexists(f"/proc/{machine.pid}/fd/{number}")
        take_back_stale(other)
        other.remove_fds([fdset for fdset, _ in theirs])


def test_what_a_closed_connection_had_lent_is_taken_back(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path) as machine, QmpMonitor.connect(machine.own, loop) as other:
        with QmpMonitor.connect(machine.qmp, loop) as monitor:
            _, number = monitor.add_fd(0, "vmdedup test")
            take_back_stale(other)
            assert os.path.lexists(f"/proc/{machine.pid}/fd/{number}")
        assert other.execute("query-fdsets") != []
        take_back_stale(other)
        assert other.execute("query-fdsets") == []
        assert not os.path.lexists(f"/proc/{machine.pid}/fd/{number}")


def test_descriptors_passed_from_many_threads_are_not_mixed_up(
    tmp_path: Path, loop: MonitorLoop
) -> None:
    wrong: list[str] = []
    with Machine(tmp_path, "-S") as machine, QmpMonitor.connect(machine.qmp, loop) as monitor:

        def work(index: int) -> None:
            file = tmp_path / f"file{index}"
            file.write_text("x")
            fd = os.open(file, os.O_RDONLY)
            for _ in range(10):
                _, number = monitor.add_fd(fd, "t")
                seen = os.readlink(f"/proc/{machine.pid}/fd/{number}")
                monitor.status()
                if seen != str(file):
                    wrong.append(seen)
            os.close(fd)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_vm_that_is_killed_is_gone(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S") as machine, QmpMonitor.connect(machine.qmp, loop) as monitor:
        machine.process.kill()
        for _ in range(2):
            with pytest.raises(VmGoneError):
                monitor.status()


def test_a_vm_that_hangs_times_out_and_can_be_asked_again(
    tmp_path: Path, loop: MonitorLoop
) -> None:
    with Machine(tmp_path, "-S") as machine, QmpMonitor.connect(machine.qmp, loop) as monitor:
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            for _ in range(2):
                with pytest.raises(MonitorError, match=r"no(t)? answer"):
                    monitor.execute("query-name", timeout_s=TIMEOUT_S)
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        assert becomes_true(lambda: monitor.outage is None)
        assert monitor.status() == "prelaunch"


def test_an_adopted_client_stays_connected(tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S", name="mine") as machine, MonitorLoop() as theirs:
        client = QMPClient("theirs")
        theirs.call(client.connect(str(machine.qmp)), 10)
        with QmpMonitor.adopt(client, theirs.loop) as monitor:
            assert monitor.peer_pid == machine.pid
            assert monitor.version >= (7, 0, 0)
            with Process(monitor.vm, monitor.peer_pid) as process:
                regions, _ = find_regions(monitor, process)
            assert [one.backend for one in regions] == ["pc.ram"]
            fdset, _ = monitor.add_fd(0, "stdin")
            monitor.remove_fds([fdset])
        answer = theirs.call(client.execute("query-status"), 10)
        assert isinstance(answer, dict)
        assert answer["status"] == "prelaunch"
        theirs.call(client.disconnect(), 10)


def test_an_unconnected_client_is_refused(loop: MonitorLoop) -> None:
    with pytest.raises(AttachError, match="not connected"):
        QmpMonitor.adopt(QMPClient("idle"), loop.loop)


@pytest.mark.parametrize("then", ["kept", "removed"])
def test_a_monitor_of_a_configuration_file(then: str, tmp_path: Path, loop: MonitorLoop) -> None:
    """As Incus starts its VMs: monitor, name and memory are in the file alone."""
    monitor = tmp_path / "only.qmp"
    file = tmp_path / "qemu.conf"
    file.write_text(
        '[name]\n  guest = "of-a-file"\n'
        '[object "mem0"]\n  qom-type = "memory-backend-memfd"\n  size = "64M"\n  share = "on"\n'
        '[machine]\n  type = "q35"\n  memory-backend = "mem0"\n'
        f'[chardev "monitor"]\n  backend = "socket"\n  path = "{monitor}"\n'
        '  server = "on"\n  wait = "off"\n'
        '[mon]\n  chardev = "monitor"\n  mode = "control"\n'
    )
    command = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-m", "64"]
    with subprocess.Popen([*command, "-readconfig", str(file)]) as process:
        try:
            assert becomes_true(monitor.exists)
            if then == "removed":
                file.unlink()
            (found,) = [each for each in running_qemus() if each.pid == process.pid]
            if then == "removed":
                assert found.sockets == ()
                assert str(file) in (found.reason or "")
                assert "cannot be read any more" in (found.reason or "")
                return
            assert (found.name, found.sockets) == ("of-a-file", (monitor,))
            attachment = attach(found, loop)
            try:
                assert attachment.identity.name == "of-a-file"
            finally:
                attachment.close()
        finally:
            process.kill()


def test_a_relative_monitor_of_a_daemon(tmp_path: Path) -> None:
    """QEMU binds it in the folder that it is started in, and goes to / then."""
    command = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-m", "64"]
    monitor = ["-qmp", "unix:relative.qmp,server=on,wait=off"]
    daemon = ["-daemonize", "-pidfile", "pid"]
    subprocess.run([*command, *monitor, *daemon], cwd=tmp_path, check=True)
    pid = int((tmp_path / "pid").read_text())
    try:
        (found,) = [each for each in running_qemus() if each.pid == pid]
        assert found.sockets == ()
        assert "relative.qmp is relative" in (found.reason or "")
        assert "--qmp" in (found.reason or "")
    finally:
        os.kill(pid, signal.SIGKILL)


def test_no_monitor_can_be_added_to_a_running_qemu(tmp_path: Path, loop: MonitorLoop) -> None:
    """So the remedy for a VM without QMP is a restart. If this fails, there is another."""
    added = tmp_path / "added.qmp"
    with Machine(tmp_path, "-S") as machine, QmpMonitor.connect(machine.qmp, loop) as monitor:
        assert monitor.hmp(f"chardev-add socket,id=new,path={added},server=on,wait=off") == ""
        assert "unknown command" in monitor.hmp("mon chardev=new,mode=control")
        for kind in ("monitor", "monitor-qmp"):
            assert "qom-type" in monitor.hmp(f"object_add {kind},id=m0,chardev=new")
        change = f"socket,path={tmp_path / 'moved.qmp'},server=on,wait=off"
        assert "not support chardev hotswap" in monitor.hmp(
            f"chardev-change compat_monitor0 {change}"
        )
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(str(added))
            with pytest.raises(TimeoutError):
                client.recv(1)
