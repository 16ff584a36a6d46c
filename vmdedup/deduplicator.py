"""`Deduplicator`: the library's entry point, and all that the command line uses.

    with Deduplicator() as dedup:
        dedup.attach(["/run/vms/*.qmp"])
        report = dedup.run(until_converged=True)
        assert report.host.saved_bytes > 0

Owns one run over a fleet of VMs. Promises that leaving the block releases every
VM and leaves the merges in place, and that no failure of one VM ends the
others. Refuses to work beside another engine of the same runtime directory. Not
thread-safe: use it from the thread that made it (ptrace demands that).
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, TypeVar

from qemu.qmp import QMPClient

from vmdedup.accounting import listing
from vmdedup.accounting.verify import verify
from vmdedup.attach.discover import Attachment, Found, attach_all
from vmdedup.attach.identity import identify
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.closing import Closing
from vmdedup.core.convergence import Convergence
from vmdedup.engine.fleet import LOCK_WAIT_S, Fleet
from vmdedup.engine.progress import PassProgress, ReportProgress
from vmdedup.errors import UsageError
from vmdedup.linux.process import Process
from vmdedup.models import (
    ContentSources,
    Funnel,
    MergePlan,
    SharingReport,
    Unmerged,
    Verification,
    VmList,
    VmListing,
)
from vmdedup.settings import Settings

if TYPE_CHECKING:
    from vmdedup.attach.libvirt.link import LibvirtLink

_Result = TypeVar("_Result")


def finished(steps: Generator[None, None, _Result]) -> _Result:
    """The result of work in pieces, without a stop between them."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: _Result = end.value
        return result


def _silent(_: PassProgress) -> None:
    """Report nothing."""


class Deduplicator(Closing):
    """Attaches to VMs; merges, reports and unmerges them. A context manager."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings if settings is not None else Settings()
        self._fleet: Fleet | None = None
        self._link: LibvirtLink | None = None

    def close(self) -> None:
        """Release all VMs; merged pages stay merged. Idempotent."""
        if self._fleet is not None:
            self._fleet.close()
        if self._link is not None:
            self._link.close()

    def attach(
        self, qmp: Sequence[str] = (), *, merging: bool = True, refuse: bool = True
    ) -> VmList:
        """Attach to the VMs behind QMP sockets or globs; without any, to all on this host.

        With a libvirt in the settings it attaches to its domains, and to the VMs behind
        sockets that are named.
        With `merging` False nothing will be changed: no lock is taken, and VMs that
        must not be merged are attached too. With `refuse` False these are attached
        to be unmerged; they are never merged. The list has a row for every VM found,
        with the reason if it could not be attached. Raises UsageError or
        VmdedupError when no work is possible at all.
        """
        fleet = self._prepare(merging)
        timeout_s = self.settings.monitor_timeout_ms / 1000
        found = Found()
        if self.settings.libvirt.uri is not None:
            found = self._domains(self.settings.libvirt.uri, timeout_s)
        if qmp or self.settings.libvirt.uri is None:
            others = attach_all(qmp, fleet.loop, timeout_s=timeout_s, use=self.settings.monitor)
            found.attached += others.attached
            found.unreachable += others.unreachable
        for unreachable in found.unreachable:
            fleet.note_unreachable(unreachable)
        for attachment in found.attached:
            fleet.take_in(attachment, refuse=merging and refuse)
        return fleet.listed()

    def warnings(self) -> list[str]:
        """Problems that do not prevent the work; one line each."""
        return list(self._attached().crowded().values())

    def _domains(self, uri: str, timeout_s: float) -> Found:
        """Attach to the running domains of a libvirt. Raises VmdedupError."""
        from vmdedup.attach.libvirt.discover import attach_domains
        from vmdedup.attach.libvirt.link import LibvirtLink

        if self._link is None:
            self._link = LibvirtLink(uri)
        self._link.connect(timeout_s)
        return attach_domains(self._link, timeout_s)

    def adopt(
        self, client: QMPClient, loop: asyncio.AbstractEventLoop, *, merging: bool = True
    ) -> VmListing:
        """Attach through a QMPClient that the caller has connected, running in `loop`.

        Call it, and every later method, from another thread than the loop's (for
        instance with `asyncio.to_thread`). The client is never disconnected.
        Raises AttachError when it is not a usable VM.
        """
        fleet = self._prepare(merging)
        monitor = QmpMonitor.adopt(client, loop)
        try:
            process = Process(monitor.vm, monitor.peer_pid)
            try:
                attachment = Attachment(monitor, process, identify(monitor, process))
            except BaseException:
                process.close()
                raise
        except BaseException:
            monitor.close()
            raise
        return fleet.take_in(attachment, refuse=merging)

    def run(
        self,
        *,
        passes: int | None = None,
        until_converged: bool = False,
        timeout_s: float = 120.0,
        stop: threading.Event | None = None,
        progress: ReportProgress = _silent,
    ) -> SharingReport:
        """Run passes: a number of them, until converged, or until `stop` is set.

        Converged: see `core.convergence`. `timeout_s` limits `until_converged`; after it
        the report says that the run did not converge. Merges stay in place.
        """
        fleet = self._attached()
        engine = fleet.engine
        stop = stop if stop is not None else threading.Event()
        deadline = time.monotonic() + timeout_s
        convergence = Convergence()
        converged: bool | None = None
        done = 0
        while engine.vms and not stop.is_set():
            fleet.follow_changes()
            fleet.settle()
            outcome = engine.run_pass(progress)
            done += 1
            convergence.add(
                engine.standing_pages(),
                troubled=outcome.troubled,
                awaits_storage=outcome.awaits_storage,
            )
            converged = convergence.reached
            if passes is not None and done >= passes:
                break
            if until_converged and (converged or time.monotonic() >= deadline):
                break
            progress(engine.idle_progress())
            stop.wait(self._pause_s(is_awaited=until_converged or passes is not None))
        engine.sweep()
        if converged and fleet.falls_short():
            converged = False
        return fleet.report(converged=converged)

    def _pause_s(self, *, is_awaited: bool) -> float:
        """A run that somebody waits for pauses only as long as a page must hold still."""
        pause_ms = self.settings.first_look_ms if is_awaited else self.settings.sleep_ms
        return pause_ms / 1000

    def report(self) -> SharingReport:
        """The sharing now, read from the kernel; needs no earlier run of ours."""
        return self._attached().report(converged=None)

    def compare_with_ksm(self) -> SharingReport:
        """The sharing now, and what the kernel's KSM would save on the same VMs.

        Reads all their memory once; changes nothing. Raises VmError.
        """
        from vmdedup.accounting.ksm_comparison import ksm_comparison, ksm_contents
        from vmdedup.linux.ksm import read_ksm

        sharing, seed = self.report(), secrets.randbits(63)
        contents = [finished(ksm_contents(vm, seed)) for vm in self._attached().engine.vms]
        compared = ksm_comparison(contents, read_ksm(), seed)
        return sharing.model_copy(update={"ksm": compared})

    def content_sources(self, known: Sequence[str]) -> ContentSources:
        """Where the contents of the VMs' memory come from: which of these files and folders.

        Kernels, initrds, disk and CD images, folders; each is digested once and cached. Reads
        all memory of the VMs once; changes nothing. Raises UsageError, VmError.
        """
        from vmdedup.accounting.content_sources import content_sources, held_contents
        from vmdedup.known.cache import known_pages_of

        sources = [known_pages_of(path) for path in known]
        held = [finished(held_contents(vm)) for vm in self._attached().engine.vms]
        return content_sources(held, sources)

    def plan(self) -> MergePlan:
        """The savings of a run, their cost in VMAs, and the memory that a write of all takes.

        Looks twice, changes nothing.
        """
        fleet = self._attached()
        engine = fleet.engine
        nominations = engine.nominations()
        fleet.report(converged=None)
        refused = fleet.roster.refused()
        return listing.merge_plan(nominations, engine.vma_budget, refused, fleet.places)

    def explain(self, vm: str) -> Funnel:
        """The funnel of one VM's RAM, from all pages to the saved ones. Changes nothing."""
        fleet = self._attached()
        nominations = fleet.engine.nominations()
        return listing.funnel_of(fleet.attached(vm), nominations, fleet.engine.vms)

    def unmerge(
        self, vms: Sequence[str] | None = None, *, progress: ReportProgress = _silent
    ) -> Unmerged:
        """Unmerge the VMs named, or all: their pages get their own memory again.

        Goes as far as the host's available memory safely allows and reports the rest.
        """
        return self._attached().unmerge(vms, progress)

    def verify(self, *, read_swapped: bool = False) -> Verification:
        """Check every merged page against its published checksum, and look for leftovers.

        A VM that ends meanwhile is reported as gone. `read_swapped`: check also store pages
        that are swapped out, which swaps them in.
        """
        served = self._attached().engine.served
        return verify(list(served.vms), self.settings, served.drop, read_swapped=read_swapped)

    def _prepare(self, merging: bool) -> Fleet:
        """The fleet; with lock and guardian if it is to change anything."""
        if self._fleet is None:
            self._fleet = Fleet(self.settings, merging=merging, wait_s=LOCK_WAIT_S)
        elif merging and self._fleet.guardian_pid is None:
            raise UsageError("attached for reading only: make a new Deduplicator to merge")
        return self._fleet

    def _attached(self) -> Fleet:
        if self._fleet is None:
            raise UsageError("nothing is attached: call attach() first")
        return self._fleet
