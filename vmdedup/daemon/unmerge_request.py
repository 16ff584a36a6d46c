"""Unmerging on request: attached VMs, and refused ones that still map pages of ours.

Owns which VMs such a request is about. Promises that the request stays in force for a VM
that could not be reached, or not be unmerged whole: it is unmerged when it is next
attached to, and `Fleet.settle` tries the remaining pages again.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmdedup.daemon.command_errors import require_finished
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.named_vm import attached_vm, is_reachable, reach_again
from vmdedup.daemon.scouts import Scouts
from vmdedup.engine.fleet import Fleet
from vmdedup.errors import AttachError, VmdedupError
from vmdedup.guest.mapping_state import standing_pages
from vmdedup.models import Unmerged, UnmergedVm, VmListing


def unmerge(fleet: Fleet, scouts: Scouts, journal: Journal, vms: Sequence[str] | None) -> Unmerged:
    """Unmerge the named VMs, or all, and leave them alone.

    Includes VMs that are refused by now but still map pages of ours. Raises
    UnfinishedError if pages stay merged, NotFoundError, AttachError.
    """
    outside = fleet.merged_outside() if vms is None else _outside(fleet, vms)
    unreached = _take_in_merged(fleet, scouts, outside)
    lost = {row.pid for row in unreached}
    if vms is None:
        attached = list(fleet.engine.vms)
    else:
        attached = [attached_vm(fleet, vm) for vm in vms if not _is_of(fleet, vm, lost)]
    pids = [each.pid for each in attached]
    fleet.rest(pids)
    done = fleet.unmerge([str(pid) for pid in pids], lambda _: None)
    done = done.model_copy(update={"vms": [*done.vms, *unreached]})
    journal.add("unmerged", None, ", ".join(vm.name for vm in done.vms))
    require_finished(done)
    return done


def _outside(fleet: Fleet, vms: Sequence[str]) -> list[VmListing]:
    """The rows of the refused ones among these VMs. Raises AttachError, NotFoundError."""
    rows = []
    for vm in vms:
        try:
            attached_vm(fleet, vm)
        except AttachError:
            row = fleet.roster.row(vm)
            if row is None or not is_reachable(row):
                raise
            rows.append(row)
    return rows


def _is_of(fleet: Fleet, vm: str, pids: set[int]) -> bool:
    row = fleet.roster.row(vm)
    return row is not None and row.pid in pids


def _take_in_merged(fleet: Fleet, scouts: Scouts, rows: list[VmListing]) -> list[UnmergedVm]:
    """Attach to refused VMs, only to unmerge them; returns those that could not be reached."""
    unreached = []
    for row in rows:
        pid = row.pid or 0
        try:
            fleet.take_in(reach_again(fleet, scouts, row), refuse=False)
            fleet.attached(str(pid)).record.leaving = True
        except VmdedupError as error:
            fleet.rest_when_found(pid)
            pages = standing_pages(pid)
            unreached.append(
                UnmergedVm(
                    name=row.name,
                    pid=pid,
                    uuid=row.uuid,
                    restored_pages=0,
                    remaining_pages=pages,
                    reason=f"{pages} pages stay merged: {error}",
                )
            )
    return unreached
