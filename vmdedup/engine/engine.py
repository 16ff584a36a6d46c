"""The engine: one pass over all tenants, the stages in their order.

    look -> nominate -> arm, drain, publish, gate -> release -> account

Owns that order and nothing of what the stages do. Each pass starts from the
kernel's state, never from what the last pass believed. Promises that a VM that
fails or vanishes is dropped with its reason and all others go on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vmdedup.core.digest import zero_digest
from vmdedup.core.gate_size import USUAL
from vmdedup.core.news import News
from vmdedup.core.nominate import Nomination, VmNomination, VmView, nominate
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import KNOWN, PageColumns
from vmdedup.core.sharers import Sharers
from vmdedup.engine.progress import PassOutcome, PassProgress, ReportProgress
from vmdedup.engine.workers import Workers
from vmdedup.errors import (
    DrainPostponedError,
    InjectionError,
    MergeError,
    MonitorError,
    RefusedError,
    StoreBusyError,
    UsageError,
    VmError,
)
from vmdedup.linux import bounded
from vmdedup.linux.limits import max_map_count
from vmdedup.policy.domains import ZERO_ONLY
from vmdedup.policy.invalidation import Redo, differing, redone_by
from vmdedup.remap.borrowed_thread import ready_thread
from vmdedup.remap.context import Host, told_as_merge_error
from vmdedup.remap.crowding import is_crowded, keep_headroom
from vmdedup.remap.domain_store import (
    DomainStore,
    open_domain_store,
    remove_if_unused,
    remove_unused_stores,
    sweep,
)
from vmdedup.remap.merge import MergeOutcome
from vmdedup.remap.merge_vm import (
    Planned,
    finish_release,
    free_cache,
    merge_vm,
    note_kept,
    retry_to_split,
)
from vmdedup.remap.publish import Publisher
from vmdedup.remap.session import start_tracking, survey
from vmdedup.settings import Settings
from vmdedup.store.stable_store import Access
from vmdedup.vm.ram_files import RamFiles
from vmdedup.vm.tenant import Tenant

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """KSM's controls that bound what a pass may do; None is no limit."""

    max_kernel_pages: int | None = None
    """Store pages; at the limit no new one is made, existing ones gain sharers."""
    max_page_sharing: int | None = None
    """Sites of one store page; beyond them a copy of it is begun."""
    smart_scan: bool = True
    """Whether pages that stay unique are looked at ever more rarely."""
    merge_across_nodes: bool = True
    """Whether pages of different NUMA nodes may share a store page."""


NO_LIMITS = Limits(smart_scan=False)


@dataclass
class _Left:
    """What the last nomination of a trust domain left to the next one, and whose pages it saw."""

    tenants: list[Tenant]
    store: DomainStore
    news: News
    vms: list[PageColumns]
    sharers: Sharers | None
    """None without a limit of sites (max_page_sharing)."""
    since: float = field(default_factory=time.monotonic)
    """When all that could be merged was merged, or that was tried (time.monotonic)."""
    waits: bool = False
    """Whether something was found, but so little that it waits for more."""
    rests_until: float = 0.0
    """Until then only much is worth the time that nominating and merging takes."""

    def is_of(self, tenants: list[Tenant], store: DomainStore) -> bool:
        """Whether these are the tenants, with the rmaps and the store, that it speaks of."""
        vms = [tenant.columns for tenant in tenants]
        return self.store is store and self.tenants == tenants and self.vms == vms

    def is_due(self) -> bool:
        """Whether it is time to nominate and merge in any case."""
        return time.monotonic() - self.since >= _LONGEST_WAIT_S


@dataclass(frozen=True)
class _Plan:
    """What a trust domain is to merge, and who publishes it."""

    nomination: Nomination
    publisher: Publisher


_LONGEST_WAIT_S = 60.0
_WORTHWHILE_PAGES = 256
"""Fewer to merge in a VM wait for more, where nobody asked for a merge: arming and
draining one costs as much as merging some hundred pages."""
_MERGE_CPU_SHARE = 0.01
"""Of one CPU, for what guests go on writing and what then turns up again as equal."""
_FIRST_PASSES = 3
"""Of a VM, in which nothing waits: its pages are read, have held still, are merged."""
_MANY_PAGES = 4096
"""Are merged at once all the same."""


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
        self.limits = limits
        """What binds passes now; changed by `limit`."""
        self._settings = settings
        self._host = host
        self.workers = _workers(settings, host)
        """What does the same for several VMs at a time."""
        self.hurries: Callable[[], bool] = lambda: True
        """Whether somebody waits; asked before each piece of work. A scan at leisure takes no
        more than one processor, as ksmd does; what is left of it is hurried then."""
        self._dry = host is None
        self.tenants: list[Tenant] = []
        self.full_scans = 0
        self._everywhere = True
        self._looked_once: set[Tenant] = set()
        self._left: dict[str, _Left] = {}
        self._round: deque[tuple[Tenant, npt.NDArray[np.int64]]] | None = None
        self._dropped = dropped
        self._stores: dict[str, DomainStore] = {}
        self._max_map_count = max_map_count()

    def hurry_ends(self) -> None:
        """Nobody waits any more: let go of what was kept ready for the next stage or round."""
        for tenant in self.tenants:
            tenant.let_thread_go()

    def close(self) -> None:
        """Close stores and tenants; merges stay."""
        self.forget_stores()
        for tenant in self.tenants:
            tenant.close()
        self.tenants.clear()

    def add(self, tenant: Tenant) -> None:
        """Take a VM in: free what a killed predecessor had merged and not freed yet.

        Raises VmError; the tenant is closed then.
        """
        with ExitStack() as exits:
            exits.callback(tenant.close)
            state = tenant.refresh()
            if self._host is not None and tenant.refusal is None:
                self._open_store(tenant)
                finish_release(tenant, state)
                survey(self._host, tenant)
            else:
                note_kept(tenant)
            exits.pop_all()
        self.tenants.append(tenant)

    def _open_store(self, tenant: Tenant) -> None:
        """Raises RefusedError when another engine works with it."""
        try:
            self.store_of(_domain(tenant))
        except StoreBusyError as error:
            raise _store_refusal(tenant, error) from error

    def stands_elsewhere(self, tenant: Tenant) -> bool:
        """Whether a VM that may be merged stands on the store of another trust domain."""
        if tenant.state is None or tenant.refusal is not None:
            return False
        file = self.store_of(_domain(tenant)).file
        home = None if file is None else (file.device, file.inode)
        return any((store.device, store.inode) != home for store in tenant.state.stores)

    def limit(self, limits: Limits) -> None:
        """Take over changed controls. Raises StoreError."""
        self._redo(redone_by(differing(asdict(self.limits), asdict(limits))))
        self.limits = limits

    def use(self, settings: Settings, host: Host | None) -> None:
        """Take over changed settings from the next pass on."""
        self._redo(redone_by(differing(dict(self._settings), dict(settings))))
        self._settings = settings
        self._host = host
        self.workers = _workers(settings, host)

    def _redo(self, redo: Redo) -> None:
        """Forget what changed controls have made void. Raises StoreError."""
        if redo >= Redo.NOMINATION:
            self._left.clear()
        if redo >= Redo.DIGESTS:
            self._round = None
            for tenant in self.tenants:
                tenant.start_over()
            self.forget_stores()

    def let_go(self, tenant: Tenant) -> None:
        """Detach from a VM; its merges stay."""
        self.tenants.remove(tenant)
        tenant.close()

    def drop(self, tenant: Tenant, error: VmError) -> None:
        """Let go of a VM that can not be served any more.

        One that can only not be asked (libvirt restarts, its monitor does not answer), or not
        be drained as its storage hangs, stays as it is until that is over: the VM lives.
        """
        if _is_passing(tenant, error):
            tenant.trouble = error.reason
            return
        self.tenants.remove(tenant)
        self._dropped(tenant, error)
        tenant.close()

    def run_pass(self, progress: ReportProgress) -> PassOutcome:
        """One whole pass. Raises StoreError; VMs that fail are dropped."""
        self._everywhere = True
        self.keep_headroom()
        try:
            self._look(progress)
            return self._merge(progress)
        finally:
            self.hurry_ends()

    def keep_headroom(self) -> None:
        """Read vm.max_map_count anew; VMs that have too many mappings for it give some back."""
        limit, self._max_map_count = self._max_map_count, max_map_count()
        if limit != self._max_map_count:
            self._left.clear()  # other budgets: all candidates are considered anew
        if self._host is None:
            return
        for tenant in list(self.tenants):
            if tenant.monitor.outage is not None:
                continue
            tenant.crowded = None
            if not is_crowded(tenant, self._max_map_count, self._settings.vma_headroom):
                continue
            try:
                with told_as_merge_error(tenant, "unmerge"):
                    tenant.crowded = keep_headroom(self._host, tenant, self._max_map_count)
            except (MergeError, InjectionError) as error:
                tenant.crowded = error.reason  # nothing of the VM was lost
            except VmError as error:
                self.drop(tenant, error)

    def begin_round(self, *, everywhere: bool) -> None:
        """Find out what there is to look at; then `look_some` until `round_done`.

        A round is a pass in pieces, for a daemon that sleeps in between. Unless
        `everywhere`, memory that has long been known is asked about ever more rarely.
        """
        self._everywhere = everywhere
        self.keep_headroom()
        for tenant, unread in self._round or ():
            tenant.owe(unread)
        self._round = deque()
        pages = self._for_each(self._served(), self._pages_to_look)
        self._round.extend(pages.items())

    @property
    def round_begun(self) -> bool:
        """Whether a round is under way."""
        return self._round is not None

    @property
    def compares_next(self) -> bool:
        """Whether new VMs are merged after one look, so that what it saw must first age."""
        return bool(self._looked_once)

    @property
    def round_done(self) -> bool:
        """Whether everything of the round that was begun has been looked at."""
        return self._round is not None and not self._round

    def look_some(self, most_pages: int) -> int:
        """Look at up to `most_pages` of what is left in this round; returns how many."""
        most_of_one = most_pages
        if self.hurries():
            most_of_one = -(-most_pages // self.workers.most)  # so that there is work for all
        done = 0
        now: dict[Tenant, npt.NDArray[np.int64]] = {}
        later = []
        served = self._served()
        while self._round and done < most_pages:
            tenant, page = self._round.popleft()
            if tenant not in served:
                tenant.owe(page)
                continue
            count = min(most_of_one, most_pages - done)
            now[tenant] = page[:count]
            done += len(now[tenant])
            if len(page) > count:
                later.append((tenant, page[count:]))
        if self._round is not None:
            self._round.extendleft(reversed(later))
        self._for_each(list(now), lambda tenant: self._look_at(tenant, now[tenant]))
        return done

    def finish_round(self) -> PassOutcome:
        """Merge what the round has found. Raises StoreError; VMs that fail are dropped."""
        self._round = None
        return self._merge(None)

    def _merge(self, progress: ReportProgress | None) -> PassOutcome:
        merged = 0
        self._looked_once.clear()
        for domain, tenants in self._by_domain():
            if self._has_news(domain, tenants):
                cpu_began_s = time.process_time()
                merged += self._merge_domain(domain, tenants, progress)
                rest_s = (time.process_time() - cpu_began_s) / _MERGE_CPU_SHARE
                self._left[domain].rests_until = time.monotonic() + rest_s
        kept = [tenant for tenant in self._served() if len(tenant.kept.page)]
        self._for_each(kept, retry_to_split)
        self.full_scans += 1
        troubled = any(
            tenant.trouble is not None and tenant.hindrance is None for tenant in self._served()
        )
        troubled |= any(tenant.leaving for tenant in self.tenants)
        return PassOutcome(merged, troubled)

    def _has_news(self, domain: str, tenants: list[Tenant]) -> bool:
        """Whether a nomination could find more than the last one did.

        That takes a page which has come to hold still since, and whose content is that
        of a store page, of a zero page, or of another page that held still.
        """
        left = self._left.get(domain)
        store = self.store_of(domain)
        if left is None or not left.is_of(tenants, store) or _is_all_news(tenants):
            self._left.pop(domain, None)
            return True
        left.news.settle(
            [tenant.agenda.take_settled() for tenant in tenants],
            store.tree,
            zero_digest=zero_digest(store.seed),
            use_zero_pages=self._settings.use_zero_pages,
            share=domain != ZERO_ONLY,
        )
        if any(map(_presses, tenants)) or (self._everywhere and left.waits):
            return True
        if left.is_due():
            if left.news.waits or _must_consider_all(tenants):
                return True
            left.since = time.monotonic()
        if self._everywhere:
            return left.news.pages > 0
        if time.monotonic() < left.rests_until:
            return left.news.pages >= _MANY_PAGES
        return left.news.pages >= (_WORTHWHILE_PAGES if left.waits else 1)

    def nominations(self) -> list[tuple[str, list[Tenant], Nomination]]:
        """What a pass would do now, for a dry run; looks, but changes nothing in any VM."""
        self._look(None)
        nominations = [
            (domain, tenants, self._nominate(tenants, self._all(domain, tenants)))
            for domain, tenants in self._by_domain()
        ]
        self._left.clear()  # nothing of it gets merged now: a pass that follows finds it anew
        return nominations

    def _require_host(self) -> Host:
        if self._host is None:
            raise UsageError("this engine only looks; it may not change a VM")
        return self._host

    def unknown_pages(self) -> int:
        """Pages that were never looked at, an upper bound of those a round sees first."""
        return sum(
            int(np.count_nonzero(tenant.columns.flags & KNOWN == 0)) if tenant.passes == 0 else 0
            for tenant in self._served()
        )

    def covered_pages(self) -> int:
        """Pages that a round speaks of, read or spared."""
        return sum(tenant.covered_pages() for tenant in self._served())

    def store_of(self, domain: str) -> DomainStore:
        """The store of a trust domain, opened on first use."""
        if domain not in self._stores:
            directory = self._settings.store_dir
            self._stores[domain] = open_domain_store(
                directory, domain, dry=self._dry, by_node=not self.limits.merge_across_nodes
            )
        return self._stores[domain]

    def sweep(self) -> None:
        """Give back the store pages that nobody maps any more.

        The store of a domain without a VM is closed: another engine may have it.
        """
        used = {tenant.domain for tenant in self.tenants}
        for domain, store in list(self._stores.items()):
            if store.file is None or store.file.access is not Access.CHANGE:
                continue
            store.tree.remove(np.flatnonzero(~sweep(store.file)).astype(np.int32))
            if domain not in used:
                self._close_store(domain)

    def _close_store(self, domain: str) -> None:
        self._stores.pop(domain).close()
        self._left.pop(domain, None)

    def remove_unused_stores(self) -> bool:
        """Delete the stores that nothing maps any more; whether none is left."""
        for domain, store in list(self._stores.items()):
            if store.file is None:
                continue
            is_ours = store.file.access is Access.CHANGE
            if not is_ours or remove_if_unused(store.file):
                self._close_store(domain)
        return remove_unused_stores(self._settings.store_dir)

    def _served(self) -> list[Tenant]:
        """The tenants that may be merged now."""
        return [
            tenant
            for tenant in self.tenants
            if tenant.refusal is None
            and not (tenant.resting or tenant.leaving)
            and tenant.monitor.outage is None
            and not bounded.is_stuck(tenant.pid)
        ]

    def _by_domain(self) -> Iterator[tuple[str, list[Tenant]]]:
        """The served tenants of each domain; those not looked at yet wait for a round."""
        known = [tenant for tenant in self._served() if tenant.state is not None]
        served = self._with_store(known)
        for domain in sorted({_domain(tenant) for tenant in served}):
            yield domain, [tenant for tenant in served if tenant.domain == domain]

    def _look(self, progress: ReportProgress | None) -> None:
        """Look at every page once; tenants that are new are looked at twice.

        The second time is when their pages are compared, if they are merged next.
        """
        began_s = time.monotonic()
        served = self._served()
        total = sum(tenant.space.pages for tenant in served)
        looked = 0

        def tell(tenant: Tenant) -> None:
            nonlocal looked
            looked += tenant.space.pages
            self._tell(progress, "scan", tenant, looked, total)

        self._tell(progress, "scan", None, looked, total)
        seen = self._for_each(served, self._look_whole, tell)
        fresh = [tenant for tenant in seen if tenant.passes == 0]
        if fresh:
            since_first_s = time.monotonic() - began_s
            time.sleep(max(0.0, self._settings.first_look_ms / 1000 - since_first_s))
            again = [tenant for tenant in fresh if tenant not in self._looked_once]
            self._for_each(again, self._look_whole)

    def _for_each(
        self,
        tenants: list[Tenant],
        work: Callable[[Tenant], _Result],
        tell: Callable[[Tenant], None] = lambda _: None,
    ) -> dict[Tenant, _Result]:
        """What `work` gives for each; those that fail are dropped.

        Several at a time if it `hurries`. `tell` is told of each as it ends.
        """
        results: dict[Tenant, _Result] = {}

        def told(tenant: Tenant) -> _Result:
            with told_as_merge_error(tenant, "look"):
                return work(tenant)

        def done(tenant: Tenant, result: _Result | VmError) -> None:
            if isinstance(result, MergeError):
                tenant.trouble = result.reason  # nothing of the VM was lost
            elif isinstance(result, VmError):
                self.drop(tenant, result)
            else:
                results[tenant] = result
            tell(tenant)

        tenants = self._with_store(tenants)
        self.workers.each(tenants, told, done, hurries=self.hurries)
        return {tenant: results[tenant] for tenant in tenants if tenant in results}

    def _with_store(self, tenants: list[Tenant]) -> list[Tenant]:
        """Open their stores, here where nobody else does; those that another has are dropped."""
        found = []
        for tenant in tenants:
            try:
                self.store_of(_domain(tenant))
            except StoreBusyError as error:
                self.drop(tenant, _store_refusal(tenant, error))
            else:
                found.append(tenant)
        return found

    def _look_whole(self, tenant: Tenant) -> None:
        self._look_at(tenant, self._pages_to_look(tenant))

    def _pages_to_look(self, tenant: Tenant) -> npt.NDArray[np.int64]:
        """What of a VM should be read now. Raises VmError."""
        # The store may be another one by now, if nobody stood on it.
        tenant.use_seed(self.store_of(_domain(tenant)).seed)
        if self._host is not None and self._is_compared_next(tenant):
            # Nothing needs to be tracked before: its memory would be protected for that and
            # handed over to the merge, which walks its page tables four times.
            self._looked_once.add(tenant)
            ready_thread(self._host, tenant)
            tenant.freshen()
            return tenant.pages_to_look(smart=False, follow=False, everywhere=True)
        self._looked_once.discard(tenant)
        follow = tenant.follows()
        if self._host is not None:
            start_tracking(self._host, tenant, hurries=self._is_awaited())
        if not follow and not tenant.is_fresh():
            tenant.refresh()
            if self._host is not None:
                free_cache(tenant)
        return tenant.pages_to_look(
            smart=self.limits.smart_scan, follow=follow, everywhere=self._everywhere
        )

    def _is_awaited(self) -> bool:
        """Whether somebody waits for all to be looked at, merged, and looked at again."""
        return self._everywhere and self.hurries()

    def _is_compared_next(self, tenant: Tenant) -> bool:
        """Whether somebody waits for the first merge of a VM that nobody has looked at."""
        is_new = tenant.passes == 0 and tenant.tracker is None
        return is_new and self._is_awaited()

    def _look_at(self, tenant: Tenant, page: npt.NDArray[np.int64]) -> None:
        store = self.store_of(_domain(tenant))
        compared_next = tenant in self._looked_once
        tenant.look(page, store.seed, by_node=store.by_node, compared_next=compared_next)

    def _all(self, domain: str, tenants: list[Tenant]) -> _Left:
        """What begins a nomination of all candidates of these tenants."""
        vms = [tenant.columns for tenant in tenants]
        for tenant in tenants:
            tenant.agenda.forget_settled()
        sharers = None if self.limits.max_page_sharing is None else Sharers(vms)
        return _Left(tenants, self.store_of(domain), News(vms), vms, sharers)

    def _nominate(
        self, tenants: list[Tenant], left: _Left, *, only_news: bool = False
    ) -> Nomination:
        """Nominate among all candidates, or `only_news`: those that `left` knows to matter."""
        store = left.store
        among = left.news.take() if only_news else [None] * len(tenants)
        nomination = nominate(
            [
                VmView(
                    tenant.columns,
                    tenant.space.first_page,
                    self.vma_budget(tenant),
                    tenant.least_vmas,
                    page,
                )
                for tenant, page in zip(tenants, among, strict=True)
            ],
            store.tree,
            zero_digest=zero_digest(store.seed),
            use_zero_pages=self._settings.use_zero_pages,
            share=store.domain != ZERO_ONLY,
            next_slot=store.next_slot,
            most_new_pages=self._most_new_pages(),
            most_sharing=self.limits.max_page_sharing,
            sharers=left.sharers,
        )
        left.news.nominated(nomination)
        for tenant, planned in zip(tenants, nomination.vms, strict=True):
            self._note_plan(tenant, planned)
        return nomination

    def _most_new_pages(self) -> int | None:
        """Store pages that may still be made (max_kernel_pages), None without a limit."""
        if self.limits.max_kernel_pages is None:
            return None
        used = sum(len(store.tree) for store in self._stores.values())
        return max(0, self.limits.max_kernel_pages - used)

    def vma_budget(self, tenant: Tenant) -> int:
        """VMAs that the guest RAM of `tenant` may take."""
        assert tenant.state is not None
        return tenant.vma_budget(self._max_map_count, tenant.state)

    def idle_progress(self) -> PassProgress:
        """Where things stand between passes."""
        return PassProgress(self.full_scans, "idle", None, 0, 0, self.standing_pages())

    def forget_stores(self) -> None:
        """Close the stores, so that unused ones can be removed."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def standing_pages(self) -> int:
        """Pages that stand merged now, as far as is known."""
        return sum(int(np.count_nonzero(tenant.columns.shared())) for tenant in self.tenants)

    def _note_plan(self, tenant: Tenant, planned: VmNomination) -> None:
        assert tenant.state is not None
        tenant.deferred = planned.deferred
        tenant.needed_max_map_count = None
        if len(planned.deferred):
            # Mappings besides those counted from the rmap: QEMU's own, and pieces that
            # the kernel has not joined.
            others = tenant.state.process_vmas - planned.choice.vmas_before
            reserved = others + self._settings.vma_headroom
            tenant.needed_max_map_count = planned.choice.max_map_count_for_all(reserved)

    def _merge_domain(
        self, domain: str, tenants: list[Tenant], progress: ReportProgress | None
    ) -> int:
        """Nominate and merge. Whatever is not told of to the next nomination, as this one
        ended early, has that one consider all candidates.
        """
        before = self._left.pop(domain, None)
        takes_long = _is_all_news(tenants) and self._is_awaited()
        limited = self.limits.max_kernel_pages is not None or _must_consider_all(tenants)
        left = before if before is not None and not limited else self._all(domain, tenants)
        if before is None or not before.waits:
            left.since = time.monotonic()
        else:
            left.since = before.since
        only_news = left is before

        def plan() -> _Plan:
            nomination = self._nominate(tenants, left, only_news=only_news)
            beside = RamFiles(self._settings.store_dir, tuple(self.tenants))
            publisher = Publisher(left.store, tenants, nomination.new, left.news.published, beside)
            return _Plan(nomination, publisher)

        planned: Future[_Plan] = Future()
        if not takes_long:
            planned.set_result(plan())
            if self._postpones(left, planned.result().nomination):
                merged = 0
            else:
                merged = self._carry_out(left, planned, progress)
        else:
            # Long enough to have the first VMs ready meanwhile.
            left.waits = False
            with ThreadPoolExecutor(1, thread_name_prefix="vmdedup-nominate") as thread:
                planned = thread.submit(plan)
                merged = self._carry_out(left, planned, progress)
        left.news.merged(planned.result().nomination)
        self._left[domain] = left
        return merged

    def _carry_out(
        self, left: _Left, planned: Future[_Plan], progress: ReportProgress | None
    ) -> int:
        """Publish and merge; returns the pages merged."""
        store = left.store
        merged = 0
        hurries = self._is_awaited()
        number_of = {tenant: number for number, tenant in enumerate(left.tenants)}
        host = self._require_host()

        def planned_for(tenant: Tenant) -> Planned | None:
            plan, number = planned.result(), number_of[tenant]
            tenant.trouble = plan.publisher.shortage
            wanted = plan.nomination.vms[number].taken
            if plan.publisher.shortage is not None:
                # What is published already can still be shared; the rest waits.
                wanted = plan.publisher.existing(wanted, tenant.space.first_page)
            if not len(wanted):
                return None
            # A piece of a run is cut out of one mapping, which makes two more.
            most_pages = min(USUAL.pages, host.settings.gate_pages)
            pieces = int((-(-wanted.length // most_pages)).sum())
            most_vmas = plan.nomination.vms[number].choice.vmas_before + 2 * pieces
            in_any_order = most_vmas <= self.vma_budget(tenant)
            return Planned(wanted, plan.publisher.for_vm(number), in_any_order)

        def work(tenant: Tenant) -> MergeOutcome | None:
            if tenant.storage.is_put_off or (tenant.storage.rests and not hurries):
                return None  # its pages wait, see `News.merged`
            tenant.passes += 1
            tenant.missed_pages = 0
            if planned.done() and planned_for(tenant) is None:
                return None
            wanted = partial(planned_for, tenant)
            return merge_vm(host, tenant, store, wanted, hurries=hurries)

        def done(tenant: Tenant, outcome: MergeOutcome | VmError | None) -> None:
            nonlocal merged
            nomination, publisher = planned.result().nomination, planned.result().publisher
            wanted = nomination.vms[number_of[tenant]].taken
            _note_existing(left, publisher, tenant, wanted)
            if isinstance(outcome, InjectionError | MonitorError | MergeError):
                # Nothing of the VM was lost; the next pass tries again.
                tenant.trouble = outcome.reason
            elif isinstance(outcome, VmError):
                self.drop(tenant, outcome)
            elif outcome is not None:
                merged += outcome.merged_pages
                tenant.missed_pages = outcome.missed_pages
                tenant.trouble = outcome.failure or publisher.shortage
            total = sum(each.taken.pages for each in nomination.vms)
            self._tell(progress, "merge", tenant, merged, total)

        self._tell(progress, "merge", None, 0, 0)
        try:
            self.workers.each(left.tenants, work, done, hurries=self.hurries)
        finally:
            planned.result().publisher.close()
        return merged

    def _postpones(self, left: _Left, nomination: Nomination) -> bool:
        """Whether so little is to be merged that it waits for more, within a limit."""
        pages = [planned.taken.pages for planned in nomination.vms if len(planned.taken)]
        is_little = pages and max(pages) < _WORTHWHILE_PAGES
        presses = self._everywhere or any(map(_presses, left.tenants))
        left.waits = bool(is_little) and not presses and not left.is_due()
        return left.waits

    def _tell(
        self,
        progress: ReportProgress | None,
        stage: str,
        tenant: Tenant | None,
        done_pages: int,
        total_pages: int,
    ) -> None:
        if progress is None:
            return
        progress(
            PassProgress(
                passes=self.full_scans,
                stage=stage,
                vm=None if tenant is None else tenant.name,
                done_pages=done_pages,
                total_pages=total_pages,
                merged_pages=self.standing_pages(),
            )
        )


def _workers(settings: Settings, host: Host | None) -> Workers:
    return Workers(settings.workers, threading.Event() if host is None else host.stop)


def _note_existing(left: _Left, publisher: Publisher, tenant: Tenant, wanted: Runs) -> None:
    """Note which of these runs show store pages that exist, and which wait for room."""
    tenant.waiting_pages = 0
    if left.sharers is None and publisher.shortage is None:
        return
    exist = publisher.existing(wanted, tenant.space.first_page)
    if left.sharers is not None:
        left.sharers.add(exist.page_slots()[1])
    if publisher.shortage is not None and exist.pages < wanted.pages:
        tenant.waiting_pages = wanted.pages - exist.pages
        tenant.trouble = tenant.trouble or publisher.shortage


def _presses(tenant: Tenant) -> bool:
    """Whether the VM is new, or something that was planned for it is still to be done."""
    if tenant.storage.is_put_off:
        return False
    return tenant.passes < _FIRST_PASSES or tenant.trouble is not None or tenant.missed_pages > 0


def _is_all_news(tenants: list[Tenant]) -> bool:
    """Whether so much is new in all of them that telling it apart would only cost."""
    return all(tenant.agenda.many_settled for tenant in tenants)


def _is_passing(tenant: Tenant, error: VmError) -> bool:
    """Whether it only has to be waited for that the VM can be served again."""
    if isinstance(error, MonitorError):
        return error.unanswered or tenant.monitor.outage is not None
    return isinstance(error, DrainPostponedError)


def _must_consider_all(tenants: list[Tenant]) -> bool:
    """Whether pages wait for VMAs: which of them fit, any change of a mapping may tell."""
    return any(len(tenant.deferred) for tenant in tenants)


def _store_refusal(tenant: Tenant, error: StoreBusyError) -> RefusedError:
    """A VM is refused, and tried again later, while another engine has its domain's store."""
    return RefusedError(tenant.name, str(error), pid=tenant.pid, key="other-engine")


def _domain(tenant: Tenant) -> str:
    assert tenant.domain is not None, "only VMs without a refusal are merged"
    return tenant.domain
