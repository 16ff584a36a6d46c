"""The commands of the API, carried out on the fleet.

Owns what each command does and how a failure is told. Promises one answer for
each request, at once or, for `merge-now`, when its VMs have converged or its
time is over; and that a command that is refused has changed nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup.attach.discover import Candidate, attach
from vmdedup.core.rmap import BYTES_PER_PAGE
from vmdedup.core.smart_scan import BYTES_PER_PAGE as AGE_BYTES_PER_PAGE
from vmdedup.deduplicator import CONVERGED_FROM_PASS, CONVERGED_QUIET_PASSES
from vmdedup.errors import AttachError, UsageError, VmdedupError, VmError
from vmdedup.fleet import Fleet
from vmdedup.models import Model, SharingReport
from vmdedup.policy import registry
from vmdedup.policy.controls import ControlFacts, Controls, change
from vmdedup.policy.registry import Intervals, InvalidRangeError, TryAgainError
from vmdedup.restore import available_bytes, restore
from vmdedup.service.channel import EngineChannel
from vmdedup.service.journal import Journal
from vmdedup.service.protocol import (
    Attach,
    ByteRange,
    ControlValues,
    Detach,
    Detached,
    ErrorKind,
    FreshReport,
    MergeNow,
    Refusal,
    Register,
    Registration,
    Request,
    SetControls,
    UnmergeVms,
    Unregister,
)
from vmdedup.service.scout import Scout
from vmdedup.settings import Settings
from vmdedup.tenant import Tenant
from vmdedup.units import PAGE_BYTES


@dataclass
class MergeJob:
    """A client that waits for a merge."""

    request_id: int
    pids: frozenset[int]
    deadline: float
    """On CLOCK_MONOTONIC, seconds."""
    passes: int = 0
    quiet_passes: int = field(default=0)

    @property
    def converged(self) -> bool:
        """Whether its passes have come to bring next to nothing."""
        return self.passes >= CONVERGED_FROM_PASS and self.quiet_passes >= CONVERGED_QUIET_PASSES


class Service(Protocol):
    """What commands need of the daemon."""

    settings: Settings
    fleet: Fleet
    scout: Scout
    controls: Controls
    journal: Journal
    jobs: list[MergeJob]

    def use_controls(self, controls: Controls) -> None: ...
    def control_values(self) -> ControlValues: ...
    def reply(self, request_id: int, result: Model) -> None: ...
    def touch(self) -> None: ...


class NotFoundError(VmdedupError):
    """No such VM."""


class ConflictError(VmdedupError):
    """Refused in the present state."""


class Commands:
    """Carries out requests for a daemon."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._work: dict[type[Model], Callable[[Request], Model | None]] = {
            SetControls: self._set_controls,
            Register: self._register,
            Unregister: self._unregister,
            Attach: self._attach,
            Detach: self._detach,
            UnmergeVms: self._unmerge,
            MergeNow: self._merge_now,
            FreshReport: self._report,
        }

    def serve(self, request: Request) -> None:
        """Carry out one request; answers it unless it is one that waits."""
        try:
            result = self._work[type(request.command)](request)
        except VmdedupError as error:
            result = Refusal(kind=_kind_of(error), message=str(error))
        if result is not None:
            self._service.reply(request.id, result)
            self._service.touch()

    def answer(self, channel: EngineChannel, request_id: int, result: Model) -> None:
        """Send a result or a refusal."""
        if isinstance(result, Refusal):
            channel.refuse(request_id, result)
        else:
            channel.reply(request_id, result)

    def merge_report(self, job: MergeJob, *, converged: bool) -> SharingReport:
        """What a merge job's client gets."""
        return self._service.fleet.report(converged=converged, only=job.pids)

    # --- the commands ---------------------------------------------------------------

    def _set_controls(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, SetControls)
        service = self._service
        shared = service.fleet.report(converged=None).host.pages_shared
        changed = change(service.controls, command.values, ControlFacts(pages_shared=shared))
        if changed.merge_across_nodes == 0 and len(_numa_nodes()) > 1:
            raise ConflictError(
                "merge_across_nodes=0: not possible here yet on a host with several NUMA nodes;"
                " give the VMs of each node a trust domain of their own"
            )
        before = service.controls
        service.use_controls(changed)
        names = ", ".join(f"{name}={value}" for name, value in command.values.items())
        service.journal.add("controls", None, names)
        if changed.run == 2 and before.run != 2:
            service.fleet.unmerge(None, lambda _: None)
        return service.control_values()

    def _register(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Register)
        tenant = self._tenant(command.vm)
        wanted = registry.register(
            tenant.registration,
            command.backend,
            command.offset_bytes,
            command.length_bytes,
            available_bytes=available_bytes(),
            bytes_per_page=BYTES_PER_PAGE + AGE_BYTES_PER_PAGE,
        )
        tenant.registration = wanted.registration
        known = {region.backend for region in tenant.regions}
        if wanted.never_merges == "merge=off" and command.backend not in known:
            tenant = self._service.fleet.renew(tenant, {*tenant.by_hand, command.backend})
            wanted = registry.register(
                _only(tenant.registration, command.backend),
                command.backend,
                command.offset_bytes,
                command.length_bytes,
                available_bytes=available_bytes(),
                bytes_per_page=0,
            )
            tenant.registration = wanted.registration
        self._service.journal.add("registered", tenant.name, command.backend)
        return _registration(tenant, wanted, 0)

    def _unregister(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Unregister)
        tenant = self._tenant(command.vm)
        wanted = registry.unregister(
            tenant.registration, command.backend, command.offset_bytes, command.length_bytes
        )
        which = _page_mask(tenant, command.backend, wanted.removed)
        unmerged = 0
        if which.any():
            done = restore(self._service.fleet.host, tenant, lambda _: None, which)
            unmerged = done.restored_pages
            if done.remaining_pages:
                raise TryAgainError(
                    tenant.name,
                    "unregistering",
                    done.remaining_pages * PAGE_BYTES,
                    available_bytes(),
                )
        tenant.registration = wanted.registration
        self._service.journal.add("unregistered", tenant.name, command.backend)
        return _registration(tenant, wanted, unmerged)

    def _attach(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Attach)
        service = self._service
        path = Path(command.qmp)
        for tenant in service.fleet.engine.tenants:
            if tenant.identity.socket_path == path:
                raise ConflictError(f"{tenant.name}: it is attached already ({path})")
        attachment = attach(
            Candidate(str(path), None, (path,)),
            service.fleet.loop,
            timeout_s=service.settings.monitor_timeout_ms / 1000,
        )
        if attachment.identity.pid in service.fleet.pids():
            attachment.close()
            raise ConflictError(f"{attachment.identity.name}: it is attached already")
        row = service.fleet.take_in(attachment)
        service.scout.welcome(attachment.identity.pid, path)
        service.journal.add("attached" if row.mergeable else "refused", row.name, row.reason or "")
        return row

    def _detach(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Detach)
        tenant = self._tenant(command.vm)
        state = tenant.refresh()
        merged = int(np.count_nonzero(state.merged | state.zero))
        self._service.scout.leave_alone(tenant.pid, tenant.identity.socket_path)
        self._service.fleet.let_go(command.vm)
        self._service.journal.add("detached", tenant.name, f"{merged} pages stay merged")
        return Detached(vm=tenant.name, pid=tenant.pid, merged_pages=merged)

    def _unmerge(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, UnmergeVms)
        for vm in command.vms or ():
            self._tenant(vm)
        done = self._service.fleet.unmerge(command.vms, lambda _: None)
        self._service.journal.add("unmerged", None, ", ".join(vm.name for vm in done.vms))
        return done

    def _merge_now(self, request: Request) -> Model | None:
        command = request.command
        assert isinstance(command, MergeNow)
        service = self._service
        if service.controls.run != 1:
            raise ConflictError(f"run={service.controls.run}: merging is off; set run=1 first")
        pids = (
            service.fleet.pids()
            if command.vms is None
            else {self._tenant(vm).pid for vm in command.vms}
        )
        if not pids:
            raise NotFoundError("no VM is attached")
        deadline = time.monotonic() + command.timeout_s
        service.jobs.append(MergeJob(request.id, frozenset(pids), deadline))
        service.touch()
        return None

    def _report(self, request: Request) -> Model:
        return self._service.fleet.report(converged=None)

    def _tenant(self, vm: str) -> Tenant:
        try:
            return self._service.fleet.tenant(vm)
        except AttachError:
            raise
        except UsageError as error:
            raise NotFoundError(str(error)) from error


def _kind_of(error: VmdedupError) -> ErrorKind:
    kinds: tuple[tuple[type[VmdedupError], ErrorKind], ...] = (
        (NotFoundError, "not-found"),
        (ConflictError, "conflict"),
        (TryAgainError, "busy"),
        (InvalidRangeError, "usage"),
        (UsageError, "usage"),
        (AttachError, "conflict"),
        (VmError, "failed"),
    )
    return next((kind for type_, kind in kinds if isinstance(error, type_)), "failed")


def _page_mask(tenant: Tenant, backend: str, ranges: Intervals) -> npt.NDArray[np.bool_]:
    """These pages of a backend as a mask over the VM's page space."""
    mask = np.zeros(tenant.space.pages, dtype=np.bool_)
    for index, region in enumerate(tenant.regions):
        if region.backend == backend:
            mask[tenant.space.slice_of(index)] = ranges.mask(region.pages)
    return mask


def _registration(tenant: Tenant, change_: registry.Change, unmerged: int) -> Registration:
    registered = tenant.registration.registered[change_.backend]
    return Registration(
        vm=tenant.name,
        backend=change_.backend,
        complete=change_.errno == 0,
        registered=tuple(_bytes(start, end, None) for start, end in registered),
        skipped=tuple(_bytes(start, end, "not there") for start, end in change_.missing),
        unmerged_pages=unmerged,
        reason=change_.never_merges,
    )


def _bytes(start_page: int, end_page: int, reason: str | None) -> ByteRange:
    return ByteRange(
        offset_bytes=start_page * PAGE_BYTES,
        length_bytes=(end_page - start_page) * PAGE_BYTES,
        reason=reason,
    )


def _only(registration: registry.Registration, backend: str) -> registry.Registration:
    """The registration with nothing of `backend`: by hand means just the range asked for."""
    registered = {**registration.registered, backend: Intervals()}
    return registry.Registration(registration.vm, registration.backends, registered)


def _numa_nodes() -> list[str]:
    return [path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*")]
