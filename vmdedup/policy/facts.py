"""The facts about a VM that decide whether it may be merged.

Owns the questions: to QEMU about devices, drives, migration and run state, to
the kernel about pins, descriptors and other mappings. Answers with one frozen
`Facts` value, so that the table in `hazards.py` decides without asking again.
Reads only. Whatever an older QEMU does not know counts as absent; a missing
answer raises.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from vmdedup.attach import replies
from vmdedup.attach.cmdline import share_folders
from vmdedup.attach.config_file import whole_command_line
from vmdedup.attach.monitor import Monitor, Question, one_line
from vmdedup.attach.ranges import Region
from vmdedup.errors import MonitorError, VmGoneError
from vmdedup.linux.descriptors import descriptor_links, userfaultfds
from vmdedup.linux.mounts import filesystem_at, mounted_below, mounts, resolved
from vmdedup.linux.proc_file import read_record
from vmdedup.linux.process import Process
from vmdedup.policy.mappers import Mapper, own_aliases, processes_mapping
from vmdedup.settings import DEFAULT_DRAIN_TRUSTED, Versions

DEVICE_FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon")
_KSM_RUN = Path("/sys/kernel/mm/ksm/run")
_PROPERTIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("virtio-balloon", ("free-page-reporting", "page-poison")),
    ("virtio-gpu", ("blob",)),
    ("virtio-vga", ("blob",)),
    ("virtio-mem", ("memdev", "prealloc")),
    ("hv-balloon", ("memdev",)),
    ("virtio-pmem", ("memdev",)),
    ("virtio-9p", ("fsdev",)),
    ("nvdimm", ("memdev",)),
    ("ivshmem-plain", ("memdev",)),
    ("cxl-type3", ("memdev", "volatile-memdev", "persistent-memdev")),
    ("nvme", ("pmrdev",)),
)
"""The properties that the table asks for, by the beginning of a device's type."""


@dataclass(frozen=True)
class Device:
    """A device given with -device or device_add."""

    id: str
    type: str
    properties: dict[str, str | bool]

    @property
    def title(self) -> str:
        """The device's name in messages."""
        return f"{self.type} ({self.id})"


@dataclass(frozen=True)
class Facts:
    """All facts that the table looks at, read once."""

    version: tuple[int, int, int]
    drain_trusted: Versions = DEFAULT_DRAIN_TRUSTED
    """The setting: first and last QEMU whose empty transaction drains."""
    regions: tuple[Region, ...] = ()
    devices: tuple[Device, ...] = ()
    objects: tuple[tuple[str, str], ...] = ()
    """(id, type) of each object given with -object or object-add."""
    persistent_backends: frozenset[str] = frozenset()
    """Backends with pmem=on."""
    netdev_types: tuple[tuple[str, str], ...] = ()
    """(name, type) of each network backend and card."""
    block_drivers: tuple[tuple[str, str], ...] = ()
    """(node name, driver) of each block node."""
    run_state: str = "running"
    migration_status: str | None = None
    migration_mode: str = "normal"
    capabilities: frozenset[str] = frozenset()
    dump_status: str = "none"
    replay_mode: str = "none"
    confidential: str | None = None
    """The technique that encrypts the guest's memory; `None` if none does."""
    nested_runs: int = 0
    pinned_kib: int = 0
    registered_buffers: int = 0
    tracer_pid: int = 0
    shadow_stack: bool = False
    own_userfaults: int = 0
    """How many userfaultfds QEMU itself has set up; it never keeps ours."""
    ksm_runs: bool = False
    """Whether the kernel's KSM merges now (`run` is 1)."""
    ksm_takes_all: bool = False
    """Whether KSM may merge all of the process (prctl PR_SET_MEMORY_MERGE)."""
    open_paths: frozenset[str] = frozenset()
    """Targets of QEMU's descriptors that are devices or anonymous inodes."""
    shared_folders: tuple[tuple[str, str], ...] = ()
    """(path, filesystem type) of each folder exported through 9p, and of each mount below it."""
    unknown_exports: tuple[str, ...] = ()
    """9p devices whose folder is not known."""
    mappers: tuple[Mapper, ...] = ()
    aliases: tuple[str, ...] = ()
    """Addresses at which QEMU itself maps a RAM file a second time."""


def collect(
    monitor: Monitor,
    process: Process,
    regions: Sequence[Region],
    *,
    ignore_pids: Collection[int] = (),
    drain_trusted: Versions = DEFAULT_DRAIN_TRUSTED,
    listed: Sequence[replies.QomProperty] | None = None,
) -> Facts:
    """Ask for all facts. Raises MonitorError or VmGoneError if that is not possible.

    `ignore_pids`: further processes of ours that may map RAM files. `listed`: QEMU's list of
    its objects, read in the same look, after the watch over the VM was settled; `None` to ask.
    """
    status = process.status()
    links = links_of(process)
    devices = tuple(_devices(monitor))
    objects = tuple(_objects(monitor) if listed is None else _named(listed))
    files = {r.ram_file: r.backend for r in regions if r.share and r.ram_file is not None}
    exporting = [device for device in devices if device.type.startswith("virtio-9p")]
    exports = exported_folders(process) if exporting else {}
    return Facts(
        version=monitor.version,
        drain_trusted=drain_trusted,
        regions=tuple(regions),
        devices=devices,
        objects=objects,
        persistent_backends=frozenset(
            name
            for name, kind in objects
            if kind == "memory-backend-file"
            and _property(monitor, f"/objects/{name}", "pmem") is True
        ),
        netdev_types=parse_netdevs(monitor.hmp("info network")),
        block_drivers=tuple(
            (one_line(node.node_name, 80), node.driver)
            for node in monitor.query_if_known(
                "query-named-block-nodes", replies.BlockNodes, [], {"flat": True}
            )
        ),
        **read_migration(monitor),
        replay_mode=monitor.query_if_known(
            "query-replay", replies.ReplayReply, replies.Replay(mode="none")
        ).mode,
        confidential=_confidential(monitor, links.values()),
        nested_runs=nested_runs_of(monitor.ask_all([NESTED_QUESTION])[0]),
        pinned_kib=first_number(status.get("VmPin", "0")),
        registered_buffers=_registered_buffers(process, links),
        tracer_pid=first_number(status.get("TracerPid", "0")),
        own_userfaults=own_userfaults(process, links),
        ksm_runs=ksm_runs(),
        ksm_takes_all=_ksm_takes_all(process),
        shadow_stack="shstk" in status.get("x86_Thread_features", ""),
        open_paths=frozenset(
            path for path in links.values() if path.startswith(("/dev/", "anon_inode:"))
        ),
        shared_folders=filesystems_of(process, exports.values()),
        unknown_exports=tuple(
            device.title for device in exporting if device.properties.get("fsdev") not in exports
        ),
        mappers=tuple(processes_mapping(files, {process.pid, os.getpid(), *ignore_pids})),
        aliases=tuple(own_aliases(process, regions)),
    )


class Migration(TypedDict):
    """The facts about migration, snapshots and dumps."""

    run_state: str
    migration_status: str | None
    migration_mode: str
    capabilities: frozenset[str]
    dump_status: str


_QUESTIONS: Sequence[Question[Any]] = (
    Question("query-status", replies.StatusReply, None),
    Question("query-migrate-capabilities", replies.Capabilities, []),
    Question("query-migrate", replies.MigrationReply, replies.MigrationState()),
    Question("query-dump", replies.DumpReply, replies.Dump(status="none")),
)
_MODE_QUESTION: Question[Any] = Question(
    "query-migrate-parameters", replies.MigrationParametersReply, replies.MigrationParameters()
)
_FIRST_WITH_MODE = (8, 2, 0)
"""First QEMU whose migration parameters have a mode (qapi/migration.json: MigMode)."""


def migration_questions(monitor: Monitor) -> Sequence[Question[Any]]:
    """Questions about migration, snapshots and dumps; `migration_of` reads the answers."""
    has_mode = monitor.version >= _FIRST_WITH_MODE
    return (*_QUESTIONS, _MODE_QUESTION) if has_mode else _QUESTIONS


def read_migration(monitor: Monitor) -> Migration:
    """Ask the `migration_questions`. Raises MonitorError or VmGoneError."""
    return migration_of(monitor, monitor.ask_all(migration_questions(monitor)))


def migration_of(monitor: Monitor, answers: Sequence[Any]) -> Migration:
    """The answers to `migration_questions` as facts. Raises MonitorError or VmGoneError."""
    status, capabilities, migration, dump, *mode = answers
    return Migration(
        run_state=monitor.status() if status is None else status.status,
        migration_status=migration.status,
        migration_mode=mode[0].mode if mode else replies.MigrationParameters().mode,
        capabilities=frozenset(one.capability for one in capabilities if one.state),
        dump_status=dump.status,
    )


def first_number(text: str) -> int:
    """The number that a line of /proc begins with; 0 if it does not begin with one."""
    word = text.partition(" ")[0]
    return int(word) if word.isdigit() else 0


def links_of(process: Process) -> dict[int, str]:
    """Descriptor number to target, for all of QEMU's descriptors. Raises VmGoneError."""
    try:
        return descriptor_links(process.pid)
    except OSError as error:
        raise VmGoneError(process.vm, "the VM's process ended", pid=process.pid) from error


def _registered_buffers(process: Process, links: dict[int, str]) -> int:
    """Buffers registered with QEMU's io_urings; their pages are pinned for good."""
    total = 0
    for name, target in links.items():
        if "io_uring" not in target:
            continue
        with contextlib.suppress(OSError):
            for line in process.path(f"fdinfo/{name}").read_text(errors="replace").splitlines():
                if line.startswith("UserBufs:"):
                    total += first_number(line.split(":", 1)[1])
    return total


def own_userfaults(process: Process, links: dict[int, str]) -> int:
    """How many userfaultfds QEMU has set up for itself.

    One without UFFDIO_API protects nothing: an engine that was killed left it behind.
    """
    with contextlib.suppress(OSError):
        return sum(userfaultfds(process.pid, links).values())
    return 0


def ksm_runs() -> bool:
    """Whether the kernel's KSM merges now."""
    try:
        return read_record(_KSM_RUN).strip() == "1"
    except OSError:
        return False


def _ksm_takes_all(process: Process) -> bool:
    try:
        return "ksm_merge_any: yes" in process.path("ksm_stat").read_text()
    except OSError:
        return False


def _objects(monitor: Monitor) -> Iterator[tuple[str, str]]:
    listed = monitor.query_if_known("qom-list", replies.QomProperties, [], {"path": "/objects"})
    return _named(listed)


def _named(listed: Sequence[replies.QomProperty]) -> Iterator[tuple[str, str]]:
    for entry in listed:
        if entry.child_type is not None:
            yield one_line(entry.name, 120), one_line(entry.child_type, 80)


def _devices(monitor: Monitor) -> Iterator[Device]:
    for folder in DEVICE_FOLDERS:
        for entry in monitor.query_if_known(
            "qom-list", replies.QomProperties, [], {"path": folder}
        ):
            kind = entry.child_type
            if kind is None:
                continue
            properties: dict[str, str | bool] = {}
            for prefix, names in _PROPERTIES:
                if kind.startswith(prefix):
                    for name in names:
                        value = _property(monitor, f"{folder}/{entry.name}", name)
                        if isinstance(value, str | bool):
                            properties[name] = one_line(value) if isinstance(value, str) else value
            yield Device(one_line(entry.name, 80), one_line(kind, 80), properties)


def _property(monitor: Monitor, path: str, name: str) -> object:
    """A QOM property; `None` if the object has none of that name or is gone."""
    try:
        return monitor.execute("qom-get", {"path": path, "property": name})
    except MonitorError as error:
        if error.error_class:
            return None
        raise


def parse_netdevs(text: str) -> tuple[tuple[str, str], ...]:
    """(name, type) from `info network`: lines like ` \\ net0: index=0,type=tap,ifname=…`."""
    found = []
    for line in text.splitlines():
        name, colon, rest = line.partition(": index=")
        if colon:
            fields = dict(part.partition("=")[::2] for part in rest.split(","))
            found.append((one_line(name.strip(" \\"), 80), one_line(fields.get("type", ""), 80)))
    return tuple(found)


def _confidential(monitor: Monitor, links: Collection[str]) -> str | None:
    chosen = _property(monitor, "/machine", "confidential-guest-support")
    if isinstance(chosen, str) and chosen:
        return one_line(chosen, 80)
    if monitor.query_if_known("query-sev", replies.SevReply, replies.Sev(enabled=False)).enabled:
        return "SEV"
    if any("gmem" in target or "guest_memfd" in target for target in links):
        return "guest_memfd"
    return None


NESTED_QUESTION: Question[Any] = Question(
    "query-stats",
    replies.Stats,
    [],
    {"target": "vcpu", "providers": [{"provider": "kvm", "names": ["nested_run"]}]},
)


def nested_runs_of(answer: Sequence[replies.StatsResult]) -> int:
    """How often a vCPU entered a nested guest (KVM counts that per vCPU)."""
    values = (one.value for result in answer for one in result.stats if one.name == "nested_run")
    return sum(value for value in values if isinstance(value, int))


def exported_folders(process: Process) -> dict[str, str]:
    """Absolute paths of the folders that the command line exports by 9p, by their ids.

    Omits a folder whose path begins in one that we may not see.
    """
    try:
        arguments = whole_command_line(process.pid).arguments
    except OSError as error:
        raise VmGoneError(process.vm, "the VM's process ended", pid=process.pid) from error
    found = {}
    for name, path in share_folders(arguments).items():
        with contextlib.suppress(OSError):
            here = "/" if path.startswith("/") else os.readlink(process.path("cwd"))
            found[name] = resolved(process.pid, os.path.join(here, path))
    return found


def filesystems_of(process: Process, folders: Collection[str]) -> tuple[tuple[str, str], ...]:
    """(path, filesystem) of each folder, and of every mount that QEMU sees below it."""
    if not folders:
        return ()
    seen = mounts(process.pid)
    found = {path: filesystem_at(seen, path) for path in folders}
    for path in folders:
        found |= {mount.point: mount.filesystem for mount in mounted_below(seen, path)}
    return tuple((one_line(path), kind) for path, kind in found.items())
