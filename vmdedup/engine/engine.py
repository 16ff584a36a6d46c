"""The engine: one pass over all VMs, the stages in their order.

    look -> nominate -> arm, drain, publish, gate -> release -> account

Owns that order and nothing of what the stages do: `rounds` looks, `domain_merge` nominates
and merges. Each pass starts from the kernel's state, never from what the last pass believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np

from vmdedup.core.nominate import Nomination
from vmdedup.engine.domain_merge import DomainMerges
from vmdedup.engine.domain_stores import DomainStores, domain_of
from vmdedup.engine.progress import PassOutcome, PassProgress, ReportProgress
from vmdedup.engine.rounds import Rounds
from vmdedup.engine.served import Served, store_refusal
from vmdedup.engine.terms import NO_LIMITS, Limits, Terms
from vmdedup.errors import InjectionError, MergeError, StoreBusyError, VmError
from vmdedup.linux.limits import max_map_count
from vmdedup.policy.invalidation import Redo, differing, redone_by
from vmdedup.remap.context import Host, told_as_merge_error
from vmdedup.remap.crowding import is_crowded, keep_headroom
from vmdedup.remap.merge_vm import finish_release, note_kept, retry_to_split
from vmdedup.remap.session import survey
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import Tenant


class Engine:
    """Runs passes over `tenants`. `dropped` is told of each VM that had to go.

    Without `host` it is a dry run: it can look and plan, and changes nothing.
    """

    def __init__(
        self,
        settings: Settings,
        host: Host | None,
        dropped: Callable[[Tenant, VmError], None],
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._terms = Terms(settings, host, limits, max_map_count())
        self.stores = DomainStores(self._terms)
        self.served = Served(self._terms, self.stores, dropped)
        self.rounds = Rounds(self._terms, self.stores, self.served)
        self._merges = DomainMerges(self._terms, self.stores, self.served)
        self.full_scans = 0

    @property
    def tenants(self) -> list[Tenant]:
        """The attached VMs."""
        return self.served.tenants

    def hurry_ends(self) -> None:
        """Nobody waits any more: let go of what was kept ready for the next stage or round."""
        for tenant in self.tenants:
            tenant.let_thread_go()

    def close(self) -> None:
        """Close stores and VMs; merges stay."""
        self.stores.close()
        for tenant in self.tenants:
            tenant.close()
        self.tenants.clear()

    def add(self, tenant: Tenant) -> None:
        """Take a VM in: free what a killed predecessor had merged and not freed yet.

        Raises VmError; the tenant is closed then.
        """
        host = self._terms.host
        with ExitStack() as exits:
            exits.callback(tenant.close)
            state = tenant.scan.refresh()
            if host is not None and tenant.refusal is None:
                self._open_store(tenant)
                finish_release(tenant, state)
                survey(host, tenant)
            else:
                note_kept(tenant)
            exits.pop_all()
        self.tenants.append(tenant)

    def _open_store(self, tenant: Tenant) -> None:
        """Raises RefusedError when another engine works with it."""
        try:
            self.stores.of_vm(tenant)
        except StoreBusyError as error:
            raise store_refusal(tenant, error) from error

    def stands_elsewhere(self, tenant: Tenant) -> bool:
        """Whether a VM that may be merged stands on the store of another trust domain."""
        if tenant.scan.state is None or tenant.refusal is not None:
            return False
        file = self.stores.of_vm(tenant).file
        home = None if file is None else (file.device, file.inode)
        return any((store.device, store.inode) != home for store in tenant.scan.state.stores)

    def limit(self, limits: Limits) -> None:
        """Take over changed controls. Raises StoreError."""
        self._redo(redone_by(differing(asdict(self._terms.limits), asdict(limits))))
        self._terms.limits = limits

    def use(self, settings: Settings, host: Host | None) -> None:
        """Take over changed settings from the next pass on."""
        self._redo(redone_by(differing(dict(self._terms.settings), dict(settings))))
        self._terms.settings = settings
        self._terms.host = host
        self.served.use_workers()
        for tenant in self.tenants:
            tenant.use(settings)

    def _redo(self, redo: Redo) -> None:
        """Forget what changed controls have made void. Raises StoreError."""
        if redo >= Redo.NOMINATION:
            self._merges.start_over()
        if redo >= Redo.DIGESTS:
            self.rounds.end()
            for tenant in self.tenants:
                tenant.start_over()
            self.stores.close()

    def let_go(self, tenant: Tenant) -> None:
        """Detach from a VM; its merges stay."""
        self.tenants.remove(tenant)
        tenant.close()

    def run_pass(self, progress: ReportProgress) -> PassOutcome:
        """One whole pass. Raises StoreError; VMs that fail are dropped."""
        self._terms.everywhere = True
        self.keep_headroom()
        try:
            self.rounds.look_at_all(self._telling(progress, "scan"))
            return self._merge(progress)
        finally:
            self.hurry_ends()

    def begin_round(self, *, everywhere: bool) -> None:
        """Begin a pass in pieces, for a daemon that sleeps in between.

        Then `rounds.look_some` until `rounds.is_done`, then `finish_round`. Unless
        `everywhere`, memory that has long been known is asked about ever more rarely.
        """
        self._terms.everywhere = everywhere
        self.keep_headroom()
        self.rounds.begin()

    def finish_round(self) -> PassOutcome:
        """Merge what the round has found. Raises StoreError; VMs that fail are dropped."""
        self.rounds.end()
        return self._merge(None)

    def keep_headroom(self) -> None:
        """Read vm.max_map_count anew; VMs that have too many mappings for it give some back."""
        terms = self._terms
        limit, terms.max_map_count = terms.max_map_count, max_map_count()
        if limit != terms.max_map_count:
            self._merges.start_over()  # other budgets: all candidates are considered anew
        if terms.host is None:
            return
        for tenant in list(self.tenants):
            if tenant.monitor.outage is not None:
                continue
            tenant.record.crowded = None
            if not is_crowded(tenant, terms.max_map_count, terms.settings.vma_headroom):
                continue
            try:
                with told_as_merge_error(tenant, "unmerge"):
                    tenant.record.crowded = keep_headroom(terms.host, tenant, terms.max_map_count)
            except (MergeError, InjectionError) as error:
                tenant.record.crowded = error.reason  # nothing of the VM was lost
            except VmError as error:
                self.served.drop(tenant, error)

    def _merge(self, progress: ReportProgress | None) -> PassOutcome:
        merged = 0
        self.rounds.forget_first_looks()
        for domain, tenants in self._by_domain():
            merged += self._merges.merge(domain, tenants, self._telling(progress, "merge"))
        kept = [tenant for tenant in self.served.now() if len(tenant.record.kept.page)]
        self.served.each(kept, retry_to_split)
        self.full_scans += 1
        troubled = any(
            tenant.record.trouble is not None and tenant.hindrance is None
            for tenant in self.served.now()
        )
        troubled |= any(tenant.record.leaving for tenant in self.tenants)
        return PassOutcome(merged, troubled)

    def nominations(self) -> list[tuple[str, list[Tenant], Nomination]]:
        """What a pass would do now, for a dry run; looks, but changes nothing in any VM."""
        self.rounds.look_at_all(self._telling(None, "scan"))
        nominations = [
            (domain, tenants, self._merges.nominate_all(domain, tenants))
            for domain, tenants in self._by_domain()
        ]
        self._merges.start_over()  # nothing of it gets merged now: the next pass finds it again
        return nominations

    def _by_domain(self) -> Iterator[tuple[str, list[Tenant]]]:
        """The served VMs of each domain; those not looked at yet wait for a round."""
        known = [tenant for tenant in self.served.now() if tenant.scan.state is not None]
        served = self.served.with_store(known)
        for domain in sorted({domain_of(tenant) for tenant in served}):
            yield domain, [tenant for tenant in served if tenant.domain == domain]

    def sweep(self) -> None:
        """Give back the store pages that nobody maps any more."""
        self.stores.sweep({tenant.domain for tenant in self.tenants})
        self._merges.forget_closed()

    def remove_unused_stores(self) -> bool:
        """Delete the stores that nothing maps any more; whether none is left."""
        try:
            return self.stores.remove_unused()
        finally:
            self._merges.forget_closed()

    def vma_budget(self, tenant: Tenant) -> int:
        """VMAs that the guest RAM of a VM may take."""
        return self._merges.vma_budget(tenant)

    def standing_pages(self) -> int:
        """Pages that stand merged now, as far as is known."""
        return sum(int(np.count_nonzero(tenant.scan.columns.shared())) for tenant in self.tenants)

    def idle_progress(self) -> PassProgress:
        """Where things stand between passes."""
        return PassProgress(self.full_scans, "idle", None, 0, 0, self.standing_pages())

    def _telling(
        self, progress: ReportProgress | None, stage: str
    ) -> Callable[[Tenant | None, int, int], None]:
        """Reports the progress of a stage: of which VM, pages done and in total."""

        def tell(tenant: Tenant | None, done_pages: int, total_pages: int) -> None:
            if progress is not None:
                name = None if tenant is None else tenant.name
                standing = self.standing_pages()
                progress(
                    PassProgress(self.full_scans, stage, name, done_pages, total_pages, standing)
                )

        return tell
