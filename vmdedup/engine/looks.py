"""Looking at guest memory: what of each VM should be read in a pass, and reading it.

Owns the order of the looks, and what of a pass in pieces is still to be looked at. Promises
that a page which came due and was not read counts as written until it is.
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
"""Told of each VM that was looked at, and of pages done and in total."""


class Looks:
    """The looks of one engine; a round is the looking of a pass, whole or in pieces."""

    def __init__(self, terms: Terms, stores: DomainStores, served: Served) -> None:
        self._terms = terms
        self._stores = stores
        self._served = served
        self._looked_once: set[AttachedVm] = set()
        self._left: deque[tuple[AttachedVm, npt.NDArray[np.int64]]] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether a round in pieces is under way."""
        return self._left is not None

    @property
    def is_done(self) -> bool:
        """Whether everything of the round that was begun has been looked at."""
        return self._left is not None and not self._left

    @property
    def compares_next(self) -> bool:
        """Whether new VMs are merged after one look, so that what it saw must first age."""
        return bool(self._looked_once)

    def begin(self) -> None:
        """Find out what there is to look at, for `look_some`."""
        for vm, unread in self._left or ():
            vm.scan.owe(unread)
        self._left = deque()
        pages = self._served.each(self._served.now(), self._pages_to_look)
        self._left.extend(pages.items())

    def end(self) -> None:
        """The round in pieces is over, or given up."""
        self._left = None

    def forget_first_looks(self) -> None:
        """What one look at new VMs found is merged now."""
        self._looked_once.clear()

    def look_some(self, most_pages: int) -> int:
        """Look at up to `most_pages` of what is left in this round; returns how many."""
        most_of_one = most_pages
        if self._served.is_foreground():
            # So that there is work for all.
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
        """Look at every page once; VMs that are new are looked at twice.

        The second time is when their pages are compared, if they are merged next.
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
        """Pages that were never looked at, an upper bound of those a round sees first."""
        return sum(
            int(np.count_nonzero(vm.scan.columns.flags & KNOWN == 0))
            if vm.record.passes == 0
            else 0
            for vm in self._served.now()
        )

    def covered_pages(self) -> int:
        """Pages that a round speaks of, read or spared."""
        return sum(vm.scan.covered_pages() for vm in self._served.now())

    def _look_whole(self, vm: AttachedVm) -> None:
        self._look_at(vm, self._pages_to_look(vm))

    def _look_at(self, vm: AttachedVm, page: npt.NDArray[np.int64]) -> None:
        store = self._stores.of_vm(vm)
        compared_next = vm in self._looked_once
        vm.scan.look(page, store.seed, by_node=store.by_node, compared_next=compared_next)

    def _pages_to_look(self, vm: AttachedVm) -> npt.NDArray[np.int64]:
        """What of a VM should be read now. Raises VmError."""
        host = self._terms.host
        # The store may be another one by now, if nobody stood on it.
        vm.use_seed(self._stores.of_vm(vm).seed)
        if host is not None and self._is_compared_next(vm):
            # Nothing needs to be tracked before: its memory would be protected for that and
            # handed over to the merge, which walks its page tables four times.
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
            smart=self._terms.limits.smart_scan, follow=follow, everywhere=self._terms.everywhere
        )

    def _is_compared_next(self, vm: AttachedVm) -> bool:
        """Whether somebody waits for the first merge of a VM that nobody has looked at."""
        is_new = vm.record.passes == 0 and vm.scan.dirty_tracking is None
        return is_new and self._served.is_awaited
