"""The rows of `vms`: every VM that was found, attached or not, and why not.

Owns the row of each VM. Promises that a VM has one row, however it was found: by its
process, its socket, libvirt. Attaches to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable

from vmdedup.accounting import listing
from vmdedup.accounting.sharing_report import absent_report
from vmdedup.attach.discover import Unreachable
from vmdedup.attach.identity import VmIdentity
from vmdedup.errors import AttachError, MonitorError, RefusedError, VmError, VmGoneError
from vmdedup.guest.mapping_state import standing_pages
from vmdedup.models import VmList, VmListing, VmReport, VmStatus
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import AttachedVm


class Roster:
    """The rows, in the order in which their VMs were found."""

    def __init__(self) -> None:
        self._rows: dict[str, VmListing] = {}
        self._absent: dict[str, VmReport] = {}

    @property
    def absent(self) -> list[VmReport]:
        """The VMs that are not attached, and why."""
        return list(self._absent.values())

    def note_attached(self, vm: AttachedVm) -> VmListing:
        """List a VM that is attached now."""
        row = listing.vm_listing(vm)
        self._absent.pop(_key(row), None)
        return self._put(row, vm.identity)

    def note_refused(self, identity: VmIdentity, error: VmError, settings: Settings) -> VmListing:
        """List a VM that was reached and cannot be attached."""
        row = listing.refused_listing(identity, error, settings)
        status: VmStatus = "gone" if isinstance(error, VmGoneError) else "refused"
        self._absent[_key(row)] = _absent_of(identity, error, status)
        return self._put(row, identity)

    def _put(self, row: VmListing, identity: VmIdentity) -> VmListing:
        self.forget(str(identity.socket_path))  # its key while its monitor did not answer
        self._rows[_key(row)] = row
        return row

    def note_dropped(self, vm: AttachedVm, error: VmError) -> VmReport:
        """List a VM that was attached and had to be dropped."""
        status: VmStatus = "refused" if isinstance(error, RefusedError) else "gone"
        absent = _absent_of(vm.identity, error, status)
        key = str(vm.pid)
        self._absent[key] = absent
        if key in self._rows:
            changed = {"mergeable": False, "reason": error.reason}
            self._rows[key] = self._rows[key].model_copy(update=changed)
        return absent

    def note_unreachable(self, unreachable: Unreachable) -> bool:
        """List a VM whose monitor could not be reached; whether that is news."""
        name, pid, reason = unreachable.name, unreachable.pid, unreachable.reason
        if self._is_listed(name, pid):
            return False
        row = listing.unreachable_listing(name, pid, reason, unreachable.uuid)
        news = self._rows.get(_key(row)) != row
        self._rows[_key(row)] = row
        self._absent[_key(row)] = absent_report(
            name, pid, "refused", reason, uuid=unreachable.uuid, refusal="unreachable"
        )
        return news

    def _is_listed(self, socket_path: str, pid: int | None) -> bool:
        """Whether the VM was reached before and still lives: its row then says more."""
        return any(
            row.qmp is not None
            and (row.qmp == socket_path or row.pid == pid)
            and os.path.exists(f"/proc/{row.pid}")
            for row in self._rows.values()
        )

    def forget(self, key: str) -> None:
        """Remove a VM from the list; `key`: its pid, or the name by which it was found."""
        self._rows.pop(key, None)
        self._absent.pop(key, None)

    def let_go(self, vm: AttachedVm) -> None:
        """Remove the row of a VM that was detached on request."""
        self._rows.pop(str(vm.pid), None)

    def forget_ended(self, settings: Settings) -> bool:
        """Remove VMs that have ended, attached or not; returns whether there were any."""
        ended = [key for key, absent in self._absent.items() if _has_ended(absent, settings)]
        for key in ended:
            self.forget(key)
        return bool(ended)

    def row(self, vm: str) -> VmListing | None:
        """The row of the VM of that name, pid or UUID, attached or not."""
        return next(
            (row for row in self._rows.values() if vm in (row.name, str(row.pid), row.uuid)),
            None,
        )

    def reason_of(self, pid: int) -> str | None:
        """Why a VM could not be attached at the last attempt, `None` if it is not known."""
        absent = self._absent.get(str(pid))
        return None if absent is None else absent.reason

    def listed(self, attached: Iterable[AttachedVm]) -> VmList:
        """Every VM found so far, the attached ones with their present reasons."""
        rows = dict(self._rows)
        for vm in attached:
            key = str(vm.pid)
            row = rows.get(key)
            if row is None:
                continue
            if vm.left_to_unmerge_pages or row.left_to_unmerge_pages:
                rows[key] = listing.vm_listing(vm)
            else:
                rows[key] = row.model_copy(update={"reason": listing.present_reason(vm)})
        return VmList(vms=list(rows.values()))

    def standing_outside(self, attached: Collection[int]) -> list[tuple[int, VmListing, int]]:
        """VMs that are not among the `attached` processes but still have merged pages.

        Each with its pid, and with how many pages.
        """
        return [
            (row.pid, row, pages)
            for row in self._rows.values()
            if row.pid is not None and row.pid not in attached
            if (pages := standing_pages(row.pid))
        ]

    def refused(self) -> list[VmListing]:
        """The VMs found that are not merged."""
        return [row for row in self._rows.values() if not row.mergeable]


def _key(row: VmListing) -> str:
    return str(row.pid) if row.pid is not None else row.name


def _absent_of(identity: VmIdentity, error: VmError, status: VmStatus) -> VmReport:
    name, pid, uuid = identity.name, identity.pid, identity.uuid
    return absent_report(name, pid, status, error.reason, uuid=uuid, refusal=_refusal_of(error))


def _refusal_of(error: VmError) -> str:
    """The kind of refusal, one of `policy.refusals.REFUSALS`."""
    if isinstance(error, RefusedError):
        return error.key
    return "unreachable" if isinstance(error, AttachError | MonitorError) else "other"


def _has_ended(absent: VmReport, settings: Settings) -> bool:
    if absent.status == "gone":
        return True
    if absent.pid is not None:
        return not os.path.exists(f"/proc/{absent.pid}")
    if absent.uuid is not None:
        return False  # libvirt tells when: `Roster.forget`
    return absent.name not in settings.qmp and not os.path.exists(absent.name)
