"""Merges that a client waits for.

Owns the clients that wait, their VMs and their time limits. Promises one answer for each:
the report, once its VMs have converged or its time is over, or why there is none. A merge
of all VMs begins only after the scouts have looked for new ones since the request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from vmdedup.core.convergence import Convergence
from vmdedup.daemon.api_process import ApiServer
from vmdedup.daemon.command_errors import ConflictError, NotFoundError, refusal_of
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.named_vm import is_attached, mergeable_vm
from vmdedup.daemon.pace import Pace
from vmdedup.daemon.scouts import Scouts
from vmdedup.daemon.snapshot import SnapshotFeed
from vmdedup.engine.fleet import Fleet
from vmdedup.engine.progress import PassOutcome
from vmdedup.errors import VmdedupError
from vmdedup.ipc.protocol import MergeNow
from vmdedup.linux import malloc
from vmdedup.models import Model


@dataclass
class MergeJob:
    """A client that waits for a merge."""

    request_id: int
    vms: tuple[str, ...] | None
    """VMs as the client named them; `None` means all."""
    look: int
    """The scouts' look for new VMs to wait for: one that began after the request."""
    deadline: float
    """End of the client's time limit on CLOCK_MONOTONIC, seconds."""
    pids: frozenset[int] = frozenset()
    """Pids of the VMs, once the job has begun."""
    convergence: Convergence = field(default_factory=Convergence)

    @property
    def begun(self) -> bool:
        """Whether its VMs are known and passes count for it."""
        return bool(self.pids)


class MergeJobs:
    """All merges that clients wait for."""

    def __init__(
        self,
        fleet: Fleet,
        scouts: Scouts,
        journal: Journal,
        pace: Pace,
        feed: SnapshotFeed,
        server: ApiServer,
    ) -> None:
        self._fleet = fleet
        self._scouts = scouts
        self._journal = journal
        self._pace = pace
        self._feed = feed
        self._server = server
        self._jobs: list[MergeJob] = []

    @property
    def waiting(self) -> bool:
        """Whether a client waits for a merge."""
        return bool(self._jobs)

    @property
    def begun(self) -> bool:
        """Whether passes count for a client that waits."""
        return any(job.begun for job in self._jobs)

    def may_be_awaited(self) -> bool:
        """Whether a client waits, or a request has come that may ask for a merge."""
        return self.waiting or self._server.channel.is_ready()

    def add(self, request_id: int, command: MergeNow) -> None:
        """Add a client that asks for a merge. Raises VmdedupError if there can be none."""
        run = self._pace.controls.run
        if run != 1:
            raise ConflictError(f"run={run}: merging is off; set run=1 first")
        vms = None if command.vms is None else tuple(command.vms)
        deadline = time.monotonic() + command.timeout_s
        # VMs that are known need not wait for others, which may take long to be reached.
        waits = vms is None or not all(is_attached(self._fleet, vm) for vm in vms)
        job = MergeJob(request_id, vms, self._scouts.look_now() if waits else 0, deadline)
        if not waits:
            self._begin(job)
        self._jobs.append(job)

    def begin_waiting(self) -> None:
        """Begin the merges that waited for the scouts to have looked for new VMs."""
        for job in list(self._jobs):
            if not job.begun and self._scouts.has_looked(job.look):
                try:
                    self._begin(job)
                except VmdedupError as error:
                    self._jobs.remove(job)
                    self._server.reply(job.request_id, refusal_of(error))

    def _begin(self, job: MergeJob) -> None:
        """Find the job's VMs, and have them looked at. Raises VmdedupError."""
        fleet = self._fleet
        if job.vms is None:
            pids = {each.pid for each in fleet.engine.vms if each.refusal is None}
            if not pids:
                raise NotFoundError("no VM is attached")
        else:
            pids = {mergeable_vm(fleet, vm).pid for vm in job.vms}
        job.pids = frozenset(pids)
        fleet.wake(pids)
        self._pace.hurry()

    def note_pass(self, outcome: PassOutcome) -> None:
        """Note the end of a pass."""
        for job in self._jobs:
            if job.begun:
                job.convergence.add(
                    self._fleet.engine.standing_pages(),
                    troubled=outcome.troubled,
                    awaits_storage=outcome.awaits_storage,
                )

    def end_in_time(self) -> None:
        """Answer the clients whose VMs have converged or ended, or whose time is over."""
        for job in list(self._jobs):
            if self._is_over(job):
                self._jobs.remove(job)
                report = self._report(job)
                with self._journal.surviving():
                    self._feed.push()
                self._server.reply(job.request_id, report)
                if not self._jobs:
                    self._fleet.engine.foreground_ends()
                    malloc.give_back()

    def _is_over(self, job: MergeJob) -> bool:
        if not job.begun:
            return False
        late = time.monotonic() >= job.deadline or self._pace.controls.run != 1
        return late or job.convergence.reached or job.pids.isdisjoint(self._fleet.pids())

    def _report(self, job: MergeJob) -> Model:
        """The answer to the client: the report, or why there is none."""
        converged = job.convergence.reached and not self._fleet.falls_short(job.pids)
        try:
            return self._fleet.report(converged=converged, only=job.pids)
        except VmdedupError as error:
            return refusal_of(error)

    def forget(self) -> None:
        """Drop all requests: the clients have lost their connections."""
        self._jobs.clear()
        self._fleet.engine.foreground_ends()
