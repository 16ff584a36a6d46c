"""Trust domains on real VMs, and a QEMU that lies about its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import mappings
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import (
    Member,
    assert_nothing_of_ours,
    attached,
    boot_fleet,
    fill_absent,
    frozen,
)
from tests.qemu.machine import Machine, backend
from tests.service.daemon import assert_unharmed
from vmdedup import faults
from vmdedup.attach.discover import Attachment, attach_all
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.attach.ranges import find_regions
from vmdedup.deduplicator import Deduplicator
from vmdedup.errors import VmError
from vmdedup.guest import page_reader
from vmdedup.inject.remote import RemoteThread, find_idle_thread
from vmdedup.linux import bounded
from vmdedup.linux.process import Process
from vmdedup.linux.readonly_fd import is_unwritable
from vmdedup.linux.syscalls import NR, ioctl, pidfd_getfd
from vmdedup.settings import DomainRule
from vmdedup.vm import page_scan
from vmdedup.vm.attached_vm import AttachedVm

pytestmark = pytest.mark.qemu

NOBODY = 65534
QUICK = {"mib": 4, "check_per_s": 8192}
UFFDIO_API, UFFDIO_REGISTER, MADV_DONTNEED = 0xC018AA3F, 0xC020AA00, 4
Need = Callable[[str | None], None]
Lie = Callable[[str, Mapping[str, Any], Any], Any]


@pytest.fixture
def loop() -> Iterator[MonitorLoop]:
    with MonitorLoop() as running:
        yield running


class Watch(threading.Thread):
    """Looks at the VMs' descriptors and mappings again and again: which store files it saw."""

    def __init__(self, members: list[Member], store_dir: Path) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, set[tuple[int, int]]] = {member.name: set() for member in members}
        self.writable: list[str] = []
        self._members = members
        self._store_dir = store_dir
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.001):
            stores = self.stores()
            for member in self._members:
                self._look(member, stores)

    def stores(self) -> set[tuple[int, int]]:
        found = [path.stat() for path in self._store_dir.glob("*.store")]
        return {(each.st_dev, each.st_ino) for each in found}

    def _look(self, member: Member, stores: set[tuple[int, int]]) -> None:
        for fd in Path(f"/proc/{member.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found = fd.stat()
                if (found.st_dev, found.st_ino) not in stores:
                    continue
                self.seen[member.name].add((found.st_dev, found.st_ino))
                flags = Path(f"/proc/{member.pid}/fdinfo/{fd.name}").read_text().split("flags:")[1]
                if int(flags.split()[0], 8) & os.O_ACCMODE != os.O_RDONLY:
                    self.writable.append(fd.name)

    def end(self) -> None:
        self._done.set()
        self.join()


def test_domains_share_neither_page_nor_file_nor_descriptor(
    settings: MakeSettings, boot: Boot, need: Need
) -> None:
    """By name, by uid and by default; the kernel's device and inode decide."""
    need(root_missing())
    backends = [Backend("memfd", mib=16), Backend("ram", share=False, mib=16)]
    red = boot_fleet(boot, backends, prefix="red-", parameters=QUICK)
    blue = boot_fleet(boot, backends, prefix="blue-", parameters=QUICK)
    other = boot_fleet(boot, backends, prefix="x-", parameters=QUICK, uid=NOBODY, sandbox=True)
    groups = [red, blue, other]
    fleet = [member for group in groups for member in group]
    rules = (
        DomainRule(name="red-*", domain="red"),
        DomainRule(uid=NOBODY, domain="nobodys"),
    )
    own = settings(domains=rules)
    watch = Watch(fleet, own.store_dir)
    watch.start()
    try:
        with attached(own, fleet) as dedup:
            report = dedup.run(until_converged=True, timeout_s=30)
            names = [vm.trust_domain for vm in report.vms]
            assert names == ["red", "red", "uid:0", "uid:0", "nobodys", "nobodys"]
    finally:
        watch.end()
    stores = watch.stores()
    assert len(stores) == len(groups)
    mapped = [{file for member in group for file in store_files(member)} for group in groups]
    lent = [{file for member in group for file in watch.seen[member.name]} for group in groups]
    for group in (mapped, lent):
        assert [len(each) for each in group] == [1, 1, 1]
        assert set().union(*group) == stores
    assert mapped == lent
    assert watch.writable == []
    for member in fleet:
        folder = Path(f"/proc/{member.pid}/fd")
        assert not [fd for fd in folder.iterdir() if os.readlink(fd).endswith(".store")]
        member.vm.wait_passes(1)
        assert member.vm.errors == 0
    with Deduplicator(own) as dedup:
        dedup.attach([str(member.vm.qmp_path) for member in fleet])
        assert dedup.verify().ok
        assert dedup.unmerge().store_removed


def store_files(member: Member) -> set[tuple[int, int]]:
    """(device, inode) of the stores that a VM maps, as the kernel prints them."""
    found = set()
    for line in Path(f"/proc/{member.pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(".store"):
            major, minor = (int(word, 16) for word in fields[3].split(":"))
            found.add((os.makedev(major, minor), int(fields[4])))
    return found


def test_no_merged_vm_can_write_to_its_store(settings: MakeSettings, boot: Boot) -> None:
    """Not even root, through what QEMU maps or holds: its mount is read-only."""
    fleet = boot_fleet(boot, [Backend(mib=16), Backend("ram", mib=16)], parameters=QUICK)
    own = settings()
    with attached(own, fleet) as dedup:
        dedup.run(until_converged=True, timeout_s=20)
        (path,) = own.store_dir.glob("*.store")
        before = path.read_bytes()
        vm = dedup._attached().engine.vms[0]
        store = dedup._attached().engine.stores.of("uid:0").file
        assert store is not None
        fd = store.open_read_only()
        try:
            if not is_unwritable(fd):
                pytest.skip("open_tree or mount_setattr is not allowed here")
            with vm.lent.lending() as lend:
                ways = [f"/proc/{vm.pid}/fd/{lend(fd, 'test')}"]
                ways += [
                    f"/proc/{vm.pid}/map_files/{m.start:x}-{m.end:x}"
                    for m in mappings(vm.pid)
                    if m.is_store
                ][:3]
                assert len(ways) == 4
                for way in ways:
                    for attempt in (
                        lambda at: os.open(at, os.O_RDWR),
                        lambda at: os.chmod(at, 0o666),
                    ):
                        with pytest.raises(OSError, match="Read-only file system"):
                            attempt(way)
            assert not os.path.lexists(ways[0])
        finally:
            os.close(fd)
        assert path.read_bytes() == before
        # Neighbouring pieces are joined by the kernel all the same.
        assert any(m.is_store and m.end - m.start > 4096 for m in mappings(vm.pid))
        assert dedup.unmerge().store_removed


@pytest.mark.both_qemus
def test_a_qemu_of_another_user_never_has_the_device_open(
    settings: MakeSettings, boot: Boot, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no step of ours: it may make no userfaultfd by itself, and gets no means to."""
    need(root_missing())
    allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    need(None if allowed == "0" else "vm.unprivileged_userfaultfd is not 0 here")
    backends = [Backend(mib=16), Backend("ram", share=False, mib=16)]
    fleet = boot_fleet(boot, backends, uid=NOBODY, sandbox=True, parameters=QUICK)
    steps: Counter[str] = Counter()
    found: set[str] = set()

    def look(step: str) -> None:
        steps[step] += 1
        for member in fleet:
            for fd in Path(f"/proc/{member.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(fd).startswith("/dev/userfaultfd"):
                        found.add(step)

    monkeypatch.setattr(faults, "hook", look)
    with attached(settings(workers=1), fleet) as dedup:
        report = dedup.run(until_converged=True, timeout_s=20)
        assert [vm.status for vm in report.vms] == ["merged", "merged"]
        assert report.host.stopped_ms == 0
        assert dedup.unmerge().store_removed
    assert found == set()
    assert steps["lent"] > 4
    assert steps["userfaultfd-taken"] > 1
    for member in fleet:
        assert_nothing_of_ours(member)
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_a_rule_by_cgroup(settings: MakeSettings, tmp_path: Path, loop: MonitorLoop) -> None:
    with Machine(tmp_path, "-S") as machine:
        (found,) = attach_all([str(machine.qmp)], loop).attached
        try:
            text = Path(f"/proc/{machine.pid}/cgroup").read_text()
            paths = {line.split(":", 2)[2] for line in text.splitlines()}
            assert set(found.identity.cgroups) == paths
            for path in paths:
                own = settings(domains=(DomainRule(cgroup=path, domain="mine"),))
                assert domain(found, own.domains) == "mine"
            own = settings(domains=(DomainRule(cgroup="/no/such/*", domain="mine"),))
            assert domain(found, own.domains) == f"uid:{os.geteuid()}"
        finally:
            found.close()


def domain(found: Attachment, rules: tuple[DomainRule, ...]) -> str:
    from vmdedup.policy.domains import domain_of

    return domain_of(found.identity, rules)


# --- a monitor that lies ------------------------------------------------------------


def lying(found: Attachment, lie: Lie, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what the real QEMU answers is altered on its way to us."""
    honest = found.monitor.execute

    def execute(
        command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
    ) -> object:
        answer = honest(command, arguments, timeout_s=timeout_s)
        return lie(command, arguments or {}, answer)

    monkeypatch.setattr(found.monitor, "execute", execute)


def points_to(address: int) -> Lie:
    def lie(command: str, arguments: Mapping[str, Any], answer: Any) -> Any:
        line = str(arguments.get("command-line", ""))
        if line.startswith("gpa2hva"):
            return f"Host virtual address for 0x0 (ram0) is {address:#x}\n"
        if line == "info ramblock":  # newer QEMUs tell it there
            return re.sub(
                r"(?m)^( *(?:ram0|pc.ram) .*)0x\w{16}( +rw)", rf"\g<1>{address:#018x}\2", answer
            )
        return answer

    return lie


def claims_bytes(size_bytes: int) -> Lie:
    def lie(command: str, arguments: Mapping[str, Any], answer: Any) -> Any:
        if command == "query-memdev":
            return [{**each, "size": size_bytes} for each in answer]
        if arguments.get("command-line") == "info ramblock":
            size = f"{size_bytes:#018x}"
            return re.sub(
                r"(?m)^( *(?:ram0|pc.ram) .*? 0x\w+) 0x\w+ 0x\w+", rf"\1 {size} {size}", answer
            )
        return answer

    return lie


def both(first: Lie, second: Lie) -> Lie:
    return lambda command, arguments, answer: second(
        command, arguments, first(command, arguments, answer)
    )


def writable_but_not_ram(pid: int) -> dict[str, tuple[int, int]]:
    """What else QEMU may write: (address, length) of some of each sort."""
    found: dict[str, tuple[int, int]] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        low, high = (int(word, 16) for word in fields[0].split("-"))
        path = fields[5] if len(fields) == 6 else "anonymous"
        if high - low >= 4096 and (fields[1].startswith("rw") or ".so" in path):
            sort = f"{fields[1]} {os.path.basename(path).split('.')[0]}"
            if high - low < 32 << 20:
                found.setdefault(sort, (low, high - low))
    return found


@pytest.mark.both_qemus
@pytest.mark.parametrize("share", [False, True])
def test_no_address_that_is_not_guest_ram_is_taken(
    share: bool,
    settings: MakeSettings,
    tmp_path: Path,
    loop: MonitorLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heap, stacks, libc, code buffers and the like, at their true size: all refused."""
    memory = backend("ram", 0, 64, f"share={'on' if share else 'off'}")
    with Machine(tmp_path, "-S", "-object", memory, "-machine", "pc,memory-backend=ram0") as one:
        (found,) = attach_all([str(one.qmp)], loop).attached
        try:
            (honest,), _ = find_regions(found.monitor, found.process)
            others = writable_but_not_ram(one.pid)
            assert any("heap" in sort for sort in others)
            assert any("stack" in sort for sort in others)
            tried = 0
            for sort, (address, length) in others.items():
                lying(found, both(points_to(address), claims_bytes(length)), monkeypatch)
                regions, refused = find_regions(found.monitor, found.process)
                monkeypatch.undo()
                assert (regions, len(refused)) == ([], 1), sort
                tried += 1
            assert tried > 8
            for address in (0, 8, 4096, honest.start + 1, honest.start + 4096, honest.end, 1 << 47):
                lying(found, points_to(address), monkeypatch)
                with pytest.raises(VmError, match="no mergeable memory"):
                    AttachedVm(found, settings())
                monkeypatch.undo()
                found.close()
                (found,) = attach_all([str(one.qmp)], loop).attached
            for size_bytes in (0, 1, 4095, honest.size_bytes + 4096, 1 << 46, (1 << 64) - 4096):
                lying(found, claims_bytes(size_bytes), monkeypatch)
                regions, refused = find_regions(found.monitor, found.process)
                monkeypatch.undo()
                assert (regions, len(refused)) == ([], 1), size_bytes
            assert find_regions(found.monitor, found.process) == ([honest], [])
        finally:
            found.close()
        with QmpMonitor.connect(one.own, loop) as monitor:
            assert monitor.status() == "prelaunch"


def test_address_space_that_costs_nothing_costs_us_nothing(
    tmp_path: Path, loop: MonitorLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU may map far more than the host has; the columns of so many pages are memory."""
    host_bytes = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    with Machine(tmp_path, "-S") as one:
        (found,) = attach_all([str(one.qmp)], loop).attached
        try:
            lying(found, claims_bytes(5 * host_bytes), monkeypatch)
            regions, refused = find_regions(found.monitor, found.process)
        finally:
            found.close()
    assert regions == []
    assert "times the host's memory" in refused[0][1]


PROXY = r"""
import socket, sys, threading
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(1)
print("ready", flush=True)
while True:
    client, _ = listener.accept()
    server = socket.socket(socket.AF_UNIX)
    server.connect(sys.argv[2])
    def pump(a, b):
        try:
            while data := a.recv(65536):
                b.sendall(data)
        except OSError:
            pass
        for each in (a, b):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
    threading.Thread(target=pump, args=(client, server), daemon=True).start()
    pump(server, client)
"""


@pytest.mark.parametrize("name", ["python", "qemu-system-liar"])
def test_whoever_speaks_for_another_process_is_refused(
    name: str, tmp_path: Path, settings: MakeSettings
) -> None:
    """A proxy passes on what a real QEMU says: the addresses are looked up in the proxy."""
    program = tmp_path / name
    shutil.copy(os.path.realpath(sys.executable), program)
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    with Machine(tmp_path) as machine:
        command = [str(program), "-c", PROXY, str(tmp_path / "proxy.sock"), str(machine.qmp)]
        proxy = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        try:
            assert proxy.stdout is not None
            assert proxy.stdout.readline() == b"ready\n"
            with Deduplicator(settings()) as dedup:
                (row,) = dedup.attach([str(tmp_path / "proxy.sock")]).vms
            assert not row.mergeable
            wanted = "not a QEMU" if name == "python" else "no mergeable memory"
            assert wanted in (row.reason or ""), row.reason
        finally:
            proxy.kill()
            proxy.communicate()
        assert "vmdedup" not in Path(f"/proc/{machine.pid}/maps").read_text()
        assert machine.process.poll() is None


# A "QEMU" (by its program's name) that answers everything, each in its own bad way.
IMPOSTOR = r"""
import json, os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(8)
manner = sys.argv[2]
print("ready", flush=True)
greeting = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 1}}, "capabilities": []}}
deep = "[" * 100000
while True:
    client, _ = listener.accept()
    try:
        client.sendall(json.dumps(greeting).encode() + b"\n")
        text = ""
        while data := client.recv(65536):
            text += data.decode()
            while text.strip():
                try:
                    request, end = json.JSONDecoder().raw_decode(text.lstrip())
                except ValueError:
                    break
                text = text.lstrip()[end:]
                answer = {"return": {}, "id": request["id"]}
                if request["execute"] == "query-cpus-fast":
                    answer["return"] = [{"thread-id": os.getpid()}]
                elif request["execute"] != "qmp_capabilities":
                    if manner == "garbage":
                        client.sendall(os.urandom(4096) + b"\n")
                        continue
                    if manner == "endless":
                        while True:
                            client.sendall(b"x" * 65536)
                    if manner == "deep":
                        client.sendall(deep.encode() + b"\n")
                        continue
                    if manner == "drip":
                        for byte in b'{"return": ' + b" " * 100000:
                            client.sendall(bytes([byte]))
                            time.sleep(0.05)
                    if manner == "numbers":
                        answer["return"] = [{"id": "ram0", "size": 10 ** 400, "merge": True}]
                    if manner == "types":
                        answer["return"] = [[{"thread-id": "x"}], None, 3.5]
                    if manner == "descriptors":
                        passed = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
                        line = json.dumps(answer).encode() + b"\n"
                        socket.send_fds(client, [line], passed)
                        for each in passed:
                            os.close(each)
                        continue
                    if manner == "events":
                        line = b'{"event": "STOP", "data": {}, "timestamp": 7}\n'
                        client.sendall(line * 20000)
                client.sendall(json.dumps(answer).encode() + b"\n")
    except OSError:
        pass
"""
OPENED_FOR_LIFE = ("/dev/zero", "/memfd:vmdedup-loop (deleted)")
MANNERS = ["garbage", "endless", "deep", "drip", "numbers", "types", "descriptors", "events"]


def open_files() -> Counter[str]:
    """What this process has open, and how often; without what it opens once for its life."""
    gc.collect()
    with os.scandir("/proc/self/fd") as files:
        targets = [os.readlink(each.path) for each in files]
    return Counter(each for each in targets if each not in OPENED_FOR_LIFE)


def test_impostors_are_dropped_and_the_others_served(
    tmp_path: Path, settings: MakeSettings, boot: Boot
) -> None:
    """All at once, beside two real VMs, which are merged as if nothing were."""
    program = tmp_path / "qemu-system-impostor"
    shutil.copy(os.path.realpath(sys.executable), program)
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    fleet = boot_fleet(boot, [Backend(mib=16), Backend(mib=16)], parameters=QUICK)
    impostors = []
    try:
        for manner in MANNERS:
            command = [str(program), "-c", IMPOSTOR, str(tmp_path / f"{manner}.sock"), manner]
            impostors.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
            stream = impostors[-1].stdout
            assert stream is not None
            assert stream.readline() == b"ready\n"
        descriptors = open_files()
        began = time.monotonic()
        with Deduplicator(settings(monitor_timeout_ms=1000)) as dedup:
            real = [str(member.vm.qmp_path) for member in fleet]
            listing = dedup.attach([*(str(tmp_path / f"{each}.sock") for each in MANNERS), *real])
            took_s = time.monotonic() - began
            rows = {row.name: row for row in listing.vms}
            assert [rows[member.name].mergeable for member in fleet] == [True, True]
            bad = [row for row in listing.vms if row.name not in {m.name for m in fleet}]
            assert len(bad) == len(MANNERS)
            for row in bad:
                assert not row.mergeable
                assert row.reason
                assert row.reason.isprintable()
                assert len(row.reason) < 500
            report = dedup.run(until_converged=True, timeout_s=20)
            assert min(vm.merged_pages for vm in report.vms if vm.status == "merged") > 128
            assert dedup.unmerge().store_removed
        print(json.dumps({row.name.rpartition("/")[2]: row.reason for row in bad}), took_s)
        assert not open_files() - descriptors
    finally:
        for each in impostors:
            each.kill()
            each.communicate()
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_a_vm_whose_pages_never_come_does_not_keep_the_others(
    settings: MakeSettings, boot: Boot, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It discards a page right before we read it, and has its fault served by nobody."""
    need(root_missing())
    monkeypatch.setattr(bounded, "LIMIT_S", 0.5)
    fleet = boot_fleet(boot, [Backend("ram", share=False, mib=16)] * 3, parameters=QUICK)
    hostile, *others = fleet
    unused = fill_absent(hostile.pid, hostile.areas[0], 16, b"\x55" * 4096)
    honest = page_reader.digests_at
    held: list[int] = []

    def reads(vm: str, pid: int, address: Any, seed: int) -> Any:
        if pid == hostile.pid and not held:
            held.append(userfaultfd_over(hostile.pid, unused[0], unused[-1] + 4096))
        return honest(vm, pid, address, seed)

    monkeypatch.setattr(page_scan, "digests_at", reads)
    own = settings(mask=frozenset({"in-place", "wp-async"}), workers=2)
    try:
        with attached(own, fleet) as dedup:
            report = dedup.run(passes=3)
            rows = {vm.name: vm for vm in report.vms}
            assert "its memory cannot be read" in (rows[hostile.name].reason or "")
            assert rows[hostile.name].merged_pages == 0
            assert min(rows[member.name].merged_pages for member in others) > 128
            os.close(held[0])
            report = dedup.run(until_converged=True, timeout_s=20)
            assert min(vm.merged_pages for vm in report.vms) > 128
            assert dedup.unmerge().store_removed
    finally:
        with contextlib.suppress(OSError, IndexError):
            os.close(held[0])
    for member in others:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_memory_that_has_a_userfaultfd_of_another_is_left_alone(
    settings: MakeSettings, boot: Boot
) -> None:
    """As a background snapshot or a postcopy migration has one: that VM waits, unharmed."""
    held_still = {"mib": 4, "hold": 1, "check_per_s": 8192}
    backends = [Backend("ram", share=False, mib=16), Backend(mib=16)]
    member, other = boot_fleet(boot, backends, parameters=held_still)
    (area,) = member.areas
    with frozen([member, other]):
        before = member.snapshot()
        theirs = userfaultfd_over(member.pid, area.start, area.end, discard=False)
        try:
            with attached(settings(), [member, other]) as dedup:
                rows = {row.name: row for row in dedup.run(passes=3).vms}
                assert "UFFDIO_REGISTER" in (rows[member.name].reason or ""), rows
                assert rows[member.name].merged_pages == 0
                assert rows[other.name].merged_pages > 500
                assert member.still_holds(before)
                os.close(theirs)
                theirs = -1
                assert dedup.run(passes=2).vms[0].merged_pages > 500
                assert member.still_holds(before)
        finally:
            if theirs >= 0:
                os.close(theirs)
    for each in (member, other):
        assert_unharmed(each.vm)


def userfaultfd_over(pid: int, start: int, end: int, *, discard: bool = True) -> int:
    """Have the fault of each absent page there wait for us; by default all of them are absent."""
    tid = find_idle_thread(pid, list).tid
    with RemoteThread("hostile", pid, tid) as remote, Process("hostile", pid) as process:
        number = remote.call(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        fd = pidfd_getfd(process.pidfd, number)
        remote.call(NR.CLOSE, number)
        words = ctypes.c_ulong * 4
        ioctl(fd, UFFDIO_API, words(0xAA, 0, 0, 0))
        ioctl(fd, UFFDIO_REGISTER, words(start, end - start, 1, 0))
        if discard:
            remote.call(NR.MADVISE, start, end - start, MADV_DONTNEED)
    return fd
