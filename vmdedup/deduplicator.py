"""`Deduplicator`: the library's front door, and all that the command line uses.

    with Deduplicator() as dedup:
        dedup.attach(["/run/vms/*.qmp"])
        report = dedup.run(until_converged=True)
        assert report.host.saved_bytes > 0

Owns the life of an attachment: lock, guardian, monitors, engine. Promises that
leaving the block lets go of every VM, with the merges left in place, and that
no failure of one VM ends the others. Refuses to work beside another engine of
the same runtime directory. Not thread-safe: use it from the thread that made
it (ptrace demands that).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

import numpy as np
from qemu.qmp import QMPClient

from vmdedup import listing
from vmdedup.attach.discover import Attachment, Unreachable, attach_all
from vmdedup.attach.identity import identify
from vmdedup.attach.loop import MonitorLoop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.engine import Engine, PassProgress
from vmdedup.errors import AttachError, RefusedError, UsageError, VmError, VmGoneError
from vmdedup.guardian import Guardian, resume_noted
from vmdedup.models import (
    Funnel,
    MergePlan,
    SharingReport,
    Unmerged,
    UnmergedVm,
    Verification,
    VmList,
    VmListing,
    VmStatus,
)
from vmdedup.procfs.process import Process
from vmdedup.restore import restore
from vmdedup.runtime import RuntimeDirectory
from vmdedup.sessions import Host
from vmdedup.settings import Settings
from vmdedup.stores import remove_unused_stores
from vmdedup.summary import Absent, ScanTotals, process_pss_bytes, sharing_report
from vmdedup.tenant import Tenant
from vmdedup.verify import verify

_CONVERGED_SHARE = 0.01
"""A pass that adds less than this share of what is merged brings nothing more."""
_CONVERGED_FROM_PASS = 3

ReportProgress = Callable[[PassProgress], None]


def _silent(_: PassProgress) -> None:
    """Report nothing."""


class Deduplicator:
    """Attaches to VMs, merges, reports and unmerges them. A context manager."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings if settings is not None else Settings()
        self._exits = ExitStack()
        self._loop: MonitorLoop | None = None
        self._host: Host | None = None
        self._engine: Engine | None = None
        self._listings: list[VmListing] = []
        self._absent: list[Absent] = []

    def __enter__(self) -> Deduplicator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all VMs; what is merged stays merged. Idempotent."""
        self._exits.close()

    def attach(self, qmp: Sequence[str] = (), *, merging: bool = True) -> VmList:
        """Attach to the VMs behind QMP sockets or globs; to all of this host without any.

        With `merging` False nothing will be changed: no lock is taken, and VMs that
        must not be merged are attached too. The list has a row for every VM found,
        with the reason where it could not be attached. Raises UsageError or
        VmdedupError when no work is possible at all.
        """
        engine = self._prepare(merging)
        timeout_s = self.settings.monitor_timeout_ms / 1000
        assert self._loop is not None
        found = attach_all(qmp, self._loop, timeout_s=timeout_s)
        for unreachable in found.unreachable:
            self._note_unreachable(unreachable)
        for attachment in found.attached:
            self._take_in(engine, attachment, merging=merging)
        return VmList(vms=self._listings)

    def adopt(
        self, client: QMPClient, loop: asyncio.AbstractEventLoop, *, merging: bool = True
    ) -> VmListing:
        """Attach through a QMPClient that the caller has connected, running in `loop`.

        Call it, and everything after, from another thread than the loop's (for
        instance with `asyncio.to_thread`). The client is never disconnected.
        Raises AttachError when it is not a usable VM.
        """
        engine = self._prepare(merging)
        monitor = QmpMonitor.adopt(client, loop)
        with ExitStack() as exits:
            exits.callback(monitor.close)
            process = Process(monitor.vm, monitor.peer_pid)
            exits.callback(process.close)
            attachment = Attachment(monitor, process, identify(monitor, process))
            exits.pop_all()
        self._take_in(engine, attachment, merging=merging)
        return self._listings[-1]

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

        Converged: from the third pass on, two passes in a row that each added
        under 1% to what stands merged. `timeout_s` bounds `until_converged`; the
        report says then that it did not converge. Merges stay in place.
        """
        engine = self._require_engine()
        stop = stop if stop is not None else threading.Event()
        deadline = time.monotonic() + timeout_s
        quiet_passes = 0
        converged: bool | None = None
        while engine.tenants and not stop.is_set():
            outcome = engine.run_pass(progress)
            is_quiet = outcome.merged_pages <= _CONVERGED_SHARE * outcome.standing_pages
            quiet_passes = quiet_passes + 1 if is_quiet else 0
            converged = engine.full_scans >= _CONVERGED_FROM_PASS and quiet_passes >= 2
            if passes is not None and engine.full_scans >= passes:
                break
            if until_converged and (converged or time.monotonic() >= deadline):
                break
            progress(engine.idle_progress())
            stop.wait(self._pause_s(until_converged=until_converged or passes is not None))
        engine.sweep()
        return self._report(engine, converged=converged, scanned=True)

    def _pause_s(self, *, until_converged: bool) -> float:
        """A run that somebody waits for pauses only as long as a page must hold still."""
        pause_ms = self.settings.first_look_ms if until_converged else self.settings.sleep_ms
        return pause_ms / 1000

    def report(self) -> SharingReport:
        """What is shared now, read from the kernel; needs no earlier run of ours."""
        engine = self._require_engine()
        return self._report(engine, converged=None, scanned=engine.full_scans > 0)

    def plan(self) -> MergePlan:
        """What a run would save and at what VMA cost. Looks twice, changes nothing."""
        engine = self._require_engine()
        refused = [row for row in self._listings if not row.mergeable]
        return listing.merge_plan(engine.nominations(), engine.vma_budget, refused)

    def explain(self, vm: str) -> Funnel:
        """Where one VM's RAM went, from all pages to the saved ones. Changes nothing."""
        engine = self._require_engine()
        nominations = engine.nominations()
        return listing.funnel_of(self._tenant(engine, vm), nominations, engine.tenants)

    def unmerge(
        self, vms: Sequence[str] | None = None, *, progress: ReportProgress = _silent
    ) -> Unmerged:
        """Give pages their own memory back, of the VMs named or of all.

        Goes as far as the host's available memory safely allows and says what is left.
        """
        engine = self._require_engine()
        host = self._require_host()
        wanted = engine.tenants if vms is None else [self._tenant(engine, vm) for vm in vms]
        results = []
        for tenant in list(wanted):
            try:
                results.append(restore(host, tenant, lambda _: progress(engine.idle_progress())))
            except VmError as error:
                engine.drop(tenant, error)
                results.append(_not_unmerged(tenant, error))
        engine.forget_stores()
        return Unmerged(vms=results, store_removed=remove_unused_stores(self.settings.store_dir))

    def verify(self) -> Verification:
        """Check every merged page against its published checksum, and look for leftovers."""
        engine = self._require_engine()
        return verify(engine.tenants, self.settings)

    def _prepare(self, merging: bool) -> Engine:
        """The engine; with lock and guardian when it is to change anything."""
        if merging and self._host is None:
            if self._engine is not None:
                raise UsageError("attached for reading only: make a new Deduplicator to merge")
            runtime = RuntimeDirectory(self.settings.runtime_dir)
            self._exits.callback(runtime.close)
            resume_noted(runtime.path)
            guardian = Guardian(runtime.path, self.settings.hang_limit_ms)
            self._exits.callback(guardian.close)
            self._host = Host(self.settings, guardian, runtime)
        if self._engine is None:
            self._loop = self._exits.enter_context(MonitorLoop())
            self._engine = Engine(self.settings, self._host, self._note_dropped)
            self._exits.callback(self._engine.close)
        return self._engine

    def _require_engine(self) -> Engine:
        if self._engine is None:
            raise UsageError("nothing is attached: call attach() first")
        return self._engine

    def _require_host(self) -> Host:
        if self._host is None:
            raise UsageError("attached for reading only: attach with merging=True")
        return self._host

    def _tenant(self, engine: Engine, vm: str) -> Tenant:
        for tenant in engine.tenants:
            if vm in (tenant.name, str(tenant.pid)):
                return tenant
        for absent in self._absent:
            if vm in (absent.name, str(absent.pid)):
                raise AttachError(absent.name, absent.reason, pid=absent.pid)
        known = ", ".join(sorted(tenant.name for tenant in engine.tenants)) or "none"
        raise UsageError(f"no VM named {vm!r} (attached: {known})")

    def _take_in(self, engine: Engine, attachment: Attachment, *, merging: bool) -> None:
        identity = attachment.identity
        try:
            tenant = Tenant(attachment, self.settings, merging=merging)
            engine.add(tenant)
        except VmError as error:
            attachment.close()
            self._listings.append(listing.refused_listing(identity, error, self.settings))
            status: VmStatus = "gone" if isinstance(error, VmGoneError) else "refused"
            self._absent.append(Absent(identity.name, identity.pid, status, error.reason))
        else:
            self._listings.append(listing.vm_listing(tenant))

    def _note_unreachable(self, unreachable: Unreachable) -> None:
        name, pid, reason = unreachable.name, unreachable.pid, unreachable.reason
        self._listings.append(listing.unreachable_listing(name, pid, reason))
        self._absent.append(Absent(name, pid, "refused", reason))

    def _note_dropped(self, tenant: Tenant, error: VmError) -> None:
        status: VmStatus = "refused" if isinstance(error, RefusedError) else "gone"
        self._absent.append(Absent(tenant.name, tenant.pid, status, error.reason))

    def _report(self, engine: Engine, *, converged: bool | None, scanned: bool) -> SharingReport:
        scan = self._scan_totals(engine) if scanned else None
        while True:
            try:
                return sharing_report(engine.tenants, self._absent, converged=converged, scan=scan)
            except VmGoneError as error:
                lost = next(tenant for tenant in engine.tenants if tenant.pid == error.pid)
                engine.drop(lost, error)

    def _scan_totals(self, engine: Engine) -> ScanTotals:
        processes = process_pss_bytes()
        if self._host is not None:
            processes += process_pss_bytes(self._host.guardian.pid)
        scanned = int(np.sum([tenant.pages_scanned for tenant in engine.tenants]))
        return ScanTotals(engine.full_scans, scanned, processes)


def _not_unmerged(tenant: Tenant, error: VmError) -> UnmergedVm:
    state = tenant.state
    remaining = int(np.count_nonzero(state.slot >= 0)) if state is not None else 0
    return UnmergedVm(
        name=tenant.name,
        pid=tenant.pid,
        restored_pages=0,
        remaining_pages=remaining,
        reason=error.reason,
    )
