"""Requested unmerges that are not done yet: noted until they are done, or revoked.

Owns which VMs are to be unmerged, by process, so that a request survives detaching and
attaching again; whether all VMs are (`run` 2); when the rest is tried again; and the unmerge
of several VMs. Promises to forget a request only if it was done or revoked, or its VM has
ended. A VM is not detached because its unmerge failed, unless it cannot be served any more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from vmdedup.attach.identity import VmIdentity
from vmdedup.core.rmap import OWN
from vmdedup.engine.engine import Engine
from vmdedup.errors import InjectionError, MergeError, VmError
from vmdedup.linux.process import ProcessId, read_process_id
from vmdedup.models import UnmergedVm
from vmdedup.remap.context import Host
from vmdedup.remap.new_memory import Unmerges
from vmdedup.remap.unmerge_vm import unmerge_vm
from vmdedup.vm.attached_vm import AttachedVm

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
"""Longest pause between attempts, in seconds: an unmerge costs a drain even if it finds no
room."""


@dataclass(frozen=True)
class _Failure:
    """An unmerge that left pages merged, and the time of the next attempt."""

    retry_at: float
    pause_s: float


class Owed:
    """The unmerges that were asked for and are not done."""

    def __init__(self) -> None:
        self.everything = False
        """Whether every VM is to be unmerged, including VMs that are attached later."""
        self._asked: set[ProcessId] = set()
        self._failures: dict[ProcessId, _Failure] = {}

    def ask(self, vms: Iterable[AttachedVm]) -> None:
        """Note that these VMs are to be unmerged, and not merged again until that is revoked."""
        self._asked |= {vm.identity.process_id for vm in vms}

    def ask_for(self, pid: int) -> None:
        """Note that a process that is not attached is to be unmerged once it is."""
        with suppress(OSError, ValueError):  # it has ended
            self._asked.add(read_process_id(pid))

    def revoke(self, vms: Iterable[AttachedVm]) -> None:
        """Note that these VMs may be merged again."""
        self._asked -= {vm.identity.process_id for vm in vms}

    def revoke_all(self) -> None:
        """Note that all VMs may be merged again, attached or not."""
        self.everything = False
        self._asked.clear()

    def is_asked(self, identity: VmIdentity) -> bool:
        """Whether an unmerge of this VM was requested."""
        return self.everything or identity.process_id in self._asked

    def due(self, vms: Iterable[AttachedVm]) -> list[AttachedVm]:
        """The VMs with pages left to unmerge whose next attempt is due."""
        now = time.monotonic()
        return [
            vm
            for vm in vms
            if vm.left_to_unmerge_pages and vm.monitor.outage is None and self._retry_at(vm) <= now
        ]

    def _retry_at(self, vm: AttachedVm) -> float:
        failure = self._failures.get(vm.identity.process_id)
        return 0.0 if failure is None else failure.retry_at

    def tried(self, vm: AttachedVm, unmerged_pages: int) -> None:
        """Note the end of an unmerge: the rest is tried again, later if no page was unmerged."""
        process = vm.identity.process_id
        before = self._failures.pop(process, None)
        if vm.left_to_unmerge_pages:
            pause_s = _FIRST_RETRY_S
            if before is not None and not unmerged_pages:
                pause_s = min(_LAST_RETRY_S, before.pause_s * 2)
            self._failures[process] = _Failure(time.monotonic() + pause_s, pause_s)

    def unmerge(
        self, engine: Engine, host: Host, vms: Sequence[AttachedVm], told: Callable[[], None]
    ) -> dict[AttachedVm, UnmergedVm]:
        """Unmerge these VMs as far as possible; `told` is called as each ends."""
        results: dict[AttachedVm, UnmergedVm] = {}

        def done(vm: AttachedVm, result: UnmergedVm | VmError) -> None:
            if isinstance(result, VmError):
                answer = _failed(vm, result)
                if not isinstance(result, MergeError | InjectionError):
                    engine.served.drop(vm, result)  # after other errors the VM is intact
                result = answer
            vm.record.left_reason = result.reason
            self.tried(vm, result.restored_pages)
            results[vm] = result
            told()

        with Unmerges() as among:
            engine.served.workers.each(vms, lambda vm: unmerge_vm(host, vm, among=among), done)
        return {vm: results[vm] for vm in vms}

    def forget_ended(self) -> None:
        """Forget the processes that have ended."""
        ended = {each for each in self._asked if not os.path.exists(f"/proc/{each.pid}")}
        self._asked -= ended
        for process in [each for each in self._failures if not os.path.exists(f"/proc/{each.pid}")]:
            del self._failures[process]


def _failed(vm: AttachedVm, error: VmError) -> UnmergedVm:
    remaining = vm.left_to_unmerge_pages
    with suppress(VmError, OSError):  # no descriptor is left to look, say
        remaining = int(np.count_nonzero(vm.scan.refresh().slot != OWN))
    said = f"{remaining} pages stay merged: " if remaining else ""
    return UnmergedVm(
        name=vm.name,
        pid=vm.pid,
        uuid=vm.identity.uuid,
        restored_pages=0,
        remaining_pages=remaining,
        reason=said + error.reason,
    )
