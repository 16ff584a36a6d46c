"""The engine: one pass over all tenants, the stages in their order.

    look -> nominate -> publish -> arm, drain, gate -> release -> account

Owns that order and nothing of what the stages do. Each pass starts from the
kernel's state, never from what the last pass believed. Promises that a VM that
fails or vanishes is dropped with its reason and all others go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.account import MappingState, unfreed_pages
from vmdedup.core.digest import digest_pages, zero_digest
from vmdedup.core.nominate import NewPages, Nomination, VmNomination, VmView, nominate
from vmdedup.core.rmap import OWN
from vmdedup.core.scan import forget
from vmdedup.errors import (
    InjectionError,
    MergeError,
    MonitorError,
    UsageError,
    VmError,
    VmGoneError,
)
from vmdedup.memory.reader import PageVanishedError, page_buffer, read_runs
from vmdedup.memory.space import page_runs
from vmdedup.merge import MappedFds, MergeOutcome, VmMerger
from vmdedup.policy.domains import ZERO_ONLY
from vmdedup.reapply import STORE_FLAGS, Reapply
from vmdedup.release import punch_merged, split_huge_pages
from vmdedup.sessions import Host, gate_runs, open_session, start_tracking
from vmdedup.settings import Settings
from vmdedup.stores import DomainStore, open_domain_store, sweep
from vmdedup.tenant import Tenant
from vmdedup.units import PAGE_BYTES

_PUBLISH_PAGES = 1024


@dataclass(frozen=True)
class PassProgress:
    """How far a run has come; `done_pages` of `total_pages` in the stage at hand."""

    passes: int
    stage: str
    vm: str | None
    done_pages: int
    total_pages: int
    merged_pages: int


@dataclass(frozen=True)
class PassOutcome:
    """What one pass did."""

    merged_pages: int
    """Newly merged, zero pages included."""
    standing_pages: int
    """Merged before the pass and still standing."""


ReportProgress = Callable[[PassProgress], None]


class Engine:
    """Runs passes over `tenants`. `dropped` is told of each VM that had to go.

    Without `host` it is a dry run: it can look and plan, and changes nothing.
    """

    def __init__(
        self,
        settings: Settings,
        host: Host | None,
        dropped: Callable[[Tenant, VmError], None],
    ) -> None:
        self._settings = settings
        self._host = host
        self._dry = host is None
        self.tenants: list[Tenant] = []
        self.full_scans = 0
        self._dropped = dropped
        self._stores: dict[str, DomainStore] = {}
        self._max_map_count = _read_max_map_count()

    def close(self) -> None:
        """Close stores and tenants; merges stay."""
        self.forget_stores()
        for tenant in self.tenants:
            tenant.close()
        self.tenants.clear()

    def add(self, tenant: Tenant) -> None:
        """Take a VM in: finish what a killed predecessor left half done on it."""
        state = tenant.refresh()
        if not self._dry:
            self._finish_release(tenant, state)
        self.tenants.append(tenant)

    def drop(self, tenant: Tenant, error: VmError) -> None:
        """Let go of a VM that can not be served any more."""
        self.tenants.remove(tenant)
        tenant.close()
        self._dropped(tenant, error)

    def run_pass(self, progress: ReportProgress) -> PassOutcome:
        """One whole pass. Raises StoreError; VMs that fail are dropped."""
        self._look(progress)
        merged = standing = 0
        for domain, tenants in self._by_domain():
            standing += sum(_standing_pages(tenant) for tenant in tenants)
            merged += self._merge_domain(domain, tenants, progress)
        self.full_scans += 1
        return PassOutcome(merged, standing)

    def nominations(self) -> list[tuple[DomainStore, list[Tenant], Nomination]]:
        """What a pass would do now, for a dry run; looks, but changes nothing in any VM."""
        self._look(lambda _: None)
        return [
            (self.store_of(domain), tenants, self._nominate(domain, tenants))
            for domain, tenants in self._by_domain()
        ]

    def _require_host(self) -> Host:
        if self._host is None:
            raise UsageError("this engine only looks; it may not change a VM")
        return self._host

    def store_of(self, domain: str) -> DomainStore:
        """The store of a trust domain, opened on first use."""
        if domain not in self._stores:
            directory = self._settings.store_dir
            self._stores[domain] = open_domain_store(directory, domain, dry=self._dry)
        return self._stores[domain]

    def sweep(self) -> None:
        """Give back the store pages that nobody maps any more."""
        for store in self._stores.values():
            if store.file is not None:
                store.tree.remove(np.flatnonzero(~sweep(store.file)).astype(np.int32))

    def _by_domain(self) -> Iterator[tuple[str, list[Tenant]]]:
        for domain in sorted({_domain(tenant) for tenant in self.tenants}):
            yield domain, [tenant for tenant in self.tenants if tenant.domain == domain]

    def _look(self, progress: ReportProgress) -> None:
        """Look at every page once; tenants that are new are looked at twice."""
        fresh = []
        total = sum(tenant.space.pages for tenant in self.tenants)
        done = 0
        for tenant in list(self.tenants):
            progress(self._progress("scan", tenant, done, total))
            if self._look_at(tenant) and tenant.passes == 0:
                fresh.append(tenant)
            done += tenant.space.pages
        if fresh:
            time.sleep(self._settings.first_look_ms / 1000)
            for tenant in fresh:
                self._look_at(tenant)

    def _look_at(self, tenant: Tenant) -> bool:
        try:
            state = tenant.refresh()
            if self._host is not None:
                start_tracking(self._host, tenant)
            tenant.look(state, self.store_of(_domain(tenant)).seed)
        except VmError as error:
            self.drop(tenant, error)
            return False
        return True

    def _nominate(self, domain: str, tenants: list[Tenant]) -> Nomination:
        store = self.store_of(domain)
        views = []
        for tenant in tenants:
            first_page = tenant.space.first_page
            views.append(VmView(tenant.columns, first_page, self.vma_budget(tenant)))
        nomination = nominate(
            views,
            store.tree,
            zero_digest=zero_digest(store.seed),
            use_zero_pages=self._settings.use_zero_pages,
            share=domain != ZERO_ONLY,
            next_slot=store.next_slot,
        )
        for tenant, planned in zip(tenants, nomination.vms, strict=True):
            self._note_plan(tenant, planned)
        return nomination

    def vma_budget(self, tenant: Tenant) -> int:
        """VMAs that the guest RAM of `tenant` may take."""
        assert tenant.state is not None
        return tenant.vma_budget(self._max_map_count, tenant.state)

    def idle_progress(self) -> PassProgress:
        """Where things stand between passes."""
        return PassProgress(self.full_scans, "idle", None, 0, 0, self._standing())

    def forget_stores(self) -> None:
        """Close the stores, so that unused ones can be removed."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def _standing(self) -> int:
        return sum(_standing_pages(tenant) for tenant in self.tenants)

    def _note_plan(self, tenant: Tenant, planned: VmNomination) -> None:
        assert tenant.state is not None
        tenant.deferred = planned.deferred
        tenant.unshared = planned.unshared
        tenant.needed_max_map_count = None
        if len(planned.deferred):
            others = tenant.state.process_vmas - tenant.state.ram_vmas
            reserved = others + self._settings.vma_headroom
            tenant.needed_max_map_count = planned.choice.max_map_count_for_all(reserved)

    def _merge_domain(self, domain: str, tenants: list[Tenant], progress: ReportProgress) -> int:
        nomination = self._nominate(domain, tenants)
        store = self.store_of(domain)
        self._publish(store, tenants, nomination.new)
        merged = 0
        total = sum(planned.taken.pages for planned in nomination.vms)
        for tenant, planned in zip(tenants, nomination.vms, strict=True):
            progress(self._progress("merge", tenant, merged, total))
            tenant.passes += 1
            if not len(planned.taken):
                continue
            try:
                outcome = self._merge_vm(tenant, store, planned)
            except (InjectionError, MonitorError, MergeError) as error:
                # Nothing of the VM was lost; the next pass tries again.
                tenant.trouble = error.reason
                continue
            except VmError as error:
                self.drop(tenant, error)
                continue
            merged += outcome.merged_pages
            tenant.trouble = outcome.failure
            progress(self._progress("merge", tenant, merged, total))
        return merged

    def _publish(self, store: DomainStore, tenants: list[Tenant], new: NewPages) -> None:
        """Copy the new contents into the store, without any protection.

        A page that changes while it is copied is torn; its digest tells, and it is
        kept out of the tree. Were it not, the gate would still compare bytes.
        """
        assert store.file is not None
        buffer = page_buffer(_PUBLISH_PAGES)
        for first in range(0, len(new), _PUBLISH_PAGES):
            rows = slice(first, first + _PUBLISH_PAGES)
            content = buffer[: len(new.page[rows])]
            for vm in np.unique(new.vm[rows]).tolist():
                mine = np.flatnonzero(new.vm[rows] == vm)
                content[mine] = _copy(tenants[vm], new.page[rows][mine])
            digest = digest_pages(content.reshape(-1).data, store.seed)
            slot = store.file.publish(content, digest)
            faults.reached("published")
            whole = np.flatnonzero(digest == new.digest[rows])
            store.tree.insert(digest[whole], (slot + whole).astype(np.int32))

    def _merge_vm(self, tenant: Tenant, store: DomainStore, planned: VmNomination) -> MergeOutcome:
        assert store.file is not None
        with ExitStack() as exits:
            store_fd = store.file.open_read_only()
            exits.callback(os.close, store_fd)
            zero_fd = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
            exits.callback(os.close, zero_fd)
            fds = MappedFds(
                store=exits.enter_context(tenant.lent(store_fd, "store")),
                zero=exits.enter_context(tenant.lent(zero_fd, "zero")),
            )
            start = tenant.space.hva(planned.taken.start_page)
            end = start + planned.taken.length * PAGE_BYTES
            ranges = list(zip(start.tolist(), end.tolist(), strict=True))
            session, remote = exits.enter_context(
                open_session(self._require_host(), tenant, ranges)
            )
            merger = VmMerger(
                tenant.name,
                tenant.pid,
                space=tenant.space,
                store=store.file,
                fds=fds,
                reapply=[
                    Reapply.of(region, flags & STORE_FLAGS)
                    for region, flags in zip(tenant.regions, tenant.region_flags, strict=True)
                ],
                row_address=remote.row_address,
                gate_runs=gate_runs(self._settings, remote),
                gate_pages=self._settings.gate_pages,
            )
            outcome = merger.merge(session, planned.taken)
        self._release(tenant, outcome)
        return outcome

    def _release(self, tenant: Tenant, outcome: MergeOutcome) -> None:
        """Free what the merged pages stood on before, and note them in the rmap."""
        assert tenant.state is not None
        for part in outcome.merged:
            pages, slots = part.page_slots()
            tenant.columns.merge(pages, slots)
        for rejected in outcome.rejected:
            # What was known of them was wrong (DMA is not tracked): look anew.
            forget(tenant.columns, rejected)
        pages = np.concatenate(
            [np.empty(0, dtype=np.int64), *(part.page_slots()[0] for part in outcome.merged)]
        )
        faults.reached("merged")
        punch_merged(tenant.process, tenant.regions, tenant.space, pages)
        faults.reached("punched")
        split_huge_pages(tenant.process, tenant.space, pages, tenant.state.categories)

    def _finish_release(self, tenant: Tenant, state: MappingState) -> None:
        """Do what a predecessor that was killed after its remaps had not done yet."""
        merged = np.flatnonzero(state.slot != OWN)
        if not len(merged):
            return
        unfreed = unfreed_pages(tenant.pid, tenant.regions, tenant.space, state)
        punch_merged(tenant.process, tenant.regions, tenant.space, np.flatnonzero(unfreed))
        split_huge_pages(tenant.process, tenant.space, merged, None)

    def _progress(
        self, stage: str, tenant: Tenant, done_pages: int, total_pages: int
    ) -> PassProgress:
        return PassProgress(
            passes=self.full_scans,
            stage=stage,
            vm=tenant.name,
            done_pages=done_pages,
            total_pages=total_pages,
            merged_pages=self._standing(),
        )


def _domain(tenant: Tenant) -> str:
    assert tenant.domain is not None, "only VMs without a refusal are merged"
    return tenant.domain


def _standing_pages(tenant: Tenant) -> int:
    return int(np.count_nonzero(tenant.columns.shared()))


def _copy(tenant: Tenant, page: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The pages' content now; zeroes from where one vanished on, which nothing will match."""
    content = np.zeros((len(page), PAGE_BYTES), dtype=np.uint8)
    start, length = page_runs(page, tenant.space.first_page)
    with suppress(PageVanishedError, VmGoneError):
        read_runs(tenant.name, tenant.pid, tenant.space.hva(start), length, content)
    return content


def _read_max_map_count() -> int:
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        return int(file.read())
