"""Looking at guest memory: which pages of each VM a pass should read, and reading them.

Owns the order of the looks, and the pages that a pass in pieces has still to look at. Promises
that a page that came due but was not read counts as written until it is read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vmdedup.core.rmap import KNOWN
from vmdedup.engine.domain_stores import DomainStores
from vmdedup.engine.served import Served
from vmdedup.engine.terms import Terms
from vmdedup.remap.borrowed_thread import ready_thread
from vmdedup.remap.merge_vm import free_cache
from vmdedup.remap.session import start_dirty_tracking
from vmdedup.vm.attached_vm import AttachedVm

Looked = Callable[[AttachedVm | None, int, int], None]
"""Called for each VM that was looked at, with the pages done and in total."""


class Looks:
    """The looks of one engine, for whole passes and for passes in pieces."""

    def __init__(self, terms: Terms, stores: DomainStores, served: Served) -> None:
        self._terms = terms
        self._stores = stores
        self._served = served
        self._looked_once: set[AttachedVm] = set()
        self._left: deque[tuple[AttachedVm, npt.NDArray[np.int64]]] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether a pass in pieces is under way."""
        return self._left is not None

    @property
    def is_done(self) -> bool:
        """Whether the pass in pieces has looked at everything."""
        return self._left is not None and not self._left

    @property
    def compares_next(self) -> bool:
        """Whether new VMs are merged after one look, so that the pages seen must first age."""
        return bool(self._looked_once)

    def begin(self) -> None:
        """Find the pages to look at, for `look_some`."""
        for vm, unread in self._left or ():
            vm.scan.owe(unread)
        self._left = deque()
        pages = self._served.each(self._served.now(), self._pages_to_look)
        self._left.extend(pages.items())

    def end(self) -> None:
        """End the pass in pieces, or give it up."""
        self._left = None

    def forget_first_looks(self) -> None:
        """Note that the findings of the first look at new VMs are merged now."""
        self._looked_once.clear()

    def look_some(self, most_pages: int) -> int:
        """Look at up to `most_pages` of this pass's remaining pages; returns how many."""
        most_of_one = most_pages
        if self._served.is_foreground():
            # Leave work for all workers.
            most_of_one = -(-most_pages // self._served.workers.most)
        done = 0
        now: dict[AttachedVm, npt.NDArray[np.int64]] = {}
        later = []
        served = self._served.now()
        while self._left and done < most_pages:
            vm, page = self._left.popleft()
            if vm not in served:
                vm.scan.owe(page)
                continue
            count = min(most_of_one, most_pages - done)
            now[vm] = page[:count]
            done += len(now[vm])
            if len(page) > count:
                later.append((vm, page[count:]))
        if self._left is not None:
            self._left.extendleft(reversed(later))
        self._served.each(list(now), lambda vm: self._look_at(vm, now[vm]))
        return done

    def look_at_all(self, looked: Looked) -> None:
        """Look at every page once, and at new VMs twice.

        If a new VM is merged next, the comparison of its pages is the second look.
        """
        began_s = time.monotonic()
        served = self._served.now()
        total = sum(vm.space.pages for vm in served)
        done = 0

        def tell(vm: AttachedVm) -> None:
            nonlocal done
            done += vm.space.pages
            looked(vm, done, total)

        looked(None, done, total)
        seen = self._served.each(served, self._look_whole, tell)
        fresh = [vm for vm in seen if vm.record.passes == 0]
        if fresh:
            since_first_s = time.monotonic() - began_s
            time.sleep(max(0.0, self._terms.settings.first_look_ms / 1000 - since_first_s))
            again = [vm for vm in fresh if vm not in self._looked_once]
            self._served.each(again, self._look_whole)

    def unknown_pages(self) -> int:
        """Number of pages never looked at, an upper bound of the first looks of a pass."""
        return sum(
            int(np.count_nonzero(vm.scan.columns.flags & KNOWN == 0))
            if vm.record.passes == 0
            else 0
            for vm in self._served.now()
        )

    def covered_pages(self) -> int:
        """Number of pages that a pass covers, read or skipped."""
        return sum(vm.scan.covered_pages() for vm in self._served.now())

    def _look_whole(self, vm: AttachedVm) -> None:
        self._look_at(vm, self._pages_to_look(vm))

    def _look_at(self, vm: AttachedVm, page: npt.NDArray[np.int64]) -> None:
        store = self._stores.of_vm(vm)
        compared_next = vm in self._looked_once
        vm.scan.look(page, store.seed, by_node=store.by_node, compared_next=compared_next)

    def _pages_to_look(self, vm: AttachedVm) -> npt.NDArray[np.int64]:
        """The pages of a VM that should be read now. Raises VmError."""
        host = self._terms.host
        # The store may be a new one by now, if no VM had pages on the old one.
        vm.use_seed(self._stores.of_vm(vm).seed)
        if host is not None and self._is_compared_next(vm):
            # No dirty tracking is needed before: it would protect the memory and then hand it
            # over to the merge, which walks the page tables four times.
            self._looked_once.add(vm)
            ready_thread(host, vm)
            vm.scan.freshen()
            return vm.scan.pages_to_look(smart=False, follow=False, everywhere=True)
        self._looked_once.discard(vm)
        follow = vm.scan.follows()
        if host is not None:
            start_dirty_tracking(host, vm, foreground=self._served.is_awaited)
        if not follow and not vm.scan.is_fresh():
            vm.scan.refresh()
            if host is not None:
                free_cache(vm)
        return vm.scan.pages_to_look(
            smart=self._terms.limits.smart_scan,
            follow=follow,
            everywhere=self._terms.everywhere,
            spare_huge=self._terms.huge_page_density > 0,
        )

    def _is_compared_next(self, vm: AttachedVm) -> bool:
        """Whether somebody waits for the first merge of a VM that no pass has looked at."""
        is_new = vm.record.passes == 0 and vm.scan.dirty_tracking is None
        return is_new and self._served.is_awaited
