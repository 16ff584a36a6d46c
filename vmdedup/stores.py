"""The stores of this host: opened per trust domain, swept, and removed when empty.

Owns the question which slots are in use, and answers it from the mappings of
*every* process of the host, attached or not: a slot is discarded only when
nobody maps it. Promises that what a killed predecessor published and nobody
maps is given back, and that a store is deleted once nothing maps it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from vmdedup.core.digest import apart_by_node
from vmdedup.core.rmap import FIRST_SLOT
from vmdedup.core.stable_tree import StableTree
from vmdedup.errors import StoreError
from vmdedup.memory.store import STORE_SUFFIX, StableStore
from vmdedup.procfs.maps import parse_maps
from vmdedup.units import PAGE_SHIFT


@dataclass
class DomainStore:
    """A trust domain's store and the stable tree over its published pages.

    `file` is None in a dry run that found no store to look at.
    """

    domain: str
    file: StableStore | None
    tree: StableTree
    by_node: bool = False
    """Whether pages of different NUMA nodes are kept apart (merge_across_nodes=0)."""

    @property
    def seed(self) -> int:
        """Seed of all digests of this domain."""
        return 0 if self.file is None else self.file.seed

    @property
    def next_slot(self) -> int:
        """Slot that the next published page gets."""
        return FIRST_SLOT if self.file is None else self.file.next_slot

    def close(self) -> None:
        """Close the files; merges stay."""
        if self.file is not None:
            self.file.close()


def open_domain_store(
    directory: Path, domain: str, *, dry: bool = False, by_node: bool = False
) -> DomainStore:
    """Open or make the store of `domain` and rebuild its tree from what is mapped.

    Pages that no process maps are discarded first. `dry` changes and makes
    nothing. `by_node`: pages of different NUMA nodes are kept apart. Raises StoreError.
    """
    if dry and not (directory / f"{quote(domain, safe='')}{STORE_SUFFIX}").exists():
        return DomainStore(domain, None, StableTree(), by_node)
    store = StableStore(directory, domain)
    try:
        used = mapped_slots(store) if dry else sweep(store)
        tree = StableTree()
        slots = np.flatnonzero(used)
        if len(slots):
            digest = store.published_digests()[slots]
            if by_node:
                digest = apart_by_node(digest, store.nodes(slots), store.seed)
            tree.insert(digest, slots.astype(np.int32))
    except BaseException:
        store.close()
        raise
    return DomainStore(domain, store, tree, by_node)


def sweep(store: StableStore) -> npt.NDArray[np.bool_]:
    """Discard the slots that no process maps; returns which are mapped."""
    used = mapped_slots(store)
    unused = np.flatnonzero(store.allocated_slots() & ~used)
    if len(unused):
        store.discard(unused)
    return used


def mapped_slots(store: StableStore) -> npt.NDArray[np.bool_]:
    """Which slots any VM of this host maps: bool, shape (next_slot,).

    As merged pages, which is privately. A shared mapping is only there to be read: ours, or
    one that a killed engine has left in a VM (see `compare.InPlace`). That is of the whole
    store, of discarded slots too.
    """
    if store.next_slot == FIRST_SLOT:
        return np.zeros(store.next_slot, dtype=np.bool_)
    edges = np.zeros(store.next_slot + 1, dtype=np.int32)
    for text in _maps_naming(store.path):
        maps = parse_maps(text)
        rows = maps.of_file(store.device, store.inode)
        is_private = [maps.permissions[row].endswith("p") for row in rows.tolist()]
        rows = rows[np.array(is_private, dtype=np.bool_)]
        first = (maps.offset_bytes[rows] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        pages = ((maps.end[rows] - maps.start[rows]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        np.add.at(edges, np.minimum(first, store.next_slot), 1)
        np.add.at(edges, np.minimum(first + pages, store.next_slot), -1)
    return np.asarray(np.cumsum(edges[:-1]) > 0)


def _maps_naming(path: Path) -> list[bytes]:
    """The maps text of every process that maps a file of this name.

    A process that ends meanwhile maps nothing any more. A QEMU that may not be
    read is an error, as no VM may be overlooked here; other processes that may not
    be read can not map a store, since only VMs that we may trace are given one.
    """
    needle = path.name.encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(FileNotFoundError, ProcessLookupError):
            try:
                text = Path(f"/proc/{name}/maps").read_bytes()
            except PermissionError as error:
                program = Path(f"/proc/{name}/comm").read_text().strip()
                if "qemu" in program or "kvm" in program:
                    raise StoreError(
                        f"{path}: can not see whether {program} (pid {name}) maps it: run as root"
                    ) from error
                continue
            if needle in text:
                found.append(text)
    return found


def remove_unused_stores(directory: Path) -> bool:
    """Delete every store that nothing maps, then the empty directory; True when all went."""
    if not directory.is_dir():
        return True
    all_gone = True
    for path in sorted(directory.glob(f"*{STORE_SUFFIX}")):
        with StableStore(directory, unquote(path.name.removesuffix(STORE_SUFFIX))) as store:
            if mapped_slots(store).any():
                all_gone = False
            else:
                store.remove()
    if all_gone:
        with suppress(OSError):
            directory.rmdir()
    return all_gone
