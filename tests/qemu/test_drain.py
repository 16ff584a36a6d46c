"""Storage that hangs under a guest's load: no drain is begun, and nothing of the VM freezes.

A drain holds QEMU's big lock until the last request in flight has ended. While the storage
hangs, guest, second monitor and the merging of others must go on; when it answers again,
the VM is merged by itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.disk import write_image
from tests.harness.hanging import Kind, Storage, server_missing, stands_still
from tests.harness.kernel import becomes_true
from tests.harness.monitor import connected, qmp
from tests.harness.vm import Vm
from tests.qemu.conftest import Boot, MakeSettings, Need
from tests.qemu.machine import Machine
from tests.service.daemon import assert_unharmed
from vmdedup.attach.disks import find_disks
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.attach.storage import Storage as KnownStorage
from vmdedup.deduplicator import Deduplicator
from vmdedup.errors import DrainPostponedError
from vmdedup.models import SharingReport

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(400)]

_WORKER = {"mib": 2, "rewrite_per_s": 32}
_READER = {**_WORKER, "dma": 1, "dma_mib": 2, "dma_hold_ms": 100}


@pytest.fixture
def served(need: Need, tmp_path: Path) -> Iterator[Callable[[Kind], Storage]]:
    """Starts a server over a fresh image of a reader's disk."""
    with ExitStack() as exits:

        def start(kind: Kind) -> Storage:
            need(root_missing() or server_missing(kind))
            image = write_image(tmp_path / f"image-{kind}", mib=4)
            return exits.enter_context(Storage(kind, image, tmp_path))

        yield start


def _reader(boot: Boot, storage: Storage, aio: str, **parameters: int) -> Vm:
    aio, _, thread = aio.partition(",")
    device = "virtio-blk-pci,drive=disk"
    extra = ["-blockdev", storage.node("disk", aio)]
    if thread:
        extra += ["-object", "iothread,id=thread"]
        device += ",iothread=thread"
    return boot(
        name="reader", parameters={**_READER, **parameters}, extra=[*extra, "-device", device]
    )


def _merged(vm: Vm, report: SharingReport) -> int:
    row = next(row for row in report.vms if row.pid == vm.pid)
    return row.merged_pages + row.zero_pages


def _reason(vm: Vm, report: SharingReport) -> str:
    return next(row.reason or "" for row in report.vms if row.pid == vm.pid)


def _reads(vm: Vm) -> bool:
    """Whether a read of the guest ends in a moment."""
    before = vm.status().dma_reads
    time.sleep(1.2)
    return vm.status().dma_reads > before


def _works(vm: Vm) -> bool:
    """Whether the guest gets on, as its console tells, and its second monitor answers."""
    before = vm.status().checks
    return becomes_true(lambda: vm.status().checks > before) and (
        qmp(vm.test_qmp_path, "query-status")["status"] == "running"
    )


@pytest.mark.both_qemus
@pytest.mark.parametrize(
    ("kind", "aio"),
    [
        ("nbd", "threads"),
        ("fuse", "threads"),
        ("fuse", "native,iothread"),
        ("loop", "native"),
        ("loop", "io_uring"),
    ],
)
def test_a_vm_whose_storage_hangs_is_left_alone_and_works(
    settings: MakeSettings,
    served: Callable[[Kind], Storage],
    boot: Boot,
    kind: Kind,
    aio: str,
) -> None:
    storage = served(kind)
    reader = _reader(boot, storage, aio)
    others = [boot(name=f"other{n}", parameters={**_WORKER, "seed": n}) for n in (2, 3)]
    with Deduplicator(settings(first_look_ms=10)) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in (reader, *others)])
        with storage.hung():
            assert becomes_true(lambda: stands_still(reader))
            report = dedup.run(until_converged=True, timeout_s=60)
            assert report.converged
            assert _merged(reader, report) == 0
            assert "not end since" in _reason(reader, report)
            assert "disk" in _reason(reader, report)
            assert all(_merged(vm, report) > 100 for vm in others)
            assert _works(reader)
            assert dedup.unmerge([others[0].name]).vms[0].remaining_pages == 0
            assert dedup.verify().ok
        assert becomes_true(lambda: _reads(reader))
        assert becomes_true(
            lambda: (
                _merged(reader, dedup.run(passes=2)) > 100
                and _merged(others[1], dedup.report()) > 100
            )
        )
        assert becomes_true(lambda: _reason(reader, dedup.run(passes=1)) == "")
    assert_unharmed(reader, *others)


@pytest.mark.both_qemus
def test_storage_that_hangs_before_qemu_was_asked_about_its_disks(
    settings: MakeSettings,
    served: Callable[[Kind], Storage],
    boot: Boot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A VM that submits requests just then is not asked when it is attached."""
    storage = served("fuse")
    reader = _reader(boot, storage, "native,iothread")
    other = boot(name="other", parameters={**_WORKER, "seed": 2})
    with Deduplicator(settings(first_look_ms=10)) as dedup:
        with monkeypatch.context() as patch:
            patch.setattr("vmdedup.attach.storage.is_submitting", lambda _: True)
            dedup.attach([str(vm.qmp_path) for vm in (reader, other)])
        with storage.hung():
            assert becomes_true(lambda: stands_still(reader))
            report = dedup.run(until_converged=True, timeout_s=60)
            assert report.converged
            assert _merged(reader, report) == 0
            assert "files of its disks" in _reason(reader, report)
            assert "not end since" in _reason(reader, report)
            assert _merged(other, report) > 100
            assert _works(reader)
        assert becomes_true(lambda: _merged(reader, dedup.run(passes=2)) > 100)
    assert_unharmed(reader, other)


def test_a_file_on_storage_that_hangs_is_not_waited_for(
    served: Callable[[Kind], Storage], boot: Boot
) -> None:
    """QEMU has it open; which file that is can be told without asking its server."""
    storage = served("fuse")
    reader = _reader(boot, storage, "native,iothread")
    other = boot(name="other", parameters={**_WORKER, "seed": 2})
    sockets = [word for vm in (reader, other) for word in ("--qmp", str(vm.qmp_path))]
    verb = [sys.executable, "-c", "from vmdedup.cli.main import main; main()", "vms", "--json"]
    with storage.hung():
        assert becomes_true(lambda: stands_still(reader))
        # A process of its own: in such a call it would wait as long as the storage does.
        done = subprocess.run([*verb, *sockets], capture_output=True, timeout=120, check=False)
    rows = {row["name"]: row for row in json.loads(done.stdout)["vms"]}
    assert rows[other.name]["mergeable"], rows


def test_a_vm_whose_storage_hangs_is_not_stopped_either(
    settings: MakeSettings, served: Callable[[Kind], Storage], boot: Boot
) -> None:
    """`stop` drains too: where merging is possible in pauses only there is none."""
    storage = served("nbd")
    reader = _reader(boot, storage, "threads")
    other = boot(name="other", parameters={**_WORKER, "seed": 2})
    with Deduplicator(settings(mask=["userfaultfd-wp"], first_look_ms=10)) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in (reader, other)])
        with storage.hung():
            assert becomes_true(lambda: stands_still(reader))
            report = dedup.run(until_converged=True, timeout_s=60)
            assert "not end since" in _reason(reader, report)
            assert {row.pid: row.stops for row in report.vms}[reader.pid] == 0
            assert _merged(other, report) > 100
            assert _works(reader)
        assert becomes_true(lambda: _merged(reader, dedup.run(passes=2)) > 100)
    assert_unharmed(reader, other)


def test_after_a_long_drain_only_an_awaited_merge_drains_soon(
    settings: MakeSettings, boot: Boot
) -> None:
    vms = [boot("bare", name=f"vm{n}", parameters={"mib": 4, "seed": n}) for n in (1, 2)]
    with Deduplicator(settings(first_look_ms=10)) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        assert dedup._fleet is not None
        engine = dedup._fleet.engine
        rested, other = engine.vms
        rested.storage.drained(10.0)
        assert not rested.storage.rests
        rested.storage.drained(60_000.0)
        engine.served.is_foreground = lambda: False
        for _ in range(4):
            engine.begin_pass(everywhere=False)
            while not engine.looks.is_done:
                engine.looks.look_some(1 << 20)
            engine.finish_pass()
        assert (rested.totals.drains, other.totals.drains > 0) == (0, True)
        engine.served.is_foreground = lambda: True
        assert _merged(vms[0], dedup.run(passes=2)) > 100
        assert rested.totals.drains > 0
    for vm in vms:
        vm.wait_passes(1)
        assert vm.errors == 0


@pytest.mark.both_qemus
def test_one_request_that_hangs_among_others_that_do_not(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """As where one part of a distributed storage is away: the guest reads on beside it."""
    image = write_image(tmp_path / "image", mib=4)
    file = f"file.driver=blkdebug,file.image.driver=file,file.image.filename={image}"
    # With a name of its own: QEMU 10 would wait for the request to give it one.
    drive = f"driver=raw,{file},if=none,id=disk"
    extra = ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]
    reader = boot(name="reader", parameters=_READER, extra=extra)
    other = boot(name="other", parameters={**_WORKER, "seed": 2})
    with Deduplicator(settings(first_look_ms=10)) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in (reader, other)])
        _qemu_io(reader, "break read_aio held")
        time.sleep(0.5)
        assert _reads(reader)
        report = dedup.run(until_converged=True, timeout_s=60)
        assert _merged(reader, report) == 0
        assert "in flight" in _reason(reader, report)
        assert _merged(other, report) > 100
        assert _works(reader)
        _qemu_io(reader, "resume held")
        assert becomes_true(lambda: _merged(reader, dedup.run(passes=2)) > 100)
    assert_unharmed(reader, other)


def _qemu_io(vm: Vm, line: str) -> None:
    qmp(vm.test_qmp_path, "human-monitor-command", **{"command-line": f'qemu-io disk "{line}"'})


_BOOTS_FROM: dict[str, tuple[str, Kind, list[str]]] = {
    "virtio-blk": ("pc", "nbd", ["virtio-blk-pci,drive=disk,bootindex=1"]),
    "virtio-scsi": ("pc", "nbd", ["virtio-scsi-pci", "scsi-hd,drive=disk,bootindex=1"]),
    "ide": ("pc", "nbd", ["ide-hd,drive=disk,bootindex=1"]),
    "ahci": ("q35", "nbd", ["ide-hd,drive=disk,bus=ide.2,bootindex=1"]),
    "nvme": ("pc", "fuse", ["nvme,drive=disk,serial=1,bootindex=1"]),
}


@pytest.mark.both_qemus
@pytest.mark.parametrize("device", _BOOTS_FROM)
def test_a_request_in_flight_is_seen_on(
    served: Callable[[Kind], Storage], tmp_path: Path, device: str
) -> None:
    """The firmware's first read hangs."""
    machine, kind, devices = _BOOTS_FROM[device]
    storage = served(kind)
    arguments = ["-S", "-machine", machine, "-blockdev", storage.node("disk")]
    arguments += [word for each in devices for word in ("-device", each)]
    with (
        Machine(tmp_path, *arguments) as started,
        MonitorLoop() as loop,
        QmpMonitor.connect(started.qmp, loop) as monitor,
        connected(started.own) as execute,
    ):
        known = KnownStorage(monitor)
        monitor.drain()
        with storage.hung():
            execute("cont")
            assert becomes_true(lambda: _is_put_off(monitor))
            began = time.monotonic()
            assert becomes_true(lambda: known.away is not None)
            assert "disk" in (known.away or "")
            assert time.monotonic() - began < 10
            assert _is_put_off(monitor)
            assert execute("query-status")["status"] == "running"
        assert becomes_true(lambda: not _is_put_off(monitor))
        assert known.away is None
        assert monitor.drain() < 10_000
        assert execute("query-status")["status"] == "running"


def _is_put_off(monitor: QmpMonitor) -> bool:
    try:
        monitor.require_drainable()
    except DrainPostponedError:
        return True
    return False


_VIRTIO: dict[str, tuple[list[str], int]] = {
    "one": (["virtio-blk-pci,drive=disk,num-queues=1"], 1),
    "a batch": (["virtio-blk-pci,drive=disk,num-queues=8"], 8),
    "more": (["virtio-blk-pci,drive=disk,num-queues=20"], 20),
    "control and event": (["virtio-scsi-pci,num_queues=3", "scsi-hd,drive=disk"], 5),
}


@pytest.mark.both_qemus
@pytest.mark.parametrize("case", _VIRTIO)
def test_queues_of_virtio_disks_are_counted(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU 11.1 aborts at `x-query-virtio-status`, which tells their number: it is not asked."""
    devices, queues = _VIRTIO[case]
    arguments = ["-S", "-blockdev", "null-co,node-name=disk,size=1048576"]
    arguments += [word for each in devices for word in ("-device", each)]
    asked: set[str] = set()

    def asking(
        self: QmpMonitor, commands: Sequence[tuple[str, Mapping[str, object] | None]], **limits: Any
    ) -> list[object]:
        asked.update(command for command, _ in commands)
        return execute_all(self, commands, **limits)

    execute_all = QmpMonitor.execute_all
    monkeypatch.setattr(QmpMonitor, "execute_all", asking)
    with (
        Machine(tmp_path, *arguments) as started,
        MonitorLoop() as loop,
        QmpMonitor.connect(started.qmp, loop) as monitor,
    ):
        found = find_disks(monitor)
        assert [device.number for device in found.virtio] == [queues]
        assert "x-query-virtio-queue-status" in asked
        assert "x-query-virtio-status" not in asked
        assert started.process.poll() is None
