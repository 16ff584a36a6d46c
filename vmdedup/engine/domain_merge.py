"""Merging the VMs of one trust domain: nominate, publish, remap, and keep the rest for later.

Owns the state that each nomination leaves to the next one, so that only pages that can matter
are considered. Owns the decision when a few pages wait for more. Promises that a failing VM
does not end another VM's merge, and that pages that could not be merged are nominated again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from vmdedup.core.digest import zero_digest
from vmdedup.core.gate_size import USUAL
from vmdedup.core.huge_pages import HugePages
from vmdedup.core.news import News
from vmdedup.core.nominate import Nomination, VmNomination, VmView, nominate
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import PageColumns
from vmdedup.core.sharers import Sharers
from vmdedup.engine.domain_stores import DomainStores
from vmdedup.engine.served import Served
from vmdedup.engine.terms import Terms
from vmdedup.errors import InjectionError, MergeError, MonitorError, VmError
from vmdedup.policy.domains import ZERO_ONLY
from vmdedup.remap.context import Host
from vmdedup.remap.domain_store import DomainStore
from vmdedup.remap.merge import MergeOutcome
from vmdedup.remap.merge_vm import Planned, merge_vm, ready_vm
from vmdedup.remap.publish import Publisher
from vmdedup.vm.attached_vm import AttachedVm
from vmdedup.vm.ram_files import RamFiles

Merged = Callable[[AttachedVm | None, int, int], None]
"""Called for each VM that is done, with the pages merged by then, and those planned."""

_LONGEST_WAIT_S = 60.0
_WORTHWHILE_PAGES = 256
"""Fewer mergeable pages in a VM wait for more, unless somebody asked for a merge: arming and
draining a VM costs as much as merging some hundred pages."""
_MERGE_CPU_SHARE = 0.01
"""Largest share of one CPU spent on merging rewritten pages again."""
_FIRST_PASSES = 3
"""Passes of a new VM in which no page waits: one reads its pages, one sees candidates, one
merges."""
_MANY_PAGES = 4096
"""So many new candidates are merged immediately, even while a domain rests."""


@dataclass
class _Left:
    """State that a trust domain's nomination leaves to the next one, and the VMs it saw."""

    attached: list[AttachedVm]
    store: DomainStore
    news: News
    columns: list[PageColumns]
    sharers: Sharers | None
    """Sharers of each store page, `None` without a limit of sites (max_page_sharing)."""
    since: float = field(default_factory=time.monotonic)
    """When everything mergeable was last merged, or tried (time.monotonic)."""
    waits: bool = False
    """Whether mergeable pages were found, but so few that they wait for more."""
    rests_until: float = 0.0
    """Until this time (time.monotonic) only many new candidates justify another merge."""

    def is_of(self, vms: list[AttachedVm], store: DomainStore) -> bool:
        """Whether it was made for these VMs, with their current rmaps, and this store."""
        columns = [vm.scan.columns for vm in vms]
        return self.store is store and self.attached == vms and self.columns == columns

    def is_due(self) -> bool:
        """Whether the longest wait is over, so that even a few pages are merged."""
        return time.monotonic() - self.since >= _LONGEST_WAIT_S


@dataclass(frozen=True)
class _Plan:
    """A trust domain's nomination, and the publisher of its contents."""

    nomination: Nomination
    publisher: Publisher


class DomainMerges:
    """Merges trust domains, one after the other."""

    def __init__(self, terms: Terms, stores: DomainStores, served: Served) -> None:
        self._terms = terms
        self._stores = stores
        self._served = served
        self._left: dict[str, _Left] = {}

    def start_over(self) -> None:
        """Make the next nomination of each domain consider all candidates."""
        self._left.clear()

    def forget_closed(self) -> None:
        """Forget the state of domains whose store was closed."""
        for domain in [domain for domain in self._left if not self._stores.is_open(domain)]:
            del self._left[domain]

    def merge(self, domain: str, vms: list[AttachedVm], merged: Merged) -> int:
        """Merge these VMs of a domain; returns the pages merged. Raises StoreError."""
        if not self._has_news(domain, vms):
            return 0
        cpu_began_s = time.process_time()
        pages = self._merge(domain, vms, merged)
        rest_s = (time.process_time() - cpu_began_s) / _MERGE_CPU_SHARE
        self._left[domain].rests_until = time.monotonic() + rest_s
        return pages

    def nominate_all(self, domain: str, vms: list[AttachedVm]) -> Nomination:
        """The nomination of a merge of these VMs now; changes nothing in any VM."""
        return self._nominate(vms, self._all(domain, vms))

    def _has_news(self, domain: str, vms: list[AttachedVm]) -> bool:
        """Whether a nomination could find more than the last one did.

        That takes a page that has become a candidate since. Its content must be that of a
        store page, of a zero page, or of another candidate.
        """
        left = self._left.get(domain)
        store = self._stores.of(domain)
        if left is None or not left.is_of(vms, store) or _is_all_news(vms):
            self._left.pop(domain, None)
            return True
        left.news.settle(
            [vm.scan.agenda.take_settled() for vm in vms],
            store.tree,
            zero_digest=zero_digest(store.seed),
            use_zero_pages=bool(self._terms.settings.controls.use_zero_pages),
            share=domain != ZERO_ONLY,
        )
        if any(map(_presses, vms)) or (self._terms.everywhere and left.waits):
            return True
        if left.is_due():
            if left.news.waits or _must_consider_all(vms):
                return True
            left.since = time.monotonic()
        if self._terms.everywhere:
            return left.news.pages > 0
        if time.monotonic() < left.rests_until:
            return left.news.pages >= _MANY_PAGES
        return left.news.pages >= (_WORTHWHILE_PAGES if left.waits else 1)

    def _merge(self, domain: str, vms: list[AttachedVm], merged: Merged) -> int:
        """Nominate and merge; returns the pages merged.

        If this ends early, it leaves no state, and so the next nomination considers all
        candidates.
        """
        before = self._left.pop(domain, None)
        takes_long = _is_all_news(vms) and self._served.is_awaited
        limits = self._terms.limits
        limited = limits.max_kernel_pages is not None or _must_consider_all(vms)
        left = before if before is not None and not limited else self._all(domain, vms)
        if before is None or not before.waits:
            left.since = time.monotonic()
        else:
            left.since = before.since
        only_news = left is before

        def plan() -> _Plan:
            nomination = self._nominate(vms, left, only_news=only_news)
            beside = RamFiles(self._terms.settings.store_dir, tuple(self._served.vms))
            publisher = Publisher(left.store, vms, nomination.new, left.news.published, beside)
            return _Plan(nomination, publisher)

        planned: Future[_Plan] = Future()
        if not takes_long:
            planned.set_result(plan())
            if self._postpones(left, planned.result().nomination):
                pages = 0
            else:
                pages = self._carry_out(left, planned, merged)
        else:
            # It takes long enough to prepare the first VMs meanwhile.
            left.waits = False
            with ThreadPoolExecutor(1, thread_name_prefix="vmdedup-nominate") as thread:
                planned = thread.submit(plan)
                pages = self._carry_out(left, planned, merged)
        left.news.merged(planned.result().nomination)
        self._left[domain] = left
        return pages

    def _carry_out(self, left: _Left, planned: Future[_Plan], merged: Merged) -> int:
        """Publish and merge; returns the pages merged."""
        pages = 0
        foreground = self._served.is_awaited
        number_of = {vm: number for number, vm in enumerate(left.attached)}
        host = self._terms.require_host()

        def work(vm: AttachedVm) -> MergeOutcome | None:
            if vm.storage.is_put_off or (vm.storage.rests and not foreground):
                return None  # its pages wait, see `News.merged`
            vm.record.passes += 1
            vm.record.missed_pages = 0
            number = number_of[vm]
            if planned.done() and self._plan_of(vm, number, planned.result(), host) is None:
                return None
            with ready_vm(host, vm, left.store, foreground=foreground) as ready:
                plan = self._plan_of(vm, number, planned.result(), host)
                if plan is not None:
                    merge_vm(ready, plan)
            return ready.outcome

        def done(vm: AttachedVm, outcome: MergeOutcome | VmError | None) -> None:
            nonlocal pages
            nomination, publisher = planned.result().nomination, planned.result().publisher
            wanted = nomination.vms[number_of[vm]].taken
            _note_existing(left, publisher, vm, wanted)
            if isinstance(outcome, InjectionError | MonitorError | MergeError):
                # The VM is intact; the next pass tries again.
                vm.record.trouble = outcome.reason
            elif isinstance(outcome, VmError):
                self._served.drop(vm, outcome)
            elif outcome is not None:
                pages += outcome.merged_pages
                vm.record.missed_pages = outcome.missed_pages
                vm.record.trouble = outcome.failure or publisher.shortage
            merged(vm, pages, sum(each.taken.pages for each in nomination.vms))

        merged(None, 0, 0)
        try:
            self._served.workers.each(
                left.attached, work, done, is_foreground=self._served.is_foreground
            )
        finally:
            planned.result().publisher.close()
        return pages

    def _plan_of(self, vm: AttachedVm, number: int, plan: _Plan, host: Host) -> Planned | None:
        """The part of a domain's plan for its VM `number`; `None` if that is empty."""
        vm.record.trouble = plan.publisher.shortage
        wanted = plan.nomination.vms[number].taken
        if plan.publisher.shortage is not None:
            # Existing store pages can still be shared; the rest waits.
            wanted = plan.publisher.existing(wanted, vm.space.first_page)
        if not len(wanted):
            return None
        # A piece of a run is cut out of one mapping, which makes two more.
        most_pages = min(USUAL.pages, host.settings.gate_pages)
        pieces = int((-(-wanted.length // most_pages)).sum())
        most_vmas = plan.nomination.vms[number].choice.vmas_before + 2 * pieces
        in_any_order = most_vmas <= self.vma_budget(vm)
        return Planned(wanted, plan.publisher.for_vm(number), in_any_order)

    def _all(self, domain: str, vms: list[AttachedVm]) -> _Left:
        """The initial state for a nomination of all candidates of these VMs."""
        columns = [vm.scan.columns for vm in vms]
        for vm in vms:
            vm.scan.agenda.forget_settled()
        sharers = None if self._terms.limits.max_page_sharing is None else Sharers(columns)
        return _Left(vms, self._stores.of(domain), News(columns), columns, sharers)

    def _nominate(
        self, vms: list[AttachedVm], left: _Left, *, only_news: bool = False
    ) -> Nomination:
        """Nominate among all candidates, or `only_news`: those that `left` knows to matter."""
        store = left.store
        among = left.news.take() if only_news else [None] * len(vms)
        nomination = nominate(
            [
                VmView(
                    vm.scan.columns,
                    vm.space.first_page,
                    self.vma_budget(vm),
                    vm.scan.least_vmas,
                    page,
                    self._huge_pages(vm),
                )
                for vm, page in zip(vms, among, strict=True)
            ],
            store.tree,
            zero_digest=zero_digest(store.seed),
            use_zero_pages=bool(self._terms.settings.controls.use_zero_pages),
            share=store.domain != ZERO_ONLY,
            next_slot=store.next_slot,
            most_new_pages=self._most_new_pages(),
            most_sharing=self._terms.limits.max_page_sharing,
            sharers=left.sharers,
        )
        left.news.nominated(nomination)
        for vm, planned in zip(vms, nomination.vms, strict=True):
            self._note_plan(vm, planned)
        return nomination

    def _huge_pages(self, vm: AttachedVm) -> HugePages | None:
        """The huge pages of a VM, of which not all are split; `None` if all are, or not known."""
        density = self._terms.huge_page_density
        is_huge = vm.scan.huge_blocks() if density else None
        return None if is_huge is None else HugePages(vm.scan.blocks, is_huge, density)

    def _most_new_pages(self) -> int | None:
        """How many store pages may still be made (max_kernel_pages), `None` without a limit."""
        most = self._terms.limits.max_kernel_pages
        return None if most is None else max(0, most - self._stores.published_pages())

    def vma_budget(self, vm: AttachedVm) -> int:
        """How many VMAs the guest RAM of a VM may take."""
        assert vm.scan.state is not None
        return vm.vma_budget(self._terms.max_map_count, vm.scan.state)

    def _note_plan(self, vm: AttachedVm, planned: VmNomination) -> None:
        assert vm.scan.state is not None
        vm.record.deferred = planned.deferred
        vm.record.kept_in_huge_pages = planned.kept_in_huge
        vm.record.needed_max_map_count = None
        if len(planned.deferred):
            # Mappings besides those counted by the rmap: QEMU's own, and pieces that
            # the kernel has not joined.
            others = vm.scan.state.process_vmas - planned.choice.vmas_before
            reserved = others + self._terms.settings.vma_headroom
            vm.record.needed_max_map_count = planned.choice.max_map_count_for_all(reserved)

    def _postpones(self, left: _Left, nomination: Nomination) -> bool:
        """Whether so few pages are to be merged that they wait for more, within a time limit."""
        pages = [planned.taken.pages for planned in nomination.vms if len(planned.taken)]
        is_little = pages and max(pages) < _WORTHWHILE_PAGES
        presses = self._terms.everywhere or any(map(_presses, left.attached))
        left.waits = bool(is_little) and not presses and not left.is_due()
        return left.waits


def _note_existing(left: _Left, publisher: Publisher, vm: AttachedVm, wanted: Runs) -> None:
    """Note which of these runs show store pages that exist, and which wait for room."""
    vm.record.waiting_pages = 0
    if left.sharers is None and publisher.shortage is None:
        return
    exist = publisher.existing(wanted, vm.space.first_page)
    if left.sharers is not None:
        left.sharers.add(exist.page_slots()[1])
    if publisher.shortage is not None and exist.pages < wanted.pages:
        vm.record.waiting_pages = wanted.pages - exist.pages
        vm.record.trouble = vm.record.trouble or publisher.shortage


def _presses(vm: AttachedVm) -> bool:
    """Whether the VM is new, or a part of its last plan is still to be done."""
    if vm.storage.is_put_off:
        return False
    return (
        vm.record.passes < _FIRST_PASSES
        or vm.record.trouble is not None
        or vm.record.missed_pages > 0
    )


def _is_all_news(vms: list[AttachedVm]) -> bool:
    """Whether all VMs have so many new candidates that separating these from old ones costs
    more than it saves.
    """
    return all(vm.scan.agenda.many_settled for vm in vms)


def _must_consider_all(vms: list[AttachedVm]) -> bool:
    """Whether pages wait for VMAs: any change of a mapping may decide which of them fit."""
    return any(len(vm.record.deferred) for vm in vms)
