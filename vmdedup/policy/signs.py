"""How each hazard shows in the facts.

Pure: every function takes `Facts` and yields one `Match` for each place at which
its hazard is seen, with the values that the reason names. The answers stand in
the table in `hazards.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from vmdedup.linux.filesystems import LOCAL_FILESYSTEMS, WRITE_PROTECTABLE
from vmdedup.policy.facts import Device, Facts

Match = dict[str, str]
"""Values for a row's reason; `backend` limits the finding to that backend."""

WRITE_IN_PAUSE = (
    "virtio-9p",
    "usb-host",
    "usb-mtp",
    "usb-serial",
    "usb-braille",
    "virtserialport",
    "virtconsole",
)
"""Devices that QMP `stop` does not stop: none has a vm_change_state handler that does.

A 9p worker's read ends when its file system answers (hw/9pfs/coth.c), and a passed-through
device's transfer when the device does (hw/usb/host-libusb.c). Data from a host program is
written at once (hw/char/virtio-console.c: chr_can_read; usb-redir asks for the run state).
"""
PINNING_PATHS = ("/dev/vfio/", "/dev/iommu", "/dev/vhost-vdpa", "/dev/vhost-scsi")
_PINNING_TYPES = ("vfio-", "vhost-vdpa", "vhost-scsi", "pvrdma")
_PINNING_DRIVERS = (
    "nvme",
    "nvme-io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
)
_FOREIGN_OBJECTS = ("cryptodev-vhost-user", "x-vfio-user-server")
PERSISTENT_TYPES = ("nvdimm", "virtio-pmem", "cxl-type3", "nvme")
MIGRATING = frozenset(
    (
        "setup",
        "active",
        "pre-switchover",
        "device",
        "wait-unplug",
        "cancelling",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover",
        "postcopy-recover-setup",
    )
)
_TRANSITIONS = frozenset(
    (
        "inmigrate",
        "finish-migrate",
        "postmigrate",
        "save-vm",
        "restore-vm",
        "preconfig",
    )
)


def devices(*prefixes: str, on: str | None = None) -> Callable[[Facts], Iterator[Match]]:
    """Devices by the beginning of their type; with `on`, only if that property is true."""

    def matches(facts: Facts) -> Iterator[Match]:
        for device in facts.devices:
            if device.type.startswith(prefixes) and (
                on is None or device.properties.get(on) in (True, "on")
            ):
                yield {"device": device.title}

    return matches


def page_reporting(facts: Facts) -> Iterator[Match]:
    """Balloons that discard pages which the guest reports as free."""
    for device in _reporting(facts):
        yield {"device": device.title}


def page_poison(facts: Facts) -> Iterator[Match]:
    """Such balloons that let the guest rely on zeroes in what was discarded.

    Only a guest that was offered page poisoning does (hw/virtio/virtio-balloon.c:
    virtio_balloon_handle_report; drivers/virtio/virtio_balloon.c: virtballoon_validate).
    """
    for device in _reporting(facts):
        if device.properties.get("page-poison") not in (False, "off"):
            yield {"device": device.title}


def _reporting(facts: Facts) -> Iterator[Device]:
    for device in facts.devices:
        reports = device.properties.get("free-page-reporting") in (True, "on")
        if reports and device.type.startswith("virtio-balloon"):
            yield device


def backends_of(*prefixes: str) -> Callable[[Facts], Iterator[Match]]:
    """Backends that such a device uses (`/objects/ID` in one of its properties)."""

    def matches(facts: Facts) -> Iterator[Match]:
        for device in facts.devices:
            if device.type.startswith(prefixes):
                for value in device.properties.values():
                    if isinstance(value, str) and value:
                        backend = value.rsplit("/", 1)[-1]
                        yield {"device": device.title, "backend": backend}

    return matches


def balloon_without_file(facts: Facts) -> Iterator[Match]:
    """Balloons if QEMU discards by MADV_REMOVE, which fails on a private mapping.

    It does so on shared memory without a descriptor (softmmu/physmem.c:
    ram_block_discard_range), page by page, and prints an error each time.
    """
    for device in facts.devices:
        if device.type.startswith("virtio-balloon"):
            for region in facts.regions:
                if region.share and region.ram_fd is None:
                    yield {"device": device.title, "memory": region.backend}


def virtio_mem_without_file(facts: Facts) -> Iterator[Match]:
    """Backends whose merged blocks virtio-mem cannot unplug, see `balloon_without_file`.

    The failed discard makes QEMU answer BUSY, and keeps the block plugged
    (hw/virtio/virtio-mem.c: virtio_mem_set_block_state).
    """
    bare = {region.backend for region in facts.regions if region.share and region.ram_fd is None}
    for device in facts.devices:
        backend = _backend_of(device)
        if device.type.startswith("virtio-mem") and backend in bare:
            yield {"device": device.title, "backend": backend}


def preallocating(facts: Facts) -> Iterator[Match]:
    """Backends of virtio-mem devices that allocate each block when they plug it."""
    for device in facts.devices:
        backend = _backend_of(device)
        allocates = device.properties.get("prealloc") is True
        if device.type.startswith("virtio-mem") and allocates and backend:
            yield {"device": device.title, "backend": backend}


def _backend_of(device: Device) -> str:
    """The id of the backend in a device's `memdev`; "" if it names none."""
    return str(device.properties.get("memdev") or "").rsplit("/", 1)[-1]


def persistent(facts: Facts) -> Iterator[Match]:
    """Backends whose file is the data: used by such a device, or pmem=on."""
    yield from backends_of(*PERSISTENT_TYPES)(facts)
    for backend in sorted(facts.persistent_backends):
        yield {"device": "pmem=on", "backend": backend}


def pinning(facts: Facts) -> Iterator[Match]:
    """Devices, netdevs or open device files that pin guest memory for as long as they exist."""
    yield from devices(*_PINNING_TYPES)(facts)
    named = any(True for _ in devices(*_PINNING_TYPES)(facts))
    for name, kind in facts.netdev_types:
        if kind == "vhost-vdpa":
            named = True
            yield {"device": f"netdev {name} (vhost-vdpa)"}
    if not named:
        for path in sorted(facts.open_paths):
            if path.startswith(PINNING_PATHS):
                yield {"device": path}


def vhost_user(facts: Facts) -> Iterator[Match]:
    """Devices and netdevs that another process serves by accessing guest memory."""
    yield from devices("vhost-user", "x-pci-proxy-dev")(facts)
    for name, kind in facts.objects:
        if kind in _FOREIGN_OBJECTS:
            yield {"device": f"object {name} ({kind})"}
    for name, kind in facts.netdev_types:
        if kind == "vhost-user":
            yield {"device": f"netdev {name} (vhost-user)"}


def pinning_drives(facts: Facts) -> Iterator[Match]:
    """Drives that map guest memory for a device or another process."""
    for node, driver in facts.block_drivers:
        if driver in _PINNING_DRIVERS:
            yield {"node": node or "(unnamed)", "driver": driver}


def remote_folders(facts: Facts) -> Iterator[Match]:
    """9p exports of folders that are not on a local filesystem, or on an unknown one."""
    for path, filesystem in facts.shared_folders:
        if filesystem not in LOCAL_FILESYSTEMS:
            yield {"device": "virtio-9p", "path": path, "filesystem": filesystem}
    for device in facts.unknown_exports:
        yield {"device": device, "path": "a folder", "filesystem": "unknown"}


def mappers(facts: Facts) -> Iterator[Match]:
    """Other processes that map a RAM file."""
    for one in facts.mappers:
        yield {"file": one.backend, "pid": str(one.pid), "name": one.name}


def aliases(facts: Facts) -> Iterator[Match]:
    """Second mappings of a RAM file inside QEMU."""
    for address in facts.aliases:
        yield {"address": address}


def confidential(facts: Facts) -> Iterator[Match]:
    """Guest memory that the host may not read."""
    if facts.confidential:
        yield {"object": facts.confidential}


def positive(name: str) -> Callable[[Facts], Iterator[Match]]:
    """The fact `name` is a number above 0."""

    def matches(facts: Facts) -> Iterator[Match]:
        value = int(getattr(facts, name))
        if value > 0:
            yield {"value": str(value)}

    return matches


def shadow_stack(facts: Facts) -> Iterator[Match]:
    """User shadow stacks: the kernel would reject our sigreturn frame."""
    if facts.shadow_stack:
        yield {}


def replay(facts: Facts) -> Iterator[Match]:
    """Record or replay of the machine."""
    if facts.replay_mode != "none":
        yield {"mode": facts.replay_mode}


def colo(facts: Facts) -> Iterator[Match]:
    """COLO, set up or running."""
    if "x-colo" in facts.capabilities or "colo" in (facts.run_state, facts.migration_status):
        yield {}


def file_migration(facts: Facts) -> Iterator[Match]:
    """Migration that carries the RAM file instead of the memory."""
    if "x-ignore-shared" in facts.capabilities and any(one.share for one in facts.regions):
        yield {"what": "migration capability x-ignore-shared"}
    if facts.migration_mode.startswith("cpr-"):
        yield {"what": f"migration mode {facts.migration_mode}"}


def own_userfault(facts: Facts) -> Iterator[Match]:
    """Migration capabilities for which QEMU will register a userfaultfd."""
    for name in ("background-snapshot", "postcopy-ram"):
        if name in facts.capabilities:
            yield {"what": f"migration capability {name}"}


def kernel_ksm(facts: Facts) -> Iterator[Match]:
    """Backends that KSM, if it is running, also merges."""
    for region in facts.regions:
        if facts.ksm_runs and not region.share and (region.merge or facts.ksm_takes_all):
            yield {"memory": region.backend}


def migration(facts: Facts) -> Iterator[Match]:
    """Migration, savevm or dump under way."""
    if facts.migration_status in MIGRATING:
        yield {"what": f"migration is {facts.migration_status}"}
    elif facts.run_state in _TRANSITIONS:
        yield {"what": f"the VM is in state {facts.run_state}"}
    elif facts.dump_status == "active":
        yield {"what": "a memory dump is being written"}


def without_progress(facts: Facts) -> Facts:
    """The facts with one value for all states that are no sign of `migration`, for comparing."""
    return replace(
        facts,
        run_state=facts.run_state if facts.run_state in _TRANSITIONS else "",
        migration_status="under way" if facts.migration_status in MIGRATING else None,
        dump_status=facts.dump_status if facts.dump_status == "active" else "none",
    )


def ordinary_filesystem(facts: Facts) -> Iterator[Match]:
    """RAM files on filesystems without synchronous write protection."""
    for region in facts.regions:
        if region.filesystem not in WRITE_PROTECTABLE:
            yield {"backend": region.backend, "filesystem": region.filesystem}


def untried_version(facts: Facts) -> Iterator[Match]:
    """QEMU outside the setting `drain_trusted`."""
    first, last = facts.drain_trusted
    if not first <= facts.version[:2] <= last:
        trusted = " to ".join(".".join(map(str, each)) for each in facts.drain_trusted)
        yield {"version": ".".join(map(str, facts.version)), "trusted": trusted}


def elsewhere(_: Facts) -> Iterator[Match]:
    """A hazard dealt with by the code that `seen_by` names; never a finding of this table."""
    return iter(())
