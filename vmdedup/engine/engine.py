"""The engine: one pass over all VMs, the stages in their order.

    look -> nominate -> arm, drain, publish, gate -> release -> account

Owns only that order, not the stages themselves: `looks` looks, `domain_merge` nominates and
merges. Each pass starts from the kernel's state, never from the results of the last pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from vmdedup.core.huge_pages import most_to_give_back
from vmdedup.core.nominate import Nomination
from vmdedup.engine.cold_paging import ColdPaging
from vmdedup.engine.domain_merge import DomainMerges
from vmdedup.engine.domain_stores import DomainStores, domain_of
from vmdedup.engine.looks import Looks
from vmdedup.engine.progress import PassOutcome, PassProgress, ReportProgress
from vmdedup.engine.served import Served, store_refusal
from vmdedup.engine.sketches import Sketches
from vmdedup.engine.terms import NO_LIMITS, Limits, Terms
from vmdedup.errors import InjectionError, MergeError, StoreBusyError, VmError
from vmdedup.linux.limits import max_map_count
from vmdedup.linux.meminfo import memory_bytes
from vmdedup.policy.huge_pages import PLENTY, state_of_memory
from vmdedup.policy.invalidation import Redo, differing, redone_by
from vmdedup.remap.collapse import collapse_some
from vmdedup.remap.context import Host, told_as_merge_error
from vmdedup.remap.crowding import is_crowded, keep_headroom
from vmdedup.remap.merge_vm import finish_release, note_kept, retry_to_split
from vmdedup.remap.session import survey
from vmdedup.remap.unplugged import map_back_unplugged
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import AttachedVm


class Engine:
    """Runs passes over `vms`. `dropped` is called for each VM that had to be dropped.

    Without `host` it is a dry run: it can look and plan, and changes nothing.
    """

    def __init__(
        self,
        settings: Settings,
        host: Host | None,
        dropped: Callable[[AttachedVm, VmError], None],
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._terms = Terms(settings, host, limits, max_map_count())
        # Only who merges makes stores, and sketches.
        self.sketches = Sketches(None if host is None else settings.sketch_secret)
        self.stores = DomainStores(self._terms, self.sketches.seed_of)
        self.served = Served(self._terms, self.stores, dropped)
        self.looks = Looks(self._terms, self.stores, self.served)
        self._merges = DomainMerges(self._terms, self.stores, self.served)
        self.cold = ColdPaging(self._terms, self.served)
        self.full_scans = 0
        self._spares_huge = False

    @property
    def vms(self) -> list[AttachedVm]:
        """The attached VMs."""
        return self.served.vms

    def foreground_ends(self) -> None:
        """Release threads that were kept for the next stage or pass, as nobody waits any more."""
        for vm in self.vms:
            vm.let_thread_go()

    def close(self) -> None:
        """Close stores and VMs; merges stay."""
        self.stores.close()
        for vm in self.vms:
            vm.close()
        self.vms.clear()

    def add(self, vm: AttachedVm) -> None:
        """Add a VM, and free memory that a killed predecessor had merged but not freed.

        Raises VmError; the VM is closed then.
        """
        host = self._terms.host
        with ExitStack() as exits:
            exits.callback(vm.close)
            state = vm.scan.refresh()
            if host is not None and vm.refusal is None:
                self._open_store(vm)
                finish_release(vm, state)
                survey(host, vm)
            else:
                note_kept(vm)
            exits.pop_all()
        self.vms.append(vm)

    def _open_store(self, vm: AttachedVm) -> None:
        """Open the VM's store. Raises RefusedError if another engine works with it."""
        try:
            self.stores.of_vm(vm)
        except StoreBusyError as error:
            raise store_refusal(vm, error) from error

    def stands_elsewhere(self, vm: AttachedVm) -> bool:
        """Whether a VM that may be merged has pages on the store of another trust domain."""
        if vm.scan.state is None or vm.refusal is not None:
            return False
        file = self.stores.of_vm(vm).file
        home = None if file is None else (file.device, file.inode)
        return any((store.device, store.inode) != home for store in vm.scan.state.stores)

    def limit(self, limits: Limits) -> None:
        """Apply changed controls. Raises StoreError."""
        self._redo(redone_by(differing(asdict(self._terms.limits), asdict(limits))))
        self._terms.limits = limits

    def use(self, settings: Settings, host: Host | None) -> None:
        """Apply changed settings from the next pass on."""
        self._redo(redone_by(differing(_values(self._terms.settings), _values(settings))))
        self._terms.settings = settings
        self._terms.host = host
        self.served.use_workers()
        for vm in self.vms:
            vm.use(settings)

    def _redo(self, redo: Redo) -> None:
        """Forget the results that changed controls have made invalid. Raises StoreError."""
        if redo >= Redo.NOMINATION:
            self._merges.start_over()
        if redo >= Redo.DIGESTS:
            self.looks.end()
            for vm in self.vms:
                vm.start_over()
            self.stores.close()

    def let_go(self, vm: AttachedVm) -> None:
        """Detach from a VM; its merges stay."""
        self.vms.remove(vm)
        vm.close()

    def run_pass(self, progress: ReportProgress) -> PassOutcome:
        """Run one whole pass. Raises StoreError; VMs that fail are dropped."""
        self._terms.everywhere = True
        self._heed_memory()
        self.trim_mappings()
        try:
            self.looks.look_at_all(self._telling(progress, "scan"))
            return self._merge(progress)
        finally:
            self.foreground_ends()

    def begin_pass(self, *, everywhere: bool) -> None:
        """Begin a pass in pieces, for a daemon that sleeps in between.

        Then `looks.look_some` until `looks.is_done`, then `finish_pass`. Unless
        `everywhere`, memory that has long been known is looked at ever more rarely.
        """
        self._terms.everywhere = everywhere
        self._heed_memory()
        self.trim_mappings()
        self.looks.begin()

    def finish_pass(self) -> PassOutcome:
        """Merge what the pass has found. Raises StoreError; VMs that fail are dropped."""
        self.looks.end()
        return self._merge(None)

    def trim_mappings(self) -> None:
        """Map back what is merged in unplugged memory, and unmerge what exceeds vm.max_map_count.

        That limit is read again.
        """
        terms = self._terms
        limit, terms.max_map_count = terms.max_map_count, max_map_count()
        if limit != terms.max_map_count:
            self._merges.start_over()  # other budgets: all candidates are considered again
        if terms.host is None:
            return
        for vm in list(self.vms):
            if vm.monitor.outage is not None:
                continue
            vm.record.crowded = None
            try:
                with suppress(MergeError, InjectionError):  # the next pass tries again
                    map_back_unplugged(terms.host, vm)
                if not is_crowded(vm, terms.max_map_count, terms.settings.vma_headroom):
                    continue
                with told_as_merge_error(vm, "unmerge"):
                    vm.record.crowded = keep_headroom(terms.host, vm, terms.max_map_count)
            except (MergeError, InjectionError) as error:
                vm.record.crowded = error.reason  # the VM is intact
            except VmError as error:
                self.served.drop(vm, error)

    @property
    def huge_page_density(self) -> int:
        """Savable pages that a huge page must have to be split now; `0`: each is split."""
        return self._terms.huge_page_density

    def _heed_memory(self) -> None:
        """Have huge pages split, or kept, as the available memory demands."""
        terms = self._terms
        controls, density = terms.settings.controls, terms.huge_page_density
        if controls.huge_page_density:  # else it is `0` in each state
            terms.memory_state = state_of_memory(
                terms.memory_state,
                *memory_bytes(),
                controls.pressure_threshold_percent,
                controls.pressure_hysteresis_percent,
            )
        if terms.huge_page_density != density:
            self._merges.start_over()
        spares_huge = terms.huge_page_density > 0
        if spares_huge and not self._spares_huge:
            for vm in self.vms:
                vm.scan.stop_dirty_tracking()  # it protects huge pages, which would split them
        self._spares_huge = spares_huge

    def _merge(self, progress: ReportProgress | None) -> PassOutcome:
        merged = 0
        self.looks.forget_first_looks()
        for domain, vms in self._by_domain():
            merged += self._merges.merge(domain, vms, self._telling(progress, "merge"))
        kept = [vm for vm in self.served.now() if len(vm.record.kept.page)]
        self.served.each(kept, retry_to_split)
        self.full_scans += 1
        self.cold.pass_ended()
        troubled = any(
            vm.record.trouble is not None and vm.hindrance is None for vm in self.served.now()
        )
        troubled |= any(vm.record.leaving for vm in self.vms)
        awaits_storage = any(vm.storage.may_hang for vm in self.served.now())
        return PassOutcome(merged, troubled, awaits_storage)

    def nominations(self) -> list[tuple[str, list[AttachedVm], Nomination]]:
        """The plan of a pass now, for a dry run; looks, but changes nothing in any VM."""
        self._heed_memory()
        self.looks.look_at_all(self._telling(None, "scan"))
        nominations = [
            (domain, vms, self._merges.nominate_all(domain, vms))
            for domain, vms in self._by_domain()
        ]
        self._merges.start_over()  # nothing is merged now, so the next pass must find it again
        return nominations

    def _by_domain(self) -> Iterator[tuple[str, list[AttachedVm]]]:
        """The served VMs of each domain, without those that no pass has looked at yet."""
        known = [vm for vm in self.served.now() if vm.scan.state is not None]
        served = self.served.with_store(known)
        for domain in sorted({domain_of(vm) for vm in served}):
            yield domain, [vm for vm in served if vm.domain == domain]

    def collapse(self, most: int) -> int:
        """Make huge pages again of up to so many blocks of VMs; returns how many were made.

        Only while huge pages are kept: else the next write would split them again. Merged pages
        come home for it only while memory is plenty.
        """
        host, density = self._terms.host, self._terms.huge_page_density
        if host is None or not density:
            return 0
        most_savable = most_to_give_back(density) if self._terms.memory_state == PLENTY else 0
        done = 0
        for vm in list(self.vms):
            if vm.refusal is None and vm.monitor.outage is None and done < most:
                work = partial(
                    collapse_some, host=host, most=most - done, most_savable=most_savable
                )
                done += sum(self.served.each([vm], work).values())
        return done

    def sweep(self) -> None:
        """Free the store pages that nobody maps any more."""
        self.stores.sweep({vm.domain for vm in self.vms})
        self._merges.forget_closed()

    def remove_unused_stores(self) -> bool:
        """Delete the stores that nothing maps any more; returns whether none is left."""
        try:
            return self.stores.remove_unused()
        finally:
            self._merges.forget_closed()

    def vma_budget(self, vm: AttachedVm) -> int:
        """How many VMAs the guest RAM of a VM may take."""
        return self._merges.vma_budget(vm)

    def standing_pages(self) -> int:
        """Number of pages that are merged now, as far as known."""
        return sum(int(np.count_nonzero(vm.scan.columns.shared())) for vm in self.vms)

    def idle_progress(self) -> PassProgress:
        """The progress to report between passes."""
        return PassProgress(self.full_scans, "idle", None, 0, 0, self.standing_pages())

    def _telling(
        self, progress: ReportProgress | None, stage: str
    ) -> Callable[[AttachedVm | None, int, int], None]:
        """A function that reports a stage's progress: the VM, pages done and in total."""

        def tell(vm: AttachedVm | None, done_pages: int, total_pages: int) -> None:
            if progress is not None:
                name = None if vm is None else vm.name
                standing = self.standing_pages()
                progress(
                    PassProgress(self.full_scans, stage, name, done_pages, total_pages, standing)
                )

        return tell


def _values(settings: Settings) -> dict[str, Any]:
    """The settings by name, each control as one of them."""
    return {**dict(settings), **dict(settings.controls), "controls": None}
