"""The VM that a command names: one that is attached, or one to be reached for it.

Owns the way from a name, pid, UUID or socket to a VM. Promises NotFoundError for an
unknown VM, and AttachError with the reason for a VM that is not attached.
"""

from __future__ import annotations

from pathlib import Path

from vmdedup.attach.discover import Attachment, Candidate, attach
from vmdedup.daemon.command_errors import NotFoundError
from vmdedup.daemon.scouts import Scouts
from vmdedup.engine.fleet import Fleet
from vmdedup.errors import AttachError, UsageError, VmdedupError
from vmdedup.models import VmListing
from vmdedup.vm.attached_vm import AttachedVm


def is_attached(fleet: Fleet, vm: str) -> bool:
    """Whether the VM is attached."""
    try:
        fleet.attached(vm)
    except VmdedupError:
        return False
    return True


def attached_vm(fleet: Fleet, vm: str) -> AttachedVm:
    """The attached VM. Raises NotFoundError, AttachError."""
    try:
        return fleet.attached(vm)
    except AttachError:
        raise
    except UsageError as error:
        raise NotFoundError(str(error)) from error


def mergeable_vm(fleet: Fleet, vm: str) -> AttachedVm:
    """The attached VM, if it may be merged. Raises as `attached_vm`.

    Also raises AttachError for a VM that is attached only to be unmerged.
    """
    found = attached_vm(fleet, vm)
    if found.refusal is not None:
        raise AttachError(found.name, found.refusal, pid=found.pid)
    return found


def is_reachable(row: VmListing) -> bool:
    """Whether a VM that is not attached could be attached to again."""
    return row.qemu_version is not None and bool(row.qmp or row.uuid)


def reach(fleet: Fleet, scouts: Scouts, candidate: Candidate) -> Attachment:
    """Attach to a domain of that name or UUID, or through the sockets. Raises VmError."""
    if scouts.libvirt is not None:
        found = scouts.libvirt.reach(candidate.name)
        if found is not None:
            return found
    timeout_s = fleet.settings.monitor_timeout_ms / 1000
    use = fleet.settings.monitor
    return attach(candidate, fleet.loop, timeout_s=timeout_s, use=use)


def reach_again(fleet: Fleet, scouts: Scouts, row: VmListing) -> Attachment:
    """Attach to a VM that was reached before. Raises VmError."""
    sockets = (Path(row.qmp),) if row.qmp else ()
    return reach(fleet, scouts, Candidate(row.uuid or row.name, row.pid, sockets))
