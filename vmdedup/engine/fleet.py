"""The fleet: the VMs that are attached, and those that are not and why.

Owns attachments from the moment a monitor is open until the VM is detached:
the engine's VMs, the rows of `vms`, the reasons of the absent. Used by
`Deduplicator` for one run and by the daemon permanently. Promises that a VM that
fails, ends or turns hazardous never ends the others. Not thread-safe: it is used on the
thread that made it; `workers` does work on several VMs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from vmdedup.accounting.memory_places import Place, Tenant, memory_now, places_of
from vmdedup.accounting.sharing_report import PastTotals, ScanTotals, sharing_report
from vmdedup.attach.discover import Attachment, Unreachable
from vmdedup.attach.identity import VmPolicy
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.core.forecast import BreakRates
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
from vmdedup.models import (
    MemoryPlace,
    SharingReport,
    Unmerged,
    UnmergedVm,
    VmList,
    VmListing,
    VmReport,
)
from vmdedup.policy.domains import crowded_default_domains
from vmdedup.policy.hazards import must_unmerge, zero_only
from vmdedup.remap.context import Host
from vmdedup.remap.session import finish_predecessor, resume_given_up
from vmdedup.remap.unmerge_vm import unmerge_vm
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import AttachedVm

LOCK_WAIT_S = 2.0
"""How long a new engine waits for an ending one, in seconds."""
_LOCK_POLL_S = 0.05


class Fleet:
    """Attached VMs and their engine. `close` detaches all; merges stay.

    With `merging` it takes the runtime directory's lock and starts the guardian;
    `wait_s` is how long to wait for the lock; `stop`, once set, ends merging after
    the current gate. Raises RuntimeBusyError, UsageError.
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
        self._counted: dict[int, AttachedVm] = {}
        """VMs of the last report, by `id`: they may leave before the next report."""
        self._past = PastTotals()
        self._rates = BreakRates()
        self.places: list[Place] = []
        """Where merged pages of VMs may need memory, by the last report of all VMs."""
        self.paused: frozenset[int] = frozenset()
        """Processes of the VMs that are paused until there is memory."""
        self._owed = Owed()
        self.dropped: list[VmReport] = []
        """VMs that had to be dropped, for the caller to note and clear."""
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
        """Detach from all VMs; merges stay. Idempotent."""
        self._exits.close()

    @property
    def host(self) -> Host:
        """The state that all sessions share. Raises UsageError for a fleet that only reads."""
        if self._host is None:
            raise UsageError("attached for reading only: attach with merging=True")
        return self._host

    @property
    def guardian_pid(self) -> int | None:
        """The guardian's process id, `None` for a fleet that only reads."""
        return None if self._host is None else self._host.guardian.pid

    def use(self, settings: Settings) -> None:
        """Apply changed settings from the next pass on."""
        self.settings = settings
        if self._host is not None:
            self._host = Host(settings, self._host.guardian, self._host.runtime, self._host.stop)
        self.engine.use(settings, self._host)

    # --- who is in ------------------------------------------------------------------

    def take_in(
        self, attachment: Attachment, *, refuse: bool = True, by_hand: Collection[str] = ()
    ) -> VmListing:
        """Add an attachment to the VMs, or list why not. Takes ownership of it."""
        identity = attachment.identity
        try:
            turn_away = refuse and self._host is not None
            if self._host is not None:
                _claim(attachment.process)
                finish_predecessor(self._host, attachment)
            vm = AttachedVm(
                attachment, self.settings, refuse=refuse and not turn_away, by_hand=by_hand
            )
            if turn_away and vm.refusal is not None:
                self._turn_away(vm, vm.refusal)
            self.engine.add(vm)
            vm.record.resting = self._owed.is_asked(identity)
            if self._host is not None and self.engine.stands_elsewhere(vm):
                self._leave(vm)
            self._rank()
        except VmError as error:
            attachment.close()
            return self.roster.note_refused(identity, error, self.settings)
        return self.roster.note_attached(vm)

    def note_unreachable(self, unreachable: Unreachable) -> bool:
        """List a VM whose monitor could not be reached; returns whether that is news."""
        if unreachable.pid in self.pids() or Path(unreachable.name) in self.keys():
            return False
        return self.roster.note_unreachable(unreachable)

    def listed(self) -> VmList:
        """Every VM found so far, in the order of finding, with its current hindrance."""
        return self.roster.listed(self.engine.vms)

    def hindrances(self) -> dict[str, str]:
        """Why nothing can be merged now on the attached VMs of these names."""
        return {
            vm.name: reason
            for vm in self.engine.vms
            if (reason := vm.monitor.silence.reason or vm.storage.away) is not None
        }

    def merged_outside(self) -> list[VmListing]:
        """VMs that are not attached but still have merged pages."""
        return [row for _, row, _ in self.roster.standing_outside(self.pids())]

    def attached(self, vm: str) -> AttachedVm:
        """The attached VM of that name or pid. Raises AttachError, UsageError."""
        for each in self.engine.vms:
            if vm in (each.name, str(each.pid), each.identity.uuid):
                return each
        for absent in self.roster.absent:
            if vm in (absent.name, str(absent.pid), absent.uuid):
                raise AttachError(absent.name, absent.reason or "", pid=absent.pid)
        known = ", ".join(sorted(each.name for each in self.engine.vms)) or "none"
        raise UsageError(f"no VM named {vm!r} (attached: {known})")

    def pids(self) -> set[int]:
        """Processes of the attached VMs."""
        return {vm.pid for vm in self.engine.vms}

    def keys(self) -> set[Path | int]:
        """Processes and sockets of the attached VMs."""
        paths = (vm.identity.socket_path for vm in self.engine.vms)
        return self.pids() | {path for path in paths if path is not None}

    def let_go(self, vm: str) -> AttachedVm:
        """Detach from a VM; its merges stay. Returns the closed VM."""
        each = self.attached(vm)
        self.engine.let_go(each)
        self.roster.let_go(each)
        return each

    def drop_ended(self) -> None:
        """Drop the VMs whose process has ended."""
        for vm in list(self.engine.vms):
            if not vm.process.alive():
                error = VmGoneError(vm.name, "the VM's process ended", pid=vm.pid)
                self.engine.served.drop(vm, error)

    def forget_ended(self) -> bool:
        """Remove ended VMs from the list, attached or not; returns whether there were any."""
        self._owed.forget_ended()
        return self.roster.forget_ended(self.settings)

    def rest(self, pids: Collection[int]) -> None:
        """Merge nothing in these VMs until `wake`: their unmerge was requested.

        `settle` tries again to unmerge the pages that an unmerge leaves merged.
        """
        resting = [vm for vm in self.engine.vms if vm.pid in pids]
        self._owed.ask(resting)
        for vm in resting:
            vm.record.resting = True
            vm.record.trouble = None  # its merge is not to be tried again
            vm.scan.stop_dirty_tracking()

    def rest_when_found(self, pid: int) -> None:
        """Unmerge a VM that cannot be attached now, and merge nothing in it, once it is."""
        self._owed.ask_for(pid)

    def wake(self, pids: Collection[int]) -> None:
        """Let these VMs be merged again."""
        woken = [vm for vm in self.engine.vms if vm.pid in pids]
        self._owed.revoke(woken)
        for vm in woken:
            vm.record.resting = self._owed.is_asked(vm.identity)

    def rest_all(self) -> None:
        """Merge nothing in any VM until `wake_all`, nor in VMs attached later."""
        self._owed.everything = True
        self.rest(self.pids())

    def wake_all(self) -> None:
        """Let all VMs be merged again."""
        self._owed.revoke_all()
        self.wake(self.pids())
        for vm in list(self.engine.vms):
            if vm.record.leaving and vm.refusal is not None:
                # It was attached only to be unmerged. Attached again, it is unmerged again if
                # its hazard or its domain requires that.
                self.engine.vms.remove(vm)
                self._take_in_anew(vm)

    @property
    def left_to_unmerge_pages(self) -> int:
        """Number of pages of all attached VMs that are still to be unmerged."""
        return sum(vm.left_to_unmerge_pages for vm in self.engine.vms)

    def falls_short(self, only: Collection[int] | None = None) -> bool:
        """Whether VMs wait for room, have a domain to leave, or failed to merge by an error.

        `only`: counts the VMs with these pids. An error of a VM that does not answer now is
        ignored.
        """
        return any(
            vm.record.leaving
            or vm.record.waiting_pages
            or (vm.record.trouble is not None and vm.hindrance is None)
            for vm in self.engine.vms
            if only is None or vm.pid in only
        )

    def settle(self) -> list[UnmergedVm]:
        """Try again to unmerge the VMs whose next attempt is due; returns the results."""
        due = self._owed.due(self.engine.vms)
        if not due:
            return []
        return self._unmerge(due)

    def _turn_away(self, vm: AttachedVm, refusal: str) -> None:
        """Refuse a VM, and unmerge it if its pages must not stay merged.

        Returns if that left pages merged: the refused VM stays attached until these are
        unmerged. Raises RefusedError, or another VmError if it cannot be served at all.
        """
        try:
            if zero_only(vm.findings):
                vm.scan.refresh()
            of_hazard = must_unmerge(vm.findings, on_store=vm.is_on_store)
            of_domain = vm.refusal_key == "domain"
            if of_hazard or of_domain or self._owed.is_asked(vm.identity):
                self._take_back(vm)
                if vm.record.left_reason is not None:
                    refusal = f"{refusal}; {vm.record.left_reason}"
            if not vm.left_to_unmerge_pages:
                raise RefusedError(vm.name, refusal, pid=vm.pid, key=vm.refusal_key)
        except BaseException:
            vm.close()
            raise
        vm.refusal = refusal

    def _take_back(self, vm: AttachedVm) -> None:
        """Unmerge a VM that is not attached yet, as far as possible."""
        vm.scan.refresh()
        if not _is_merged(vm):
            return
        vm.record.leaving = True
        try:
            vm.record.left_reason = unmerge_vm(self.host, vm).reason
        except (MergeError, InjectionError) as error:  # the VM is intact
            vm.scan.refresh()
            vm.record.left_reason = error.reason

    def _leave(self, vm: AttachedVm) -> None:
        """Unmerge a VM whose trust domain has changed; `settle` unmerges the rest.

        Raises VmGoneError if the VM was dropped meanwhile.
        """
        vm.record.leaving = True
        self._unmerge([vm])
        if vm.pid not in self.pids():
            raise VmGoneError(vm.name, "lost while it left its domain", pid=vm.pid)

    def _unmerge(
        self, vms: Sequence[AttachedVm], told: Callable[[], None] = lambda: None
    ) -> list[UnmergedVm]:
        """Unmerge these VMs; a leaving VM that is done is served again, or refused."""
        results = self._owed.unmerge(self.engine, self.host, vms, told)
        for vm in vms:
            if vm.record.leaving and not vm.left_to_unmerge_pages:
                vm.record.leaving = False
                if vm.refusal is not None and vm in self.engine.vms:
                    self.engine.vms.remove(vm)
                    self._take_in_anew(vm)
        return list(results.values())

    def stop_dirty_tracking(self) -> None:
        """Close the userfaultfds of all VMs until the next look, so that QEMU can use its own."""
        for vm in self.engine.vms:
            vm.scan.stop_dirty_tracking()

    def follow_changes(self, *, at_leisure: bool = False) -> list[tuple[str, str]]:
        """Reexamine VMs in which a cheap check sees changes; returns (name, change) of each.

        `at_leisure`: an even cheaper check, see `Watch.has_news`.
        """
        disturbed: set[AttachedVm] = set()

        def done(vm: AttachedVm, found: bool | VmError) -> None:
            if found is not False:
                disturbed.add(vm)

        reachable = self.reachable()
        for vm in reachable:
            vm.storage.try_again()
            if self._host is not None:
                with suppress(VmError):  # tried again at the next check
                    resume_given_up(self._host, vm)
        self.engine.served.workers.each(
            reachable,
            lambda vm: vm.disturbed(at_leisure=at_leisure),
            done,
            is_foreground=self.engine.served.is_foreground,
        )
        reasons = {vm: self.reexamine(vm) for vm in reachable if vm in disturbed}
        return [(vm.name, reason) for vm, reason in reasons.items() if reason is not None]

    def reachable(self) -> list[AttachedVm]:
        """The attached VMs whose monitors answer now."""
        return [vm for vm in self.engine.vms if vm.monitor.outage is None]

    def use_policy(self, uuid: str, policy: VmPolicy) -> list[str]:
        """Apply a VM's new policy; returns the names of VMs whose trust domain changed."""
        for vm in self.engine.vms:
            if vm.identity.uuid == uuid:
                vm.use_policy(policy)
        self._rank()
        return self.follow_domains()

    def _rank(self) -> None:
        """Sort the VMs so that a higher priority is looked at and merged first."""
        self.engine.vms.sort(key=lambda vm: -vm.identity.policy.priority)

    def crowded(self) -> dict[str, str]:
        """A warning for each default trust domain that contains several libvirt domains."""
        vms = [vm.identity for vm in self.engine.vms if vm.identity.uuid]
        return {
            domain: f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}: in one trust domain"
            f" ({domain}) only because libvirt runs them with one uid; say which VMs may share"
            " ([[domains]], or trust-domain in their metadata)"
            for domain, names in crowded_default_domains(vms, self.settings.domains).items()
        }

    def reexamine(self, vm: AttachedVm) -> str | None:
        """Examine a VM's memory and devices again; returns the change in one line, if any.

        If memory was plugged in or out, the VM is attached again as a new one. If a hazard
        appeared, it is refused, and unmerged first if the hazard requires it.
        """
        try:
            reason = vm.changed()
            if reason is not None:
                self.renew(vm, vm.by_hand)
        except VmError as error:
            if vm not in self.engine.vms:
                return reason
            self.engine.served.drop(vm, error)
            return None
        return reason

    def follow_domains(self) -> list[str]:
        """Attach VMs again whose trust domain has changed; returns their names.

        Each is unmerged first: it may share no page with VMs of its old domain. Pages that
        cannot be unmerged now are tried again by `settle`; until then the VM shares nothing new.
        """
        moved = []
        for vm in list(self.engine.vms):
            try:
                domain: str | None = vm.domain_by(self.settings.domains)
            except RefusedError:
                domain = None
            if domain == vm.domain:
                continue
            moved.append(vm.name)
            try:
                renewed = self.renew(vm, vm.by_hand)
                if not renewed.record.leaving and _is_merged(renewed):
                    self._leave(renewed)  # its zero pages map a file of the old domain
            except VmError as error:
                if vm in self.engine.vms:
                    self.engine.served.drop(vm, error)
        return moved

    def renew(self, vm: AttachedVm, by_hand: Collection[str]) -> AttachedVm:
        """Attach a VM again and register backends `by_hand`. Raises AttachError if refused."""
        self.engine.vms.remove(vm)
        row = self._take_in_anew(vm, by_hand)
        return self.attached(str(row.pid))

    def _take_in_anew(self, vm: AttachedVm, by_hand: Collection[str] | None = None) -> VmListing:
        """Attach a detached VM again, if permitted, with its previous registration."""
        by_hand = vm.by_hand if by_hand is None else by_hand
        row = self.take_in(vm.give_up(), by_hand=by_hand)
        for renewed in self.engine.vms:
            if renewed.pid == vm.pid:
                renewed.registration = vm.registration.following(renewed.registrable())
                renewed.record.resting = vm.record.resting
                renewed.record.left_reason = renewed.record.left_reason or vm.record.left_reason
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

        Without `refresh` it uses the state of the last pass, if that is reliable.
        """
        self._book_departed()
        scan = None if self._host is None else self._scan_totals(only is None)
        while True:
            vms = [t for t in self.engine.vms if only is None or t.pid in only]
            absent = [a for a in self.roster.absent if only is None or a.pid in only]
            try:
                found = sharing_report(vms, absent, converged=converged, scan=scan, refresh=refresh)
            except VmError as error:
                lost = next(vm for vm in vms if vm.pid == error.pid)
                self.engine.served.drop(lost, error)
                continue
            if only is not None:
                return found
            return found.model_copy(update={"memory": self._memory(found.vms)})

    def _tenants(self, reports: Sequence[VmReport]) -> list[Tenant]:
        """The VMs whose merged pages may need memory: those reported, and others known."""
        attached = {vm.pid: vm.totals for vm in self.engine.vms}
        inside = [
            Tenant(
                vm.name,
                vm.pid,
                vm.merged_pages + vm.zero_pages,
                attached[vm.pid].merges_from_now(),
            )
            for vm in reports
            if vm.pid is not None and vm.pid in attached
        ]
        standing = self.roster.standing_outside(attached.keys())
        return inside + [Tenant(row.name, pid, pages) for pid, row, pages in standing]

    def _memory(self, reports: Sequence[VmReport]) -> list[MemoryPlace]:
        known = {vm.pid: vm.cow_breaks for vm in reports}
        breaks = {pid: count for pid, count in known.items() if pid and count is not None}
        self._rates.note(time.monotonic(), breaks)
        self.places = places_of(self._tenants(reports))
        return memory_now(self.places, self._rates, self.settings.controls, self.paused)

    def _book_departed(self) -> None:
        """Keep the totals of VMs that left since the last report, so that no sum decreases."""
        now = {id(vm): vm for vm in self.engine.vms}
        for key, vm in self._counted.items():
            if key not in now:
                self._past = self._past.plus(vm)
        self._counted = now

    def _scan_totals(self, everyone: bool) -> ScanTotals:
        processes = process_pss_bytes()
        if self.guardian_pid is not None:
            processes += process_pss_bytes(self.guardian_pid)
        past = self._past if everyone else PastTotals()
        return ScanTotals(self.engine.full_scans, processes, past)

    def unmerge(self, vms: Sequence[str] | None, progress: ReportProgress) -> Unmerged:
        """Unmerge the named VMs, or all; remove stores that nothing maps any more."""
        wanted = self.engine.vms if vms is None else [self.attached(vm) for vm in vms]
        each = list(dict.fromkeys(wanted))
        results = self._unmerge(each, lambda: progress(self.engine.idle_progress()))
        return Unmerged(
            vms=results,
            store_removed=self.engine.remove_unused_stores(),
        )

    def _note_dropped(self, vm: AttachedVm, error: VmError) -> None:
        if not isinstance(error, RefusedError) and _has_other_memory(vm):
            # Memory was unplugged before any check of the VM: it is the same VM.
            self._take_in_anew(vm)
            if vm.pid in self.pids():
                return
        self.dropped.append(self.roster.note_dropped(vm, error))


def _claim(process: Process) -> None:
    """Keep other engines off a VM while it is attached. Raises RefusedError."""
    try:
        process.claim()
    except HeldError as error:
        reason = held_by(error.pid, "works on it")
        raise RefusedError(process.vm, reason, pid=process.pid, key="other-engine") from None


def _is_merged(vm: AttachedVm) -> bool:
    """Whether any page of a VM is merged, as last read."""
    return vm.scan.state is not None and bool((vm.scan.state.slot != OWN).any())


def _has_other_memory(vm: AttachedVm) -> bool:
    """Whether a living VM has other memory than when it was attached."""
    try:
        return vm.process.alive() and vm.changed() is not None
    except (VmError, OSError):  # or we have no descriptor left to look
        return False


def _locked(settings: Settings, wait_s: float) -> RuntimeDirectory:
    """Take the runtime directory's lock, within `wait_s`. Raises RuntimeBusyError."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return RuntimeDirectory(settings.runtime_dir)
        except RuntimeBusyError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOCK_POLL_S)
