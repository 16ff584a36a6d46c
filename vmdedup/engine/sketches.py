"""The sketch of one VM, from the digests that the engine has anyway.

Owns which pages hold still: candidates, by the rmap's digest, and merged pages, by the digest
with which their store page was published. Promises to read no guest memory, and a document
whose size is bounded whatever the VM.
"""

from __future__ import annotations

import secrets
from base64 import b64encode
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmdedup.core.digest import zero_digest
from vmdedup.core.rmap import OWN, ZERO
from vmdedup.core.scan import are_candidates
from vmdedup.core.sketch import Keys, is_sampled, keys_of, sketch_of
from vmdedup.engine.domain_stores import domain_of
from vmdedup.models import VmSketch
from vmdedup.remap.domain_store import DomainStore
from vmdedup.store.sketch_secret import read_secret
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm


class Sketches:
    """Makes sketches under the host's secret, or under one of its own without."""

    def __init__(self, secret_file: Path | None) -> None:
        """Raises UsageError if the file cannot be used."""
        self._secret = None if secret_file is None else read_secret(secret_file)
        self._own = secrets.token_bytes(32)

    def seed_of(self, domain: str) -> int | None:
        """Seed for a new store of the domain; `None`: let it draw one."""
        return None if self._secret is None else keys_of(self._secret, domain).seed

    def of_vm(self, vm: AttachedVm, store: DomainStore, rate: int) -> VmSketch:
        """The sketch of a VM that may be merged, in a store that does not tell nodes apart."""
        keys, problem = self._keys(domain_of(vm), store)
        digests, still_pages, zero_pages = _contents(vm, store, rate)
        sketch = sketch_of(digests, rate, keys)
        return VmSketch(
            vm=vm.name,
            pid=vm.pid,
            uuid=vm.identity.uuid,
            trust_domain=domain_of(vm),
            key_id=sketch.key_id,
            only_here=problem,
            rate=sketch.rate,
            ram_bytes=vm.space.pages * PAGE_BYTES,
            still_pages=still_pages,
            zero_pages=zero_pages,
            marks=b64encode(sketch.mark.astype("<u8").tobytes()).decode(),
            pages=b64encode(sketch.pages.astype("<u4").tobytes()).decode(),
        )

    def _keys(self, domain: str, store: DomainStore) -> tuple[Keys, str | None]:
        """The keys of a domain, and why other hosts have others."""
        if self._secret is None:
            problem = "no sketch_secret is set on this host"
        elif (keys := keys_of(self._secret, domain)).seed == store.seed:
            return keys, None
        else:
            problem = (
                f"the store of trust domain {domain} is older than sketch_secret: unmerge once"
                " (vmdedup set run=2, then run=1)"
            )
        return keys_of(self._own + store.seed.to_bytes(8, "little"), domain), problem


def _contents(
    vm: AttachedVm, store: DomainStore, rate: int
) -> tuple[npt.NDArray[np.uint64], int, int]:
    """Digests of the sampled pages that hold still; how many non-zero and zero ones do."""
    columns = vm.scan.columns
    own = are_candidates(columns)
    is_zero = columns.digest == np.uint64(zero_digest(store.seed))
    shared = columns.shared()
    merged = columns.slot[shared & (columns.slot > OWN)]
    zero_pages = np.count_nonzero(own & is_zero) + np.count_nonzero(shared & (columns.slot == ZERO))
    own &= ~is_zero
    still_pages = int(np.count_nonzero(own)) + len(merged)
    sampled = own & is_sampled(columns.digest, rate)
    digests = columns.digest[sampled]
    if len(merged) and store.file is not None:
        published = store.file.published_digests()
        sampled_slots = is_sampled(published, rate)
        digests = np.concatenate([digests, published[merged[sampled_slots[merged]]]])
    return digests, still_pages, int(zero_pages)
