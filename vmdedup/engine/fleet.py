"""The fleet: the VMs that are attached, and those that are not and why.

Owns attachments from the moment a monitor is open until the VM is let go of:
the engine's tenants, the rows of `vms`, the reasons of the absent. Used by
`Deduplicator` for one run and by the daemon for good. Promises that a VM that
fails, ends or turns hazardous never ends the others. Not thread-safe: it is used on the
thread that made it, and has work on several VMs done by `workers`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from vmdedup.accounting.sharing_report import Absent, PastTotals, ScanTotals, sharing_report
from vmdedup.attach.discover import Attachment, Unreachable
from vmdedup.attach.identity import VmPolicy
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.core.rmap import OWN
from vmdedup.engine.engine import Engine
from vmdedup.engine.owed import Owed
from vmdedup.engine.progress import ReportProgress
from vmdedup.engine.roster import Roster
from vmdedup.errors import (
    AttachError,
    InjectionError,
    MergeError,
    RefusedError,
    RuntimeBusyError,
    UsageError,
    VmError,
    VmGoneError,
)
from vmdedup.guardian.guardian import Guardian
from vmdedup.guardian.resume import resume_noted
from vmdedup.guardian.runtime_dir import RuntimeDirectory
from vmdedup.linux.flock import HeldError
from vmdedup.linux.other_engine import held_by
from vmdedup.linux.process import Process
from vmdedup.linux.smaps import process_pss_bytes
from vmdedup.models import SharingReport, Unmerged, UnmergedVm, VmList, VmListing
from vmdedup.policy.domains import crowded_default_domains
from vmdedup.policy.hazards import must_unmerge
from vmdedup.remap.context import Host
from vmdedup.remap.session import finish_predecessor, resume_given_up
from vmdedup.remap.unmerge_vm import restore
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import Tenant

LOCK_WAIT_S = 2.0
"""How long a new engine waits for one that is just ending."""
_LOCK_POLL_S = 0.05


class Fleet:
    """Attached VMs and their engine. `close` lets go of all; merges stay.

    With `merging` it takes the runtime directory's lock and starts the guardian;
    `wait_s` is how long to wait for the lock; `stop`, when set, has merging end after
    the gate at hand. Raises RuntimeBusyError, UsageError.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        merging: bool,
        wait_s: float = 0.0,
        stop: threading.Event | None = None,
    ) -> None:
        self.settings = settings
        self._host: Host | None = None
        self.roster = Roster()
        self._counted: dict[int, Tenant] = {}
        """Tenants of the last report, by identity: they may leave before the next."""
        self._past = PastTotals()
        self._owed = Owed()
        self.dropped: list[Absent] = []
        """VMs that had to go, for the caller to take note of and clear."""
        self._exits = ExitStack()
        with ExitStack() as exits:
            if merging:
                runtime = _locked(settings, wait_s)
                exits.callback(runtime.close)
                resume_noted(runtime.path)
                guardian = Guardian(runtime.path, settings.hang_limit_ms)
                exits.callback(guardian.close)
                self._host = Host(settings, guardian, runtime, stop or threading.Event())
            self.loop = exits.enter_context(MonitorLoop())
            self.engine = Engine(settings, self._host, self._note_dropped)
            exits.callback(self.engine.close)
            self._exits = exits.pop_all()

    def close(self) -> None:
        """Let go of all VMs; what is merged stays merged. Idempotent."""
        self._exits.close()

    @property
    def host(self) -> Host:
        """What sessions share. Raises UsageError for a fleet that only reads."""
        if self._host is None:
            raise UsageError("attached for reading only: attach with merging=True")
        return self._host

    @property
    def guardian_pid(self) -> int | None:
        """The guardian's process id, None for a fleet that only reads."""
        return None if self._host is None else self._host.guardian.pid

    def use(self, settings: Settings) -> None:
        """Take over changed settings from the next pass on."""
        self.settings = settings
        if self._host is not None:
            self._host = Host(settings, self._host.guardian, self._host.runtime, self._host.stop)
        self.engine.use(settings, self._host)

    # --- who is in ------------------------------------------------------------------

    def take_in(
        self, attachment: Attachment, *, refuse: bool = True, by_hand: Collection[str] = ()
    ) -> VmListing:
        """Make an attachment a tenant, or list why not. Takes ownership of it."""
        identity = attachment.identity
        try:
            turn_away = refuse and self._host is not None
            if self._host is not None:
                _claim(attachment.process)
                finish_predecessor(self._host, attachment)
            tenant = Tenant(
                attachment, self.settings, refuse=refuse and not turn_away, by_hand=by_hand
            )
            if turn_away and tenant.refusal is not None:
                self._turn_away(tenant, tenant.refusal)
            self.engine.add(tenant)
            tenant.record.resting = self._owed.is_asked(identity)
            if self._host is not None and self.engine.stands_elsewhere(tenant):
                self._leave(tenant)
            self._rank()
        except VmError as error:
            attachment.close()
            return self.roster.note_refused(identity, error, self.settings)
        return self.roster.note_attached(tenant)

    def note_unreachable(self, unreachable: Unreachable) -> bool:
        """List a VM whose monitor could not be reached; whether that is news."""
        if unreachable.pid in self.pids() or Path(unreachable.name) in self.keys():
            return False
        return self.roster.note_unreachable(unreachable)

    def listed(self) -> VmList:
        """Every VM found so far, in the order of finding; with what hinders it just now."""
        return self.roster.listed(self.engine.tenants)

    def hindrances(self) -> dict[str, str]:
        """Why nothing can be merged now on the attached VMs of these names."""
        return {
            tenant.name: reason
            for tenant in self.engine.tenants
            if (reason := tenant.monitor.silence.reason or tenant.storage.away) is not None
        }

    def merged_outside(self) -> list[VmListing]:
        """VMs that are not attached to and stand on pages of ours all the same."""
        return self.roster.merged_outside(self.pids())

    def tenant(self, vm: str) -> Tenant:
        """The attached VM of that name or pid. Raises AttachError, UsageError."""
        for tenant in self.engine.tenants:
            if vm in (tenant.name, str(tenant.pid), tenant.identity.uuid):
                return tenant
        for absent in self.roster.absent:
            if vm in (absent.name, str(absent.pid), absent.uuid):
                raise AttachError(absent.name, absent.reason, pid=absent.pid)
        known = ", ".join(sorted(tenant.name for tenant in self.engine.tenants)) or "none"
        raise UsageError(f"no VM named {vm!r} (attached: {known})")

    def pids(self) -> set[int]:
        """Processes of the attached VMs."""
        return {tenant.pid for tenant in self.engine.tenants}

    def keys(self) -> set[Path | int]:
        """Processes and sockets of the attached VMs."""
        paths = (tenant.identity.socket_path for tenant in self.engine.tenants)
        return self.pids() | {path for path in paths if path is not None}

    def let_go(self, vm: str) -> Tenant:
        """Detach from a VM; its merges stay. Returns the closed tenant."""
        tenant = self.tenant(vm)
        self.engine.let_go(tenant)
        self.roster.let_go(tenant)
        return tenant

    def drop_ended(self) -> None:
        """Let go of the VMs whose process has ended."""
        for tenant in list(self.engine.tenants):
            if not tenant.process.alive():
                error = VmGoneError(tenant.name, "the VM's process ended", pid=tenant.pid)
                self.engine.served.drop(tenant, error)

    def forget_ended(self) -> bool:
        """Strike VMs from the list that have ended, attached or not; whether there were any."""
        self._owed.forget_ended()
        return self.roster.forget_ended(self.settings)

    def rest(self, pids: Collection[int]) -> None:
        """Leave these VMs alone until `wake`: their pages are to be given back, on request.

        What an unmerge leaves of them is tried again by `settle`.
        """
        resting = [tenant for tenant in self.engine.tenants if tenant.pid in pids]
        self._owed.ask(resting)
        for tenant in resting:
            tenant.record.resting = True
            tenant.record.trouble = None  # of a merge that is not to be tried again
            tenant.scan.stop_tracking()

    def rest_when_found(self, pid: int) -> None:
        """Have a VM that can not be attached to now unmerged, and left alone, once it is."""
        self._owed.ask_for(pid)

    def wake(self, pids: Collection[int]) -> None:
        """Merge these VMs again."""
        woken = [tenant for tenant in self.engine.tenants if tenant.pid in pids]
        self._owed.revoke(woken)
        for tenant in woken:
            tenant.record.resting = self._owed.is_asked(tenant.identity)

    def rest_all(self) -> None:
        """Leave every VM alone until `wake_all`, also one that comes later."""
        self._owed.everything = True
        self.rest(self.pids())

    def wake_all(self) -> None:
        """Merge all VMs again."""
        self._owed.revoke_all()
        self.wake(self.pids())
        for tenant in list(self.engine.tenants):
            if tenant.record.leaving and tenant.refusal is not None:
                # Attached to be unmerged only; taken in anew it is again where its hazard, or
                # its domain, asks for that.
                self.engine.tenants.remove(tenant)
                self._take_in_anew(tenant)

    @property
    def left_to_unmerge_pages(self) -> int:
        """Pages of all attached VMs that are to be unmerged and are not yet."""
        return sum(tenant.left_to_unmerge_pages for tenant in self.engine.tenants)

    def falls_short(self, only: Collection[int] | None = None) -> bool:
        """Whether VMs (those with the pids `only`) wait for room, have a domain to leave, or
        were not merged for an error. One that can not be asked just now is not waited for.
        """
        return any(
            tenant.record.leaving
            or tenant.record.waiting_pages
            or (tenant.record.trouble is not None and tenant.hindrance is None)
            for tenant in self.engine.tenants
            if only is None or tenant.pid in only
        )

    def settle(self) -> list[UnmergedVm]:
        """Try again to unmerge what was to be unmerged and is not, where it is time to.

        What became of those that were tried.
        """
        due = self._owed.due(self.engine.tenants)
        if not due:
            return []
        return self._unmerge(due)

    def _turn_away(self, tenant: Tenant, refusal: str) -> None:
        """Refuse a VM; what is merged on it is taken back where it must not stay so.

        Returns where that left pages merged: it stays attached for these, refused as it is.
        Raises RefusedError, or another VmError when it can not be served at all.
        """
        try:
            of_hazard = must_unmerge(tenant.findings)
            of_domain = tenant.refusal_key == "domain"
            if of_hazard or of_domain or self._owed.is_asked(tenant.identity):
                self._take_back(tenant)
                if tenant.record.left_reason is not None:
                    refusal = f"{refusal}; {tenant.record.left_reason}"
            if not tenant.left_to_unmerge_pages:
                raise RefusedError(tenant.name, refusal, pid=tenant.pid, key=tenant.refusal_key)
        except BaseException:
            tenant.close()
            raise
        tenant.refusal = refusal

    def _take_back(self, tenant: Tenant) -> None:
        """Unmerge a VM that is not attached yet, as far as that can be."""
        tenant.scan.refresh()
        if not _is_merged(tenant):
            return
        tenant.record.leaving = True
        try:
            tenant.record.left_reason = restore(self.host, tenant).reason
        except (MergeError, InjectionError) as error:  # nothing of the VM was lost
            tenant.scan.refresh()
            tenant.record.left_reason = error.reason

    def _leave(self, tenant: Tenant) -> None:
        """Unmerge a VM whose trust domain is another one now; `settle` does what is left.

        Raises VmGoneError when it was dropped for that.
        """
        tenant.record.leaving = True
        self._unmerge([tenant])
        if tenant.pid not in self.pids():
            raise VmGoneError(tenant.name, "lost while it left its domain", pid=tenant.pid)

    def _unmerge(
        self, tenants: Sequence[Tenant], told: Callable[[], None] = lambda: None
    ) -> list[UnmergedVm]:
        """Unmerge these VMs; those that have left by it are served again, or turned away."""
        results = self._owed.unmerge(self.engine, self.host, tenants, told)
        for tenant in tenants:
            if tenant.record.leaving and not tenant.left_to_unmerge_pages:
                tenant.record.leaving = False
                if tenant.refusal is not None and tenant in self.engine.tenants:
                    self.engine.tenants.remove(tenant)
                    self._take_in_anew(tenant)
        return list(results.values())

    def stop_tracking(self) -> None:
        """Hold no userfaultfd of any VM, so that QEMU can use its own, until the next look."""
        for tenant in self.engine.tenants:
            tenant.scan.stop_tracking()

    def follow_changes(self, *, at_leisure: bool = False) -> list[tuple[str, str]]:
        """Reexamine the VMs on which a cheap look sees news; (name, what changed) of each.

        `at_leisure` a cheaper one, see `Watch.has_news`.
        """
        disturbed: set[Tenant] = set()

        def done(tenant: Tenant, found: bool | VmError) -> None:
            if found is not False:
                disturbed.add(tenant)

        reachable = self.reachable()
        for tenant in reachable:
            tenant.storage.try_again()
            if self._host is not None:
                with suppress(VmError):  # it is tried again at the next look
                    resume_given_up(self._host, tenant)
        self.engine.served.workers.each(
            reachable,
            lambda tenant: tenant.disturbed(at_leisure=at_leisure),
            done,
            hurries=self.engine.served.hurries,
        )
        reasons = {tenant: self.reexamine(tenant) for tenant in reachable if tenant in disturbed}
        return [(tenant.name, reason) for tenant, reason in reasons.items() if reason is not None]

    def reachable(self) -> list[Tenant]:
        """The attached VMs whose monitors can be asked now."""
        return [tenant for tenant in self.engine.tenants if tenant.monitor.outage is None]

    def use_policy(self, uuid: str, policy: VmPolicy) -> list[str]:
        """Take over what a VM's own description says now; names of VMs that moved by it."""
        for tenant in self.engine.tenants:
            if tenant.identity.uuid == uuid:
                tenant.use_policy(policy)
        self._rank()
        return self.follow_domains()

    def _rank(self) -> None:
        """VMs of a higher priority are looked at and merged first."""
        self.engine.tenants.sort(key=lambda tenant: -tenant.identity.policy.priority)

    def crowded(self) -> dict[str, str]:
        """A warning for each default trust domain that several libvirt domains are in."""
        vms = [tenant.identity for tenant in self.engine.tenants if tenant.identity.uuid]
        return {
            domain: f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}: in one trust domain"
            f" ({domain}) only because libvirt runs them with one uid; say who may share with"
            " whom ([[domains]], or trust-domain in their metadata)"
            for domain, names in crowded_default_domains(vms, self.settings.domains).items()
        }

    def reexamine(self, tenant: Tenant) -> str | None:
        """Look again at a VM's memory and devices; what changed, in one line, if anything did.

        Memory that was plugged in or out makes the VM a new tenant; one on which a
        hazard appeared is refused, and unmerged first where the hazard asks for it.
        """
        try:
            reason = tenant.changed()
            if reason is not None:
                self.renew(tenant, tenant.by_hand)
        except VmError as error:
            if tenant not in self.engine.tenants:
                return reason
            self.engine.served.drop(tenant, error)
            return None
        return reason

    def follow_domains(self) -> list[str]:
        """Take VMs in anew whose trust domain is another one by now; their names.

        Each is unmerged first: it may share no page with those it was with. What can not be
        unmerged now, `settle` tries again; until it is done the VM shares nothing new.
        """
        moved = []
        for tenant in list(self.engine.tenants):
            try:
                domain: str | None = tenant.domain_by(self.settings.domains)
            except RefusedError:
                domain = None
            if domain == tenant.domain:
                continue
            moved.append(tenant.name)
            try:
                renewed = self.renew(tenant, tenant.by_hand)
                if not renewed.record.leaving and _is_merged(renewed):
                    self._leave(renewed)  # its zero pages have a file of the old domain's
            except VmError as error:
                if tenant in self.engine.tenants:
                    self.engine.served.drop(tenant, error)
        return moved

    def renew(self, tenant: Tenant, by_hand: Collection[str]) -> Tenant:
        """Take a VM in anew, with what was registered by hand. Raises AttachError if refused."""
        self.engine.tenants.remove(tenant)
        row = self._take_in_anew(tenant, by_hand)
        return self.tenant(str(row.pid))

    def _take_in_anew(self, tenant: Tenant, by_hand: Collection[str] | None = None) -> VmListing:
        """Make a tenant that is none any more one again, if it may be, as it was registered."""
        by_hand = tenant.by_hand if by_hand is None else by_hand
        row = self.take_in(tenant.give_up(), by_hand=by_hand)
        for renewed in self.engine.tenants:
            if renewed.pid == tenant.pid:
                renewed.registration = tenant.registration.following(renewed.registrable())
                renewed.record.resting = tenant.record.resting
                renewed.record.left_reason = renewed.record.left_reason or tenant.record.left_reason
        return row

    # --- what is shared -------------------------------------------------------------

    def report(
        self,
        *,
        converged: bool | None,
        only: Collection[int] | None = None,
        refresh: bool = True,
    ) -> SharingReport:
        """The report over all VMs, or those with the pids `only`.

        Unless `refresh`, as the last round knew them, where that can be relied on.
        """
        self._book_departed()
        scan = None if self._host is None else self._scan_totals(only is None)
        while True:
            tenants = [t for t in self.engine.tenants if only is None or t.pid in only]
            absent = [a for a in self.roster.absent if only is None or a.pid in only]
            try:
                return sharing_report(
                    tenants, absent, converged=converged, scan=scan, refresh=refresh
                )
            except VmError as error:
                lost = next(tenant for tenant in tenants if tenant.pid == error.pid)
                self.engine.served.drop(lost, error)

    def _book_departed(self) -> None:
        """Keep the totals of VMs that left since the last report, so that no sum falls."""
        now = {id(tenant): tenant for tenant in self.engine.tenants}
        for key, tenant in self._counted.items():
            if key not in now:
                self._past = self._past.plus(tenant)
        self._counted = now

    def _scan_totals(self, everyone: bool) -> ScanTotals:
        processes = process_pss_bytes()
        if self.guardian_pid is not None:
            processes += process_pss_bytes(self.guardian_pid)
        past = self._past if everyone else PastTotals()
        return ScanTotals(self.engine.full_scans, processes, past)

    def unmerge(self, vms: Sequence[str] | None, progress: ReportProgress) -> Unmerged:
        """Unmerge the VMs named, or all; stores that nothing maps any more are removed."""
        wanted = self.engine.tenants if vms is None else [self.tenant(vm) for vm in vms]
        each = list(dict.fromkeys(wanted))
        results = self._unmerge(each, lambda: progress(self.engine.idle_progress()))
        return Unmerged(
            vms=results,
            store_removed=self.engine.remove_unused_stores(),
        )

    def _note_dropped(self, tenant: Tenant, error: VmError) -> None:
        if not isinstance(error, RefusedError) and _has_other_memory(tenant):
            # Memory was unplugged before anybody had looked: it is the same VM.
            self._take_in_anew(tenant)
            if tenant.pid in self.pids():
                return
        self.dropped.append(self.roster.note_dropped(tenant, error))


def _claim(process: Process) -> None:
    """Keep other engines off a VM for as long as it is attached. Raises RefusedError."""
    try:
        process.claim()
    except HeldError as error:
        reason = held_by(error.pid, "works on it")
        raise RefusedError(process.vm, reason, pid=process.pid, key="other-engine") from None


def _is_merged(tenant: Tenant) -> bool:
    """Whether any page of a VM stands merged, as it was last read."""
    return tenant.scan.state is not None and bool((tenant.scan.state.slot != OWN).any())


def _has_other_memory(tenant: Tenant) -> bool:
    """Whether a VM that lives no longer has the memory it was attached with."""
    try:
        return tenant.process.alive() and tenant.changed() is not None
    except (VmError, OSError):  # or we have no descriptor left to look
        return False


def _locked(settings: Settings, wait_s: float) -> RuntimeDirectory:
    """The runtime directory's lock, waited for a while. Raises RuntimeBusyError."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return RuntimeDirectory(settings.runtime_dir)
        except RuntimeBusyError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOCK_POLL_S)
