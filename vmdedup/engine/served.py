"""The VMs that an engine serves: which of them now, work on all of them, and drops.

Owns the list of attached VMs. Promises that a VM that fails or vanishes is dropped with
its reason while all others continue. A VM that only does not answer now stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from vmdedup.engine.domain_stores import DomainStores
from vmdedup.engine.terms import Terms
from vmdedup.engine.workers import Workers
from vmdedup.errors import (
    DrainPostponedError,
    MergeError,
    MonitorError,
    RefusedError,
    StoreBusyError,
    VmError,
)
from vmdedup.linux import bounded
from vmdedup.remap.context import told_as_merge_error
from vmdedup.vm.attached_vm import AttachedVm

_Result = TypeVar("_Result")


class Served:
    """The VMs of an engine. `dropped` is called for each VM that had to be dropped."""

    def __init__(
        self, terms: Terms, stores: DomainStores, dropped: Callable[[AttachedVm, VmError], None]
    ) -> None:
        self._terms = terms
        self._stores = stores
        self._dropped = dropped
        self.vms: list[AttachedVm] = []
        self.is_foreground: Callable[[], bool] = lambda: True
        """Whether somebody waits; called before each piece of work. A background pass takes at
        most one processor, as ksmd does; once somebody waits, its rest uses all workers."""
        self.use_workers()

    def use_workers(self) -> None:
        """Apply a changed number of workers."""
        host = self._terms.host
        stop = threading.Event() if host is None else host.stop
        self.workers = Workers(self._terms.settings.workers, stop)
        """The threads that do the same work for several VMs at a time."""

    def now(self) -> list[AttachedVm]:
        """The VMs that may be merged now."""
        return [
            vm
            for vm in self.vms
            if vm.refusal is None
            and not (vm.record.resting or vm.record.leaving)
            and vm.monitor.outage is None
            and not bounded.is_stuck(vm.pid)
        ]

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for all to be looked at, merged, and looked at again."""
        return self._terms.everywhere and self.is_foreground()

    def drop(self, vm: AttachedVm, error: VmError) -> None:
        """Drop a VM that cannot be served any more.

        A VM stays if its monitor only does not answer (libvirt restarts, for instance), or if
        it cannot be drained because its storage hangs: the VM lives.
        """
        if _is_passing(vm, error):
            vm.record.trouble = error.reason
            return
        self.vms.remove(vm)
        self._dropped(vm, error)
        vm.close()

    def each(
        self,
        vms: list[AttachedVm],
        work: Callable[[AttachedVm], _Result],
        tell: Callable[[AttachedVm], None] = lambda _: None,
    ) -> dict[AttachedVm, _Result]:
        """The result of `work` for each VM; VMs that fail are dropped.

        Several VMs are done at a time if it `is_foreground`. `tell` is called as each ends.
        """
        results: dict[AttachedVm, _Result] = {}

        def told(vm: AttachedVm) -> _Result:
            with told_as_merge_error(vm, "look"):
                return work(vm)

        def done(vm: AttachedVm, result: _Result | VmError) -> None:
            if isinstance(result, MergeError):
                vm.record.trouble = result.reason  # the VM is intact
            elif isinstance(result, VmError):
                self.drop(vm, result)
            else:
                results[vm] = result
            tell(vm)

        vms = self.with_store(vms)
        self.workers.each(vms, told, done, is_foreground=self.is_foreground)
        return {vm: results[vm] for vm in vms if vm in results}

    def with_store(self, vms: list[AttachedVm]) -> list[AttachedVm]:
        """Open the VMs' stores on this thread; drop VMs whose store another engine has."""
        found = []
        for vm in vms:
            try:
                self._stores.of_vm(vm)
            except StoreBusyError as error:
                self.drop(vm, store_refusal(vm, error))
            else:
                found.append(vm)
        return found


def store_refusal(vm: AttachedVm, error: StoreBusyError) -> RefusedError:
    """The refusal of a VM while another engine has its domain's store; tried again later."""
    return RefusedError(vm.name, str(error), pid=vm.pid, key="other-engine")


def _is_passing(vm: AttachedVm, error: VmError) -> bool:
    """Whether the VM can be served again later by itself."""
    if isinstance(error, MonitorError):
        return error.unanswered or vm.monitor.outage is not None
    return isinstance(error, DrainPostponedError)
