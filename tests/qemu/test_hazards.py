"""Hazards that can exist on any host, seen on real QEMUs."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.harness.capabilities import kvm_missing
from tests.harness.kernel import becomes_true
from tests.harness.skips import require
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, Need
from tests.qemu.machine import Machine, backend
from vmdedup.attach.discover import attach_all
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.attach.ramfile import filesystem_at
from vmdedup.attach.ranges import find_regions
from vmdedup.errors import MonitorError
from vmdedup.linux.process import Process
from vmdedup.policy.hazards import Finding, Verdict, examine, reason, refused_backends, verdict
from vmdedup.policy.watch import Watch

pytestmark = [pytest.mark.qemu, pytest.mark.both_qemus]

SHARED = ("-object", backend("memfd", 0, 64, "share=on"), "-machine", "pc,memory-backend=ram0")


@pytest.fixture
def loop() -> Iterator[MonitorLoop]:
    with MonitorLoop() as running:
        yield running


Look = Callable[..., list[Finding]]


@pytest.fixture
def look(loop: MonitorLoop) -> Look:
    """Findings for a running machine that have an answer."""

    def findings(machine: Machine, ignore_pids: tuple[int, ...] = ()) -> list[Finding]:
        (found,) = attach_all([str(machine.qmp)], loop).attached
        try:
            regions, _ = find_regions(found.monitor, found.process)
            findings = examine(found.monitor, found.process, regions, ignore_pids=ignore_pids)
            return [one for one in findings if one.verdict > Verdict.ALLOW]
        finally:
            found.close()

    return findings


def test_a_plain_machine_is_allowed(tmp_path: Path, look: Look) -> None:
    extra = ["-device", "virtio-balloon-pci", "-device", "virtio-gpu-pci", "-netdev", "user,id=n"]
    with Machine(tmp_path, "-S", *SHARED, *extra, "-device", "virtio-net-pci,netdev=n") as machine:
        assert look(machine) == []


@pytest.mark.parametrize("address", ["id=b0", "addr=7"])
def test_free_page_reporting_is_found_by_name(address: str, tmp_path: Path, look: Look) -> None:
    extra = ["-device", f"virtio-balloon-pci,free-page-reporting=on,{address}"]
    with Machine(tmp_path, "-S", *SHARED, *extra) as machine:
        findings = look(machine)
    assert verdict(findings) is Verdict.ZERO_ONLY
    text = reason(findings) or ""
    assert "free-page-reporting" in text
    assert "virtio-balloon-pci" in text


@pytest.mark.parametrize(
    ("arguments", "key", "answer", "words"),
    [
        (["-icount", "shift=auto,rr=record,rrfile=RR"], "record-replay", Verdict.REFUSE, "record"),
        (["-incoming", "defer"], "migration", Verdict.PAUSE, "inmigrate"),
        (
            ["-virtfs", "local,path=/proc,mount_tag=t,security_model=none"],
            "9p-remote",
            Verdict.REFUSE,
            "filesystem proc",
        ),
    ],
)
def test_machine_wide_hazards(
    arguments: list[str], key: str, answer: Verdict, words: str, tmp_path: Path, look: Look
) -> None:
    extra = [word.replace("RR", str(tmp_path / "rr")) for word in arguments]
    with Machine(tmp_path, "-S", *SHARED, *extra) as machine:
        findings = look(machine)
    assert [(one.key, one.verdict) for one in findings] == [(key, answer)]
    assert verdict(findings) is answer
    assert words in findings[0].reason


def test_9p_on_a_local_filesystem_is_allowed(tmp_path: Path, look: Look) -> None:
    if filesystem_at(os.getpid(), str(tmp_path)) not in ("ext4", "xfs", "btrfs", "tmpfs"):
        pytest.skip("the temporary directory is not on a local filesystem")
    extra = ["-virtfs", f"local,path={tmp_path},mount_tag=t,security_model=none"]
    with Machine(tmp_path, "-S", *SHARED, *extra) as machine:
        assert look(machine) == []


@contextmanager
def mounted(place: Path) -> Iterator[None]:
    """A filesystem that is not local, as far as vmdedup knows, on that folder."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "sysfs", "none", place], check=False, capture_output=True)
    require(None if done.returncode == 0 else f"mount: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def exporting(folder: Path) -> list[str]:
    return ["-virtfs", f"local,path={folder},mount_tag=t,security_model=none"]


@pytest.mark.parametrize("name", ["below", "be low größe"])
def test_what_is_mounted_below_a_folder_is_exported_too(
    name: str, tmp_path: Path, look: Look
) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    (tmp_path / "link").symlink_to("exported")
    for path in (folder, tmp_path / "link"):
        with mounted(folder / name), Machine(tmp_path, "-S", *SHARED, *exporting(path)) as machine:
            (finding,) = look(machine)
        assert finding.key == "9p-remote"
        assert f"{folder / name} on filesystem sysfs" in finding.reason
    beside = tmp_path / "exported-not"
    with mounted(beside), Machine(tmp_path, "-S", *SHARED, *exporting(folder)) as machine:
        assert look(machine) == []


def test_what_is_mounted_below_a_folder_later_is_news(
    tmp_path: Path, look: Look, loop: MonitorLoop
) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    with Machine(tmp_path, "-S", *SHARED, *exporting(folder)) as machine:
        assert look(machine) == []
        with (
            QmpMonitor.connect(machine.own, loop) as monitor,
            Process("vm", machine.pid) as process,
        ):
            watch = Watch(monitor, process)
            assert not watch.has_news(at_leisure=True)
            with mounted(tmp_path / "beside"):
                assert not watch.has_news(at_leisure=True)
            with mounted(folder / "below"):
                assert watch.has_news(at_leisure=True)
                assert [one.key for one in look(machine)] == ["9p-remote"]
            watch.settle()
            assert not watch.has_news()


def test_a_guest_that_begins_to_run_guests_is_news(
    tmp_path: Path, boot: Boot, need: Need, loop: MonitorLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the cheap look, right before a merge too. QEMU's answer is altered on its way to us."""
    need(kvm_missing())
    vm = boot("tiny", accel="kvm", backend=Backend(mib=16), ready=False)
    (found,) = attach_all([str(vm.qmp_path)], loop).attached
    try:
        watch = Watch(found.monitor, found.process)
        assert not watch.has_news()
        honest, runs = found.monitor.execute_all, 0

        def answers(commands: Sequence[tuple[str, object]], **options: float) -> list[object]:
            told = honest(commands, **options)  # type: ignore[arg-type]
            for number, (command, _) in enumerate(commands):
                if command == "query-stats" and isinstance(told[number], list):
                    told[number] = [{"stats": [{"name": "nested_run", "value": runs}]}]
            return told

        monkeypatch.setattr(found.monitor, "execute_all", answers)
        assert not watch.has_news()
        runs = 7
        assert watch.has_news()
        watch.settle()
        runs = 12
        assert not watch.has_news()
    finally:
        found.close()


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("then", ["kept", "removed", "changed"])
def test_a_folder_that_a_configuration_file_names(
    then: str, beside: bool, tmp_path: Path, look: Look
) -> None:
    """Only as QEMU has read it; a harmless one on the command line says nothing of it."""
    file = tmp_path / "more.cfg"
    file.write_text(
        f'[fsdev "hidden"]\n  fsdriver = "local"\n  path = "{tmp_path}"\n'
        '  security_model = "none"\n'
        '[device "d"]\n  driver = "virtio-9p-pci"\n  fsdev = "hidden"\n  mount_tag = "h"\n'
    )
    extra = ["-readconfig", str(file), *(exporting(tmp_path) if beside else [])]
    with Machine(tmp_path, "-S", *SHARED, *extra) as machine:
        if then == "kept":
            assert look(machine) == []
            return
        if then == "removed":
            file.unlink()
        else:
            late_s = time.time() + 10
            os.utime(file, (late_s, late_s))
        (finding,) = look(machine)
    assert finding.key == "9p-remote"
    assert "virtio-9p-pci (d) exports a folder on filesystem unknown" in finding.reason


@pytest.mark.parametrize(
    ("capability", "key", "answer"),
    [
        ("x-ignore-shared", "ignore-shared", Verdict.UNMERGE_FIRST),
        ("background-snapshot", "own-userfault", Verdict.PAUSE),
        ("postcopy-ram", "own-userfault", Verdict.PAUSE),
        ("x-colo", "colo", Verdict.REFUSE),
    ],
)
def test_migration_capabilities(
    capability: str, key: str, answer: Verdict, tmp_path: Path, look: Look, loop: MonitorLoop
) -> None:
    shared = capability == "x-ignore-shared"
    memory = SHARED if shared else ("-machine", "pc")
    needs = ["return-path"] if capability == "x-colo" else []  # from QEMU 11 on
    with Machine(tmp_path, "-S", *memory) as machine:
        assert look(machine) == []
        with QmpMonitor.connect(machine.own, loop) as monitor:
            for state in (True, False):
                wanted = [{"capability": one, "state": state} for one in (capability, *needs)]
                monitor.execute("migrate-set-capabilities", {"capabilities": wanted})
                expected = [(key, answer)] if state else []
                assert [(one.key, one.verdict) for one in look(machine)] == expected


@pytest.mark.parametrize("mode", ["cpr-reboot", "cpr-transfer"])
def test_a_restart_of_qemu_that_keeps_the_memory(
    mode: str, tmp_path: Path, look: Look, loop: MonitorLoop
) -> None:
    with Machine(tmp_path, "-S", *SHARED) as machine:
        assert look(machine) == []
        with QmpMonitor.connect(machine.own, loop) as monitor:
            try:
                monitor.execute("migrate-set-parameters", {"mode": mode})
            except MonitorError as error:
                pytest.skip(f"this QEMU has no migration mode {mode}: {error.reason}")
            findings = look(machine)
            assert verdict(findings) is Verdict.UNMERGE_FIRST
            assert mode in (reason(findings) or "")
            monitor.execute("migrate-set-parameters", {"mode": "normal"})
            assert look(machine) == []


@pytest.mark.parametrize(
    ("device", "options", "machine_type", "key"),
    [
        ("virtio-mem-pci,memdev=ram1,id=x,prealloc=on", "", "pc", "preallocated"),
        ("nvdimm,memdev=ram1,id=x", "", "pc,nvdimm=on", "persistent-memory"),
        ("ivshmem-plain,memdev=ram1,id=x", "share=on", "pc", "ivshmem"),
    ],
)
def test_a_backend_in_special_use_is_left_out(
    device: str, options: str, machine_type: str, key: str, tmp_path: Path, look: Look
) -> None:
    arguments = ["-S", "-m", "64,slots=2,maxmem=1G", "-object", backend("memfd", 0, 64, "share=on")]
    arguments += ["-object", backend("ram", 1, 64, options)]
    arguments += ["-machine", f"{machine_type},memory-backend=ram0", "-device", device]
    with Machine(tmp_path, *arguments) as machine:
        findings = look(machine)
    assert [(one.key, one.backend) for one in findings] == [(key, "ram1")]
    assert set(refused_backends(findings)) == {"ram1"}
    assert verdict(findings) is Verdict.ALLOW


def test_persistent_memory_by_option_is_left_out(tmp_path: Path, look: Look) -> None:
    options = backend("file", 1, 64, "share=on,pmem=on", path=tmp_path / "ram1")
    arguments = ["-S", "-m", "64,slots=2,maxmem=1G", "-object", backend("memfd", 0, 64, "share=on")]
    arguments += ["-object", options, "-device", "pc-dimm,memdev=ram1"]
    with Machine(tmp_path, *arguments, "-machine", "pc,memory-backend=ram0") as machine:
        findings = look(machine)
    assert set(refused_backends(findings)) == {"ram1"}
    assert "pmem=on" in refused_backends(findings)["ram1"]


@pytest.mark.alone
def test_kernel_ksm_pauses_merging_of_private_memory(tmp_path: Path, look: Look) -> None:
    run = Path("/sys/kernel/mm/ksm/run")
    if not run.exists() or run.read_text().strip() == "1":
        pytest.skip("KSM is not there, or runs already")
    before = run.read_text()
    private = ("-object", backend("ram", 0, 64), "-machine", "pc,memory-backend=ram0")
    with (
        Machine(tmp_path, "-S", *private, name="private") as machine,
        Machine(tmp_path, "-S", *SHARED, name="shared") as other,
    ):
        assert look(machine) == []
        try:
            run.write_text("1")
            findings, none = look(machine), look(other)
        finally:
            run.write_text(before)
        assert none == []
        assert [(one.key, one.verdict) for one in findings] == [("kernel-ksm", Verdict.PAUSE)]
        assert "ram0" in findings[0].reason
        assert look(machine) == []


HOLDER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
view = mmap.mmap(fd, 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that maps the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == b"mapped\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def test_another_process_on_the_ram_file_is_refused_until_it_ends(
    tmp_path: Path, look: Look
) -> None:
    file = Path("/dev/shm") / f"hazard-{os.getpid()}"
    memory = ["-object", backend("file", 0, 64, "share=on", path=file)]
    try:
        with Machine(tmp_path, "-S", *memory, "-machine", "pc,memory-backend=ram0") as machine:
            assert look(machine) == []
            with holder(file) as process:
                findings = look(machine)
                assert verdict(findings) is Verdict.UNMERGE_FIRST
                assert str(process.pid) in (reason(findings) or "")
                assert "python" in (reason(findings) or "")
                assert look(machine, ignore_pids=(process.pid,)) == []
            assert look(machine) == []
    finally:
        file.unlink(missing_ok=True)


def test_our_own_mapping_of_the_ram_file_is_no_hazard(tmp_path: Path, look: Look) -> None:
    file = Path("/dev/shm") / f"hazard-own-{os.getpid()}"
    memory = ["-object", backend("file", 0, 64, "share=on", path=file)]
    try:
        with (
            Machine(tmp_path, "-S", *memory, "-machine", "pc,memory-backend=ram0") as machine,
            opened(file) as stream,
            mmap.mmap(stream.fileno(), 4096, prot=mmap.PROT_READ),
        ):
            assert look(machine) == []
    finally:
        file.unlink(missing_ok=True)


def opened(file: Path) -> BinaryIO:
    """QEMU listens on its sockets a moment before it has its memory."""
    assert becomes_true(file.exists)
    return file.open("rb")


def test_a_second_qemu_on_the_ram_file_refuses_both(tmp_path: Path, look: Look) -> None:
    file = Path("/dev/shm") / f"hazard-two-{os.getpid()}"
    memory = ["-S", "-object", backend("file", 0, 64, "share=on", path=file)]
    memory += ["-machine", "pc,memory-backend=ram0"]
    try:
        with (
            Machine(tmp_path, *memory, name="a") as first,
            Machine(tmp_path, *memory, name="b") as second,
        ):
            for one, other in ((first, second), (second, first)):
                findings = look(one)
                assert [found.key for found in findings] == ["other-mapper"]
                assert str(other.pid) in findings[0].reason
    finally:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("share", ["on", "off"])
def test_an_ordinary_filesystem_is_merged_under_stop(
    share: str, tmp_path: Path, look: Look
) -> None:
    kind = filesystem_at(os.getpid(), str(tmp_path))
    if kind == "tmpfs":
        pytest.skip("the temporary directory is on tmpfs")
    memory = ["-object", backend("file", 0, 64, f"share={share}", path=tmp_path / "ram")]
    with Machine(tmp_path, "-S", *memory, "-machine", "pc,memory-backend=ram0") as machine:
        findings = look(machine)
    assert verdict(findings) is Verdict.STOP_ONLY
    assert kind in (reason(findings) or "")
    assert refused_backends(findings) == {}


def test_a_debugger_is_refused(tmp_path: Path, look: Look) -> None:
    with Machine(tmp_path, "-S", *SHARED) as machine:
        tracer = subprocess.Popen(
            [sys.executable, "-c", TRACER, str(machine.pid)], stdout=subprocess.PIPE
        )
        assert tracer.stdout is not None
        try:
            assert tracer.stdout.readline() == b"tracing\n"
            findings = look(machine)
            assert [one.key for one in findings] == ["debugger"]
            assert str(tracer.pid) in findings[0].reason
        finally:
            tracer.send_signal(signal.SIGKILL)
            tracer.wait()
            tracer.stdout.close()
        assert look(machine) == []


TRACER = """
import ctypes, sys, time
SEIZE = 0x4206
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
assert libc.ptrace(SEIZE, int(sys.argv[1]), None, None) == 0, ctypes.get_errno()
print("tracing", flush=True)
time.sleep(600)
"""
