"""The commands of the API, carried out on the fleet.

Owns the effect of each command; `steering`, `merge_jobs`, `content_looks` and `unmerge_request`
have those that take more than a call. Promises one answer for each request, at once or by
`merge_jobs` and `content_looks`; that readers see a command's changes before its answer
comes; and that a refused command has changed nothing. An unmerge that leaves pages is
reported as `unfinished`, and the daemon tries it again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmdedup.attach.discover import Candidate
from vmdedup.attach.ranges import yields_to_registration
from vmdedup.core.rmap import BYTES_PER_PAGE
from vmdedup.core.smart_scan import BYTES_PER_PAGE as AGE_BYTES_PER_PAGE
from vmdedup.daemon.api_process import ApiServer
from vmdedup.daemon.command_errors import ConflictError, refusal_of
from vmdedup.daemon.content_looks import ContentLooks
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.merge_jobs import MergeJobs
from vmdedup.daemon.named_vm import attached_vm, is_reachable, mergeable_vm, reach, reach_again
from vmdedup.daemon.pace import Pace
from vmdedup.daemon.preconditions import allocatable_bytes, why_host_cannot_merge
from vmdedup.daemon.scouts import Scouts
from vmdedup.daemon.snapshot import SnapshotFeed
from vmdedup.daemon.steering import Steering
from vmdedup.daemon.unmerge_request import unmerge
from vmdedup.engine.fleet import Fleet
from vmdedup.errors import AttachError, VmdedupError
from vmdedup.ipc.protocol import (
    Attach,
    ByteRange,
    CompareWithKsm,
    Detach,
    Detached,
    FreshReport,
    MergeNow,
    ReadContentSources,
    ReadSketch,
    Register,
    Registration,
    Request,
    SetControls,
    UnmergeVms,
    Unregister,
)
from vmdedup.linux.meminfo import available_bytes
from vmdedup.models import Model
from vmdedup.policy import registry
from vmdedup.policy.registry import Intervals, TryAgainError
from vmdedup.remap.unmerge_vm import unmerge_vm
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm


class Commands:
    """Carries out requests for a daemon."""

    def __init__(
        self,
        fleet: Fleet,
        scouts: Scouts,
        journal: Journal,
        steering: Steering,
        pace: Pace,
        jobs: MergeJobs,
        looks: ContentLooks,
        feed: SnapshotFeed,
        server: ApiServer,
    ) -> None:
        self._fleet = fleet
        self._scouts = scouts
        self._journal = journal
        self._steering = steering
        self._pace = pace
        self._jobs = jobs
        self._feed = feed
        self._server = server
        self._work: dict[type[Model], Callable[[Request], Model | None]] = {
            SetControls: self._set_controls,
            Register: self._register,
            Unregister: self._unregister,
            Attach: self._attach,
            Detach: self._detach,
            UnmergeVms: self._unmerge,
            MergeNow: self._merge_now,
            FreshReport: self._report,
            ReadSketch: self._sketch,
            ReadContentSources: looks.add,
            CompareWithKsm: looks.add,
        }

    def serve(self, request: Request) -> None:
        """Carry out one request; answers it unless it is one that waits."""
        try:
            result = self._work[type(request.command)](request)
        except VmdedupError as error:
            result = refusal_of(error)
        if result is None:
            return
        # Before the answer: a client that reads after it must see the change.
        if isinstance(request.command, SetControls):
            self._feed.push_controls()
        elif not isinstance(request.command, FreshReport | ReadSketch):
            self._feed.push()
        self._server.reply(request.id, result)

    def _set_controls(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, SetControls)
        return self._steering.set(command.values)

    def _register(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Register)
        registry.require_host(
            command.vm,
            command.backend,
            why_host_cannot_merge(self._fleet.settings.store_dir, self._fleet.guardian_pid),
        )
        vm = self._registrable(command.vm, command.backend)
        known = {region.backend for region in vm.regions}
        is_new = command.backend not in known
        wanted = registry.register(
            vm.registration,
            command.backend,
            command.offset_bytes,
            command.length_bytes,
            available_bytes=allocatable_bytes(),
            bytes_per_page=BYTES_PER_PAGE + AGE_BYTES_PER_PAGE if is_new else 0,
        )
        vm.registration = wanted.registration
        if is_new and yields_to_registration(wanted.never_merges):
            vm = self._fleet.renew(vm, {*vm.by_hand, command.backend})
            wanted = registry.register(
                _only(vm.registration, command.backend),
                command.backend,
                command.offset_bytes,
                command.length_bytes,
                available_bytes=allocatable_bytes(),
                bytes_per_page=0,
            )
            vm.registration = wanted.registration
        self._fleet.wake({vm.pid})
        self._pace.hurry()
        self._journal.add("registered", vm.name, command.backend)
        return _registration(vm, wanted, 0)

    def _registrable(self, vm: str, backend: str) -> AttachedVm:
        """The VM; one refused because none of its memory is registered is taken in now."""
        try:
            return mergeable_vm(self._fleet, vm)
        except AttachError:
            row = self._fleet.roster.row(vm)
            is_attached = row is not None and row.pid in self._fleet.pids()
            if row is None or is_attached or not is_reachable(row):
                raise
        self._fleet.take_in(reach_again(self._fleet, self._scouts, row), by_hand={backend})
        return attached_vm(self._fleet, vm)

    def _unregister(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Unregister)
        vm = attached_vm(self._fleet, command.vm)
        wanted = registry.unregister(
            vm.registration, command.backend, command.offset_bytes, command.length_bytes
        )
        which = _page_mask(vm, command.backend, wanted.removed)
        unmerged = 0
        if which.any():
            done = unmerge_vm(self._fleet.host, vm, which)
            unmerged = done.restored_pages
            if done.remaining_pages:
                raise TryAgainError(
                    vm.name,
                    "unregistering",
                    done.remaining_pages * PAGE_BYTES,
                    available_bytes(),
                )
        vm.registration = wanted.registration
        self._journal.add("unregistered", vm.name, command.backend)
        return _registration(vm, wanted, unmerged)

    def _attach(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Attach)
        path = Path(command.qmp)
        for vm in self._fleet.engine.vms:
            if vm.identity.socket_path == path:
                raise ConflictError(f"{vm.name}: it is attached already ({path})")
        attachment = reach(self._fleet, self._scouts, Candidate(command.qmp, None, (path,)))
        if attachment.identity.pid in self._fleet.pids():
            attachment.close()
            raise ConflictError(f"{attachment.identity.name}: it is attached already")
        row = self._fleet.take_in(attachment)
        self._scouts.welcome(attachment.identity.pid, path)
        if row.mergeable:
            self._pace.hurry()
        self._journal.add("attached" if row.mergeable else "refused", row.name, row.reason or "")
        return row

    def _detach(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, Detach)
        vm = attached_vm(self._fleet, command.vm)
        state = vm.scan.refresh()
        merged = int(np.count_nonzero(state.merged | state.zero))
        self._scouts.leave_alone(vm.pid, vm.identity.socket_path)
        self._fleet.let_go(command.vm)
        self._journal.add("detached", vm.name, f"{merged} pages stay merged")
        return Detached(vm=vm.name, pid=vm.pid, merged_pages=merged)

    def _unmerge(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, UnmergeVms)
        return unmerge(self._fleet, self._scouts, self._journal, command.vms)

    def _merge_now(self, request: Request) -> None:
        command = request.command
        assert isinstance(command, MergeNow)
        self._jobs.add(request.id, command)

    def _report(self, request: Request) -> Model:
        return self._fleet.report(converged=None)

    def _sketch(self, request: Request) -> Model:
        command = request.command
        assert isinstance(command, ReadSketch)
        vm = mergeable_vm(self._fleet, command.vm)
        engine = self._fleet.engine
        store = engine.stores.of_vm(vm)
        if store.by_node:
            raise ConflictError(
                f"{vm.name}: merge_across_nodes=0 keeps equal contents apart, so it has no sketch"
            )
        return engine.sketches.of_vm(vm, store, command.rate)


def _page_mask(vm: AttachedVm, backend: str, ranges: Intervals) -> npt.NDArray[np.bool_]:
    """These pages of a backend as a mask over the VM's page space."""
    mask = np.zeros(vm.space.pages, dtype=np.bool_)
    for index, region in enumerate(vm.regions):
        if region.backend == backend:
            mask[vm.space.slice_of(index)] = ranges.mask(region.pages)
    return mask


def _registration(vm: AttachedVm, change_: registry.Change, unmerged: int) -> Registration:
    registered = vm.registration.registered[change_.backend]
    return Registration(
        vm=vm.name,
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


def _only(registration: registry.VmRegistration, backend: str) -> registry.VmRegistration:
    """The registration without any of `backend`: by hand, only the requested range counts."""
    registered = {**registration.registered, backend: Intervals()}
    return registry.VmRegistration(registration.vm, registration.backends, registered)
