"""The commands of the API, carried out on the fleet.

Owns what each command does and how a failure is told. Promises one answer for
each request, at once or, for `merge-now`, when its VMs have converged or its
time is over; and that a command that is refused has changed nothing. What an unmerge
leaves is told as `unfinished`, and tried again by the daemon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup.attach.discover import Attachment, Candidate, attach
from vmdedup.core.convergence import Convergence
from vmdedup.core.rmap import BYTES_PER_PAGE
from vmdedup.core.smart_scan import BYTES_PER_PAGE as AGE_BYTES_PER_PAGE
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.preconditions import allocatable_bytes, why_host_cannot_merge
from vmdedup.daemon.scouts import Scouts
from vmdedup.engine.fleet import Fleet
from vmdedup.errors import AttachError, UsageError, VmdedupError, VmError
from vmdedup.guest.mapping_state import standing_pages
from vmdedup.ipc.channel import EngineChannel
from vmdedup.ipc.protocol import (
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
from vmdedup.linux.meminfo import available_bytes
from vmdedup.models import Model, Unmerged, UnmergedVm, VmListing
from vmdedup.policy import registry
from vmdedup.policy.controls import ControlFacts, Controls, ControlStateError, change
from vmdedup.policy.registry import Intervals, InvalidRangeError, TryAgainError
from vmdedup.remap.unmerge_vm import restore
from vmdedup.settings import Settings
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import Tenant


@dataclass
class MergeJob:
    """A client that waits for a merge."""

    request_id: int
    vms: tuple[str, ...] | None
    """As named by the client; None is all."""
    look: int
    """The scout's look for new VMs to wait for: one that began after the request."""
    deadline: float
    """On CLOCK_MONOTONIC, seconds."""
    pids: frozenset[int] = frozenset()
    """The VMs, once the job has begun."""
    convergence: Convergence = field(default_factory=Convergence)

    @property
    def begun(self) -> bool:
        """Whether its VMs are known and passes count for it."""
        return bool(self.pids)


class Service(Protocol):
    """What commands need of the daemon."""

    settings: Settings
    fleet: Fleet
    scout: Scouts
    controls: Controls
    journal: Journal
    jobs: list[MergeJob]

    def change_controls(self, controls: Controls) -> None: ...
    def control_facts(self, requested: Iterable[str]) -> ControlFacts: ...
    def control_values(self) -> ControlValues: ...
    def reply(self, request_id: int, result: Model) -> None: ...
    def push(self) -> None: ...
    def push_controls(self) -> None: ...
    def hurry(self) -> None: ...


class NotFoundError(VmdedupError):
    """No such VM."""


class ConflictError(VmdedupError):
    """Refused in the present state."""


class UnfinishedError(VmdedupError):
    """An unmerge left pages merged, as `unmerged` says; what is left is tried again."""

    def __init__(self, unmerged: Unmerged) -> None:
        stuck = [vm for vm in unmerged.vms if vm.remaining_pages]
        left = [f"{vm.name} (pid {vm.pid}): {vm.reason}" for vm in stuck]
        super().__init__(f"{'; '.join(left)}; tried again until it is done, or `set run=1`")
        self.unmerged = unmerged


def require_finished(unmerged: Unmerged) -> None:
    """Raise UnfinishedError when something stays merged."""
    if any(vm.remaining_pages for vm in unmerged.vms):
        raise UnfinishedError(unmerged)


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
        except UnfinishedError as error:
            result = Refusal(kind="unfinished", message=str(error), unmerged=error.unmerged)
        except VmdedupError as error:
            result = Refusal(kind=_kind_of(error), message=str(error))
        if result is None:
            return
        # Before the answer: who reads after it must see what it changed.
        if isinstance(request.command, SetControls):
            self._service.push_controls()
        elif not isinstance(request.command, FreshReport):
            self._service.push()
        self._service.reply(request.id, result)

    def answer(self, channel: EngineChannel, request_id: int, result: Model) -> None:
        """Send a result or a refusal."""
        if isinstance(result, Refusal):
            channel.refuse(request_id, result)
        else:
            channel.reply(request_id, result)

    def begin(self, job: MergeJob) -> Refusal | None:
        """Find out which VMs a merge job is about; why it can not be begun, if so."""
        fleet = self._service.fleet
        try:
            if job.vms is None:
                pids = {each.pid for each in fleet.engine.tenants if each.refusal is None}
                if not pids:
                    raise NotFoundError("no VM is attached")
            else:
                pids = {self._mergeable(vm).pid for vm in job.vms}
        except VmdedupError as error:
            return Refusal(kind=_kind_of(error), message=str(error))
        job.pids = frozenset(pids)
        fleet.wake(pids)
        return None

    def merge_report(self, job: MergeJob) -> Model:
        """What a merge job's client gets: the report, or why there is none."""
        fleet = self._service.fleet
        converged = job.convergence.reached and not fleet.falls_short(job.pids)
        try:
            return fleet.report(converged=converged, only=job.pids)
        except VmdedupError as error:
            return Refusal(kind=_kind_of(error), message=str(error))

    # --- the commands ---------------------------------------------------------------

    def _set_controls(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, SetControls)
        service = self._service
        changed = change(service.controls, command.values, service.control_facts(command.values))
        names = ", ".join(f"{name}={value}" for name, value in command.values.items())
        service.journal.add("controls", None, names)
        service.change_controls(changed)
        if "run" in command.values and changed.run == 1:
            service.fleet.wake_all()
        return service.control_values()

    def _register(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Register)
        service = self._service
        registry.require_host(
            command.vm,
            command.backend,
            why_host_cannot_merge(service.settings.store_dir, service.fleet.guardian_pid),
        )
        tenant = self._registrable(command.vm, command.backend)
        known = {region.backend for region in tenant.regions}
        is_new = command.backend not in known
        wanted = registry.register(
            tenant.registration,
            command.backend,
            command.offset_bytes,
            command.length_bytes,
            available_bytes=allocatable_bytes(),
            bytes_per_page=BYTES_PER_PAGE + AGE_BYTES_PER_PAGE if is_new else 0,
        )
        tenant.registration = wanted.registration
        if wanted.never_merges == "merge=off" and is_new:
            tenant = self._service.fleet.renew(tenant, {*tenant.by_hand, command.backend})
            wanted = registry.register(
                _only(tenant.registration, command.backend),
                command.backend,
                command.offset_bytes,
                command.length_bytes,
                available_bytes=allocatable_bytes(),
                bytes_per_page=0,
            )
            tenant.registration = wanted.registration
        self._service.fleet.wake({tenant.pid})
        self._service.hurry()
        self._service.journal.add("registered", tenant.name, command.backend)
        return _registration(tenant, wanted, 0)

    def _registrable(self, vm: str, backend: str) -> Tenant:
        """The VM; one that was refused because all its memory is merge=off is taken in now."""
        try:
            return self._mergeable(vm)
        except AttachError:
            row = self._service.fleet.roster.row(vm)
            is_attached = row is not None and row.pid in self._service.fleet.pids()
            if row is None or is_attached or not _is_reachable(row):
                raise
        self._service.fleet.take_in(self._reach_again(row), by_hand={backend})
        return self._tenant(vm)

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
            done = restore(self._service.fleet.host, tenant, which)
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
        attachment = self._reach(Candidate(command.qmp, None, (path,)))
        if attachment.identity.pid in service.fleet.pids():
            attachment.close()
            raise ConflictError(f"{attachment.identity.name}: it is attached already")
        row = service.fleet.take_in(attachment)
        service.scout.welcome(attachment.identity.pid, path)
        if row.mergeable:
            service.hurry()
        service.journal.add("attached" if row.mergeable else "refused", row.name, row.reason or "")
        return row

    def _reach(self, candidate: Candidate) -> Attachment:
        """Attach to a domain of that name or UUID, or through the sockets. Raises VmError."""
        service = self._service
        if service.scout.libvirt is not None:
            found = service.scout.libvirt.reach(candidate.name)
            if found is not None:
                return found
        timeout_s = service.settings.monitor_timeout_ms / 1000
        return attach(candidate, service.fleet.loop, timeout_s=timeout_s)

    def _detach(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Detach)
        tenant = self._tenant(command.vm)
        state = tenant.scan.refresh()
        merged = int(np.count_nonzero(state.merged | state.zero))
        self._service.scout.leave_alone(tenant.pid, tenant.identity.socket_path)
        self._service.fleet.let_go(command.vm)
        self._service.journal.add("detached", tenant.name, f"{merged} pages stay merged")
        return Detached(vm=tenant.name, pid=tenant.pid, merged_pages=merged)

    def _unmerge(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, UnmergeVms)
        return self.unmerge(command.vms)

    def unmerge(self, vms: Sequence[str] | None) -> Unmerged:
        """Unmerge the VMs named, or all, and leave them alone.

        Those too that are refused by now and stand on pages of ours all the same. Raises
        UnfinishedError when pages stay merged, NotFoundError, AttachError.
        """
        fleet = self._service.fleet
        outside = fleet.merged_outside() if vms is None else self._outside(vms)
        unreached = self._take_in_merged(outside)
        lost = {row.pid for row in unreached}
        tenants = [self._tenant(vm) for vm in vms or () if not self._is_of(vm, lost)]
        named = [tenant.pid for tenant in (tenants if vms is not None else fleet.engine.tenants)]
        fleet.rest(named)
        done = fleet.unmerge([str(pid) for pid in named], lambda _: None)
        done = done.model_copy(update={"vms": [*done.vms, *unreached]})
        self._service.journal.add("unmerged", None, ", ".join(vm.name for vm in done.vms))
        require_finished(done)
        return done

    def _outside(self, vms: Sequence[str]) -> list[VmListing]:
        """The rows of those of these VMs that are refused. Raises AttachError, NotFoundError."""
        rows = []
        for vm in vms:
            try:
                self._tenant(vm)
            except AttachError:
                row = self._service.fleet.roster.row(vm)
                if row is None or not _is_reachable(row):
                    raise
                rows.append(row)
        return rows

    def _is_of(self, vm: str, pids: set[int]) -> bool:
        row = self._service.fleet.roster.row(vm)
        return row is not None and row.pid in pids

    def _take_in_merged(self, rows: list[VmListing]) -> list[UnmergedVm]:
        """Attach to refused VMs, only to unmerge them; those that could not be reached.

        These stay asked for: whoever attaches to them next has them unmerged.
        """
        fleet = self._service.fleet
        unreached = []
        for row in rows:
            pid = row.pid or 0
            try:
                fleet.take_in(self._reach_again(row), refuse=False)
                fleet.tenant(str(pid)).record.leaving = True
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

    def _reach_again(self, row: VmListing) -> Attachment:
        sockets = (Path(row.qmp),) if row.qmp else ()
        return self._reach(Candidate(row.uuid or row.name, row.pid, sockets))

    def _merge_now(self, request: Request) -> Model | None:
        command = request.command
        assert isinstance(command, MergeNow)
        service = self._service
        if service.controls.run != 1:
            raise ConflictError(f"run={service.controls.run}: merging is off; set run=1 first")
        vms = None if command.vms is None else tuple(command.vms)
        deadline = time.monotonic() + command.timeout_s
        # VMs that are known need not wait for others, which may take long to be reached.
        waits = vms is None or not all(map(self._is_attached, vms))
        job = MergeJob(request.id, vms, service.scout.look_now() if waits else 0, deadline)
        if not waits:
            refusal = self.begin(job)
            if refusal is not None:
                return refusal
            service.hurry()
        service.jobs.append(job)
        return None

    def _report(self, request: Request) -> Model:
        return self._service.fleet.report(converged=None)

    def _is_attached(self, vm: str) -> bool:
        try:
            self._service.fleet.tenant(vm)
        except VmdedupError:
            return False
        return True

    def _mergeable(self, vm: str) -> Tenant:
        """The VM, if it may be merged. Raises AttachError for one that is only unmerged."""
        tenant = self._tenant(vm)
        if tenant.refusal is not None:
            raise AttachError(tenant.name, tenant.refusal, pid=tenant.pid)
        return tenant

    def _tenant(self, vm: str) -> Tenant:
        try:
            return self._service.fleet.tenant(vm)
        except AttachError:
            raise
        except UsageError as error:
            raise NotFoundError(str(error)) from error


def _is_reachable(row: VmListing) -> bool:
    """Whether a VM that is not attached could be attached to once more."""
    return row.qemu_version is not None and bool(row.qmp or row.uuid)


def _kind_of(error: VmdedupError) -> ErrorKind:
    kinds: tuple[tuple[type[VmdedupError], ErrorKind], ...] = (
        (NotFoundError, "not-found"),
        (ConflictError, "conflict"),
        (ControlStateError, "conflict"),
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
