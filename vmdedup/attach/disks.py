"""Which requests of a VM's disks are in flight, by what QEMU and the kernel report.

Owns the questions. `find_disks` finds out once which disks a VM has; `look` then asks about
all of them at one moment, in one batch of monitor commands:

    virtio-blk, virtio-scsi   requests taken and not yet returned, for each queue
    IDE of a PC (piix)        the channel's alternate status register; reading changes nothing
    AHCI                      the registers of commands issued and active, likewise
    any other device          only whether a request has ended lately; asked if QEMU itself
                              reaches the storage (NBD, iSCSI, RBD, ...)

The kernel is asked for threads inside a call on a file, such as those of `aio=threads`.
QEMU has no query for requests in flight at other devices: with `aio=native` or
`aio=io_uring` on a file, theirs are not seen. Reads only, and only those device registers
that reading does not change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vmdedup.attach import replies
from vmdedup.attach.monitor import Monitor, Question, one_line
from vmdedup.core.in_flight import Look, Requests
from vmdedup.linux.proc_file import read_record

_LOOK_TIMEOUT_S = 3.0
"""Longest wait for the monitor's answer; a QEMU that takes longer is stuck already."""
_QUIET_S = 35.0
"""A device that cannot be asked counts as idle once no request has ended for so long. A guest
gives a request up after 30 s (Linux: SCSI, NVMe) and resets the device, which drains it."""
_REMOTE_DRIVERS = frozenset(
    ("nbd", "rbd", "iscsi", "nfs", "ssh", "gluster", "http", "https", "ftp", "ftps")
)
"""Drivers by which QEMU reaches storage without the kernel's knowledge (block/*.c)."""
_MOST_QUEUES = 1024
"""Most queues of one device (include/hw/virtio/virtio.h: VIRTIO_QUEUE_MAX)."""
_QUEUES_AT_ONCE = 8
"""Queues asked for in one batch; most disks have one for each vCPU."""
_NO_QUEUE = replies.QueueStatus()
"""Stands for the answer if QEMU says that there is no queue of that number."""
_VIRTIO_DISKS = ("virtio-blk", "virtio-scsi")
_PC_IDE = ("piix3-ide", "piix4-ide")
_STATUS_PORTS = (0x3F6, 0x376)
"""Ports of the alternate status registers: reading them acknowledges no interrupt
(hw/ide/core.c: ide_status_read), and on a PC they never move."""
_BUSY = 0x80 | 0x08
"""BSY and DRQ: one of them is set from a command's start to its end."""
_NO_DRIVE = 0xFF
_AHCI_CLASS = 0x0106
_AHCI_BAR = 5
_AHCI_PORTS, _AHCI_PORT_BYTES, _AHCI_ACTIVE = 0x100, 0x80, 0x34
"""PxSACT, and after it PxCI, of port 0 (hw/ide/ahci_internal.h); reading changes neither."""
_IO_SUBMIT = "209"
_FILE_CALLS = frozenset(
    ("17", "18", "74", "75", "77", "209", "277", "285", "295", "296", "326", "327", "328")
)
"""Numbers (x86-64) of pread64, pwrite64, fsync, fdatasync, ftruncate, io_submit,
sync_file_range, fallocate, preadv, pwritev, copy_file_range, preadv2 and pwritev2."""
_THREADS = "files of its disks"


@dataclass(frozen=True)
class DiskDevice:
    """A device to ask. `disks`: QEMU's names (qdev) of its drives, whose requests it carries."""

    title: str
    """The device's name in messages."""
    disks: frozenset[str]
    path: str = ""
    """Path of a virtio device in QEMU's object tree."""
    number: int = 0
    """How many queues the device has, or the number of its channel or port."""


@dataclass(frozen=True)
class Disks:
    """The block devices of a VM, grouped by how to ask about them."""

    virtio: tuple[DiskDevice, ...] = ()
    channels: tuple[DiskDevice, ...] = ()
    """IDE channels of a PC."""
    ports: tuple[DiskDevice, ...] = ()
    """AHCI ports."""
    others: tuple[DiskDevice, ...] = ()
    """Devices that cannot be asked, on storage that QEMU itself reaches."""
    exist: bool = False
    """Whether the VM has any block device, including those that only the kernel reports on."""

    @property
    def needs_counts(self) -> bool:
        """Whether each look must also count the requests that have ended."""
        return bool(self.channels or self.ports or self.others)


def find_disks(monitor: Monitor) -> Disks:
    """Find the block devices that the VM has now. Raises VmError."""
    answer = monitor.query("query-blockstats", replies.BlockStatsList)
    stats = _used(answer)
    if not stats:
        return Disks()
    known = monitor.query_if_known("x-query-virtio", replies.VirtioDevices, [])
    virtio = [one for one in known if one.name in _VIRTIO_DISKS]
    carried: dict[str, set[str]] = {one.path: set() for one in virtio}
    channels, ports, others = [], [], []
    for disk in stats:
        qdev = disk.qdev or ""
        path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
        bus = _property(monitor, path, "parent_bus")
        over = next((one for one in carried if path == one or bus.startswith(f"{one}/")), None)
        if over is not None:
            carried[over].add(qdev)
            continue
        kind = _property(monitor, path, "type") or "disk"
        controller, _, slot = bus.rpartition("/")
        number = slot.rpartition(".")[2]
        device = DiskDevice(
            f"{_name(disk)} ({kind})",
            frozenset((qdev,)),
            number=int(number) if number.isdigit() else -1,
        )
        made_by = _property(monitor, controller, "type") if controller else ""
        if made_by in _PC_IDE and device.number in (0, 1):
            channels.append(device)
        elif made_by == "ich9-ahci" and device.number >= 0:
            ports.append(device)
        elif _reaches_storage_itself(monitor):
            others.append(device)
    return Disks(
        tuple(_virtio(monitor, one, carried[one.path], stats) for one in virtio),
        tuple(channels),
        tuple(ports),
        tuple(others),
        exist=True,
    )


def _virtio(
    monitor: Monitor,
    found: replies.VirtioDevice,
    disks: set[str],
    stats: Sequence[replies.BlockStats],
) -> DiskDevice:
    names = [_name(disk) for disk in stats if disk.qdev in disks]
    title = f"{', '.join(names) or one_line(found.path, 80)} ({found.name})"
    return DiskDevice(title, frozenset(disks), found.path, _count_queues(monitor, found.path))


def _count_queues(monitor: Monitor, path: str) -> int:
    """How many queues a virtio device has: QEMU refuses the first number past the last.

    SAFETY: `x-query-virtio-status` would tell too, but QEMU 11.1.3 aborts at it (an assertion
    of qapi/qapi-visit-core.c: visit_start_struct), and the guest is lost.
    """
    for first in range(0, _MOST_QUEUES, _QUEUES_AT_ONCE):
        numbers = range(first, first + _QUEUES_AT_ONCE)
        answers = monitor.ask_all([_queue(path, number) for number in numbers])
        for number, answer in zip(numbers, answers, strict=True):
            if answer is _NO_QUEUE:
                return number
    return _MOST_QUEUES


def look(monitor: Monitor, disks: Disks, *, closely: bool) -> Look:
    """Requests in flight now; `closely`, also how long ended ones took. Raises VmError.

    If the VM has only virtio devices and nothing is in flight, one question for each of
    their queues is enough.
    """
    # First, because it needs no answer from QEMU.
    threads = _threads_in_file_calls(monitor.peer_pid)
    questions = list(_questions(disks, closely=closely))
    answers = iter(monitor.ask_all(questions, timeout_s=_LOOK_TIMEOUT_S))
    at_s = time.monotonic()
    places: dict[str, Requests] = {}
    for device in disks.virtio:
        places |= _in_queues(device, [next(answers) for _ in range(device.number)])
    registers = [_register(next(answers)) for _ in disks.channels]
    commands = _in_ports(monitor, disks, next(answers)) if disks.ports else []
    stats = next(answers) if closely or disks.needs_counts else []
    for device, status in zip(disks.channels, registers, strict=True):
        if status & _BUSY and status != _NO_DRIVE:
            places[device.title] = Requests(1, _counts(stats, device).ended)
    for device, count in zip(disks.ports, commands, strict=True):
        if count:
            places[device.title] = Requests(count, _counts(stats, device).ended)
    for device in disks.others:
        counts = _counts(stats, device)
        if counts.idle_time_ns is not None and counts.idle_time_ns < _QUIET_S * 1e9:
            places[device.title] = Requests(1, counts.ended)
    if threads:
        places[_THREADS] = Requests(len(threads), each=threads)
    spent_s = {each.title: _counts(stats, each).spent_s for each in disks.virtio if closely}
    return Look(at_s, places, spent_s)


def _questions(disks: Disks, *, closely: bool) -> Iterator[Question[Any]]:
    for device in disks.virtio:
        for number in range(device.number):
            yield _queue(device.path, number)
    for device in disks.channels:
        yield _hmp(f"i/b {_STATUS_PORTS[device.number]:#x}")
    if disks.ports:
        yield Question("query-pci", replies.PciBuses, [])
    if closely or disks.needs_counts:
        yield Question("query-blockstats", replies.BlockStatsList, [])


def _queue(path: str, number: int) -> Question[replies.QueueStatus]:
    where = {"path": path, "queue": number}
    return Question("x-query-virtio-queue-status", replies.QueueStatusReply, _NO_QUEUE, where)


def _hmp(line: str) -> Question[str]:
    return Question("human-monitor-command", replies.HmpReply, "", {"command-line": line})


def _in_queues(device: DiskDevice, queues: Sequence[replies.QueueStatus]) -> dict[str, Requests]:
    """Requests in flight in a virtio device, and in each queue if it has several."""
    in_flight = sum(each.inuse for each in queues)
    if not in_flight:
        return {}
    found = {device.title: Requests(in_flight, sum(each.used_idx for each in queues) % 65536)}
    if len(queues) > 1:
        for number, each in enumerate(queues):
            if each.inuse:
                found[f"{device.title}, queue {number}"] = Requests(each.inuse, each.used_idx)
    return found


def _in_ports(monitor: Monitor, disks: Disks, buses: Sequence[replies.PciBus]) -> list[int]:
    """How many commands each of the AHCI ports has in flight."""
    base = _ahci_base(buses)
    if base < 0:
        return [0] * len(disks.ports)
    first = base + _AHCI_PORTS + _AHCI_ACTIVE
    lines = [f"xp /2wx {first + each.number * _AHCI_PORT_BYTES:#x}" for each in disks.ports]
    answers = monitor.ask_all(list(map(_hmp, lines)), timeout_s=_LOOK_TIMEOUT_S)
    return [_register(answer).bit_count() for answer in answers]


def _ahci_base(buses: Sequence[replies.PciBus]) -> int:
    """Address of the AHCI controller's registers now; -1 if there is none, or several.

    Asked each time: a guest that reboots may map something else there.
    """
    found = [
        region.address
        for bus in buses
        for device in bus.devices
        if device.class_info.code == _AHCI_CLASS
        for region in device.regions
        if region.bar == _AHCI_BAR
    ]
    return found[0] if len(found) == 1 else -1


def _register(answer: str) -> int:
    """A register's value, from the answer to `i` or `xp`; the bits of several are combined."""
    value = 0
    for word in answer.partition("=" if "=" in answer else ":")[2].split():
        with suppress(ValueError):
            value |= int(word, 16)
    return value


def _threads_in_file_calls(pid: int) -> frozenset[str]:
    """The calls on files that QEMU's threads are inside, with their arguments."""
    found = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):  # it has just ended, or we may not look
                call = read_record(f"/proc/{pid}/task/{thread}/syscall")
                if call.partition(" ")[0] in _FILE_CALLS:
                    found.append(f"{thread} {call}")
    return frozenset(found)


def is_submitting(pid: int) -> bool:
    """Whether a thread is submitting requests to the kernel, which may take as long as they do."""
    return any(call.split()[1] == _IO_SUBMIT for call in _threads_in_file_calls(pid))


def _reaches_storage_itself(monitor: Monitor) -> bool:
    nodes = monitor.query_if_known(
        "query-named-block-nodes", replies.BlockNodes, [], {"flat": True}
    )
    return any(node.driver.partition("+")[0] in _REMOTE_DRIVERS for node in nodes)


def _property(monitor: Monitor, path: str, name: str) -> str:
    """A QOM property that is text; "" if the object has none of that name."""
    where = {"path": path, "property": name}
    return monitor.query_if_known("qom-get", replies.TextReply, "", where)


def _used(stats: Sequence[replies.BlockStats]) -> list[replies.BlockStats]:
    """Drives that a device uses and that have a medium."""
    return [each for each in stats if each.qdev and each.node_name is not None]


def _counts(stats: Sequence[replies.BlockStats], device: DiskDevice) -> replies.BlockCounts:
    """Counts of all drives of a device together, with the time since one last ended a request."""
    all_ = [each.stats for each in stats if each.qdev in device.disks]
    if len(all_) == 1:
        return all_[0]
    idle = [each.idle_time_ns for each in all_ if each.idle_time_ns is not None]
    names = [name for name in replies.BlockCounts.model_fields if name != "idle_time_ns"]
    sums = {name: sum(getattr(each, name) for each in all_) for name in names}
    return replies.BlockCounts(idle_time_ns=min(idle, default=None), **sums)


def _name(disk: replies.BlockStats) -> str:
    return one_line(disk.device or disk.node_name or disk.qdev or "", 80)
