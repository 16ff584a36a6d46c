"""The stores of the trust domains that an engine has open.

Owns opening each store on its first use, freeing pages that nobody maps, and closing stores
that no VM needs. Promises that a domain has at most one open store.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vmdedup.engine.terms import Terms
from vmdedup.remap.domain_store import (
    DomainStore,
    open_domain_store,
    remove_if_unused,
    remove_unused_stores,
    sweep,
)
from vmdedup.store.stable_store import Access
from vmdedup.vm.attached_vm import AttachedVm


class DomainStores:
    """The open stores, by domain. Not thread-safe."""

    def __init__(self, terms: Terms, seed_of: Callable[[str], int | None]) -> None:
        """`seed_of`: the seed of a domain's new store, `None` to draw one."""
        self._terms = terms
        self._seed_of = seed_of
        self._dry = terms.host is None
        self._open: dict[str, DomainStore] = {}

    def of(self, domain: str) -> DomainStore:
        """The store of a trust domain. Raises StoreError, StoreBusyError."""
        if domain not in self._open:
            self._open[domain] = open_domain_store(
                self._terms.settings.store_dir,
                domain,
                dry=self._dry,
                by_node=not self._terms.limits.merge_across_nodes,
                seed=self._seed_of(domain),
            )
        return self._open[domain]

    def of_vm(self, vm: AttachedVm) -> DomainStore:
        """The store of a VM that may be merged. Raises as `of`."""
        return self.of(domain_of(vm))

    def is_open(self, domain: str) -> bool:
        """Whether the store of a domain is open."""
        return domain in self._open

    def sweep(self, used_domains: set[str | None]) -> None:
        """Free the store pages that nobody maps any more.

        The store of a domain without a VM is closed: another engine may use it.
        """
        for domain, store in list(self._open.items()):
            if store.file is None or store.file.access is not Access.CHANGE:
                continue
            store.tree.remove(np.flatnonzero(~sweep(store.file)).astype(np.int32))
            if domain not in used_domains:
                self._open.pop(domain).close()

    def remove_unused(self) -> bool:
        """Delete the stores that nothing maps any more; returns whether none is left."""
        for domain, store in list(self._open.items()):
            if store.file is None:
                continue
            is_ours = store.file.access is Access.CHANGE
            if not is_ours or remove_if_unused(store.file):
                self._open.pop(domain).close()
        return remove_unused_stores(self._terms.settings.store_dir)

    def published_pages(self) -> int:
        """Number of published store pages of all domains."""
        return sum(len(store.tree) for store in self._open.values())

    def close(self) -> None:
        """Close all stores, so that unused ones can be removed."""
        for store in self._open.values():
            store.close()
        self._open.clear()


def domain_of(vm: AttachedVm) -> str:
    """The trust domain of a VM that may be merged."""
    assert vm.domain is not None, "only VMs without a refusal are merged"
    return vm.domain
