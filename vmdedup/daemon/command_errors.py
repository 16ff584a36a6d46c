"""Failures of commands, and how the API reports them.

Owns the errors that only commands raise, and each error's kind of refusal.
Promises a refusal for every VmdedupError.
"""

from __future__ import annotations

from vmdedup.controls import ControlStateError
from vmdedup.errors import AttachError, UsageError, VmdedupError, VmError
from vmdedup.ipc.protocol import ErrorKind, Refusal
from vmdedup.models import Unmerged
from vmdedup.policy.registry import InvalidRangeError, TryAgainError


class NotFoundError(VmdedupError):
    """There is no such VM."""


class ConflictError(VmdedupError):
    """The command is refused in the present state."""


class LookUnderWayError(VmdedupError):
    """Another client waits for a look at all contents."""


class UnfinishedError(VmdedupError):
    """An unmerge left pages merged, as `unmerged` says; it is tried again for these."""

    def __init__(self, unmerged: Unmerged) -> None:
        stuck = [vm for vm in unmerged.vms if vm.remaining_pages]
        left = [f"{vm.name} (pid {vm.pid}): {vm.reason}" for vm in stuck]
        super().__init__(
            f"{'; '.join(left)}; the daemon tries again until it is done, or `set run=1`"
        )
        self.unmerged = unmerged


def require_finished(unmerged: Unmerged) -> None:
    """Raise UnfinishedError if any page stays merged."""
    if any(vm.remaining_pages for vm in unmerged.vms):
        raise UnfinishedError(unmerged)


_KINDS: tuple[tuple[type[VmdedupError], ErrorKind], ...] = (
    (UnfinishedError, "unfinished"),
    (NotFoundError, "not-found"),
    (ConflictError, "conflict"),
    (ControlStateError, "conflict"),
    (TryAgainError, "busy"),
    (LookUnderWayError, "busy"),
    (InvalidRangeError, "usage"),
    (UsageError, "usage"),
    (AttachError, "conflict"),
    (VmError, "failed"),
)
"""Kind of refusal by class of error; the first class that fits counts."""


def refusal_of(error: VmdedupError) -> Refusal:
    """The refusal that tells the client of an error."""
    kind: ErrorKind = next((kind for type_, kind in _KINDS if isinstance(error, type_)), "failed")
    unmerged = error.unmerged if isinstance(error, UnfinishedError) else None
    return Refusal(kind=kind, message=str(error), unmerged=unmerged)
