"""The stores of this host: opened per trust domain, swept, and removed when empty.

Owns the question which slots are in use, and answers it from the mappings of *every* process
of the host, attached or not. A slot is discarded only if no process maps it, and none can map
it any more: calls that a killed engine has launched inside a VM run when that VM gets a
processor, which may be much later. Promises that store pages that a killed predecessor
published and nobody maps are freed, and that a store is deleted once nothing maps it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
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
from vmdedup.inject.leftovers import is_scratch_named, may_run_leftover_batch
from vmdedup.linux.maps import STORE_SUFFIX, parse_maps
from vmdedup.policy.domains import ZERO_ONLY
from vmdedup.store.stable_store import Access, StableStore
from vmdedup.units import PAGE_SHIFT


@dataclass
class DomainStore:
    """A trust domain's store and the stable tree over its published pages.

    `file` is `None` in a dry run that found no store.
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
    directory: Path,
    domain: str,
    *,
    dry: bool = False,
    by_node: bool = False,
    seed: int | None = None,
) -> DomainStore:
    """Open or make the store of `domain` and rebuild its tree from the mapped slots.

    Pages that no process maps are discarded first. `dry` changes and makes
    nothing. `by_node`: pages of different NUMA nodes are kept apart. `seed`: that of a new
    store, `None`: one is drawn. Raises StoreError, StoreBusyError if another engine works with it.
    """
    if dry and not (directory / f"{quote(domain, safe='')}{STORE_SUFFIX}").exists():
        return DomainStore(domain, None, StableTree(), by_node)
    store = StableStore(directory, domain, _access(domain, dry=dry), seed=seed)
    try:
        used = sweep(store) if store.access is Access.CHANGE else usage_of(store).mapped
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


def _access(domain: str, *, dry: bool) -> Access:
    if dry:
        return Access.READ
    # Engines of different users may each have VMs that share with nobody.
    return Access.SHARE if domain == ZERO_ONLY else Access.CHANGE


@dataclass(frozen=True)
class Usage:
    """How the processes of this host use a store's slots."""

    mapped: npt.NDArray[np.bool_]
    """Slots that any VM maps as merged pages: bool, shape (next_slot,)."""
    unsettled: tuple[int, ...]
    """Processes in which a killed engine's calls may still run and map more slots."""


def sweep(store: StableStore) -> npt.NDArray[np.bool_]:
    """Discard the slots that no process maps; returns which slots are mapped.

    No slot is discarded while a killed engine's calls may still map any.
    """
    usage = usage_of(store)
    unused = np.flatnonzero(store.allocated_slots() & ~usage.mapped)
    if len(unused) and not usage.unsettled:
        store.discard(unused)
    return usage.mapped


def usage_of(store: StableStore) -> Usage:
    """Which slots any VM of this host maps, and in which processes that may still change.

    Only private mappings count: these are merged pages. A shared mapping is for reading only:
    ours, or one that a killed engine has left in a VM (see `compare.InPlace`). It covers the
    whole store, including discarded slots. Raises StoreError if a VM's mappings may not be read.
    """
    edges = np.zeros(store.next_slot + 1, dtype=np.int32)
    unsettled = []
    for pid, text in _maps_naming(store):
        if may_run_leftover_batch(pid, text, (store.device, store.inode)):
            unsettled.append(pid)
        # SAFETY: the maps are read again after that, to see what such calls have mapped.
        _count(_maps_of(pid, store.path) if is_scratch_named(text) else text, store, edges)
    return Usage(np.asarray(np.cumsum(edges[:-1]) > 0), tuple(unsettled))


def _count(text: bytes, store: StableStore, edges: npt.NDArray[np.int32]) -> None:
    """Add where private mappings of the store begin and end, in slots."""
    maps = parse_maps(text)
    rows = maps.of_file(store.device, store.inode)
    is_private = [maps.permissions[row].endswith("p") for row in rows.tolist()]
    rows = rows[np.array(is_private, dtype=np.bool_)]
    first = (maps.offset_bytes[rows] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    pages = ((maps.end[rows] - maps.start[rows]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    np.add.at(edges, np.minimum(first, store.next_slot), 1)
    np.add.at(edges, np.minimum(first + pages, store.next_slot), -1)


def _maps_naming(store: StableStore) -> Iterator[tuple[int, bytes]]:
    """Pid and maps text of every process that may map the store, or scratch memory."""
    needle = f" {store.inode} ".encode()
    for name in os.listdir("/proc"):
        if name.isdigit():
            text = _maps_of(int(name), store.path)
            if needle in text or is_scratch_named(text):
                yield int(name), text


def _maps_of(pid: int, path: Path) -> bytes:
    """The maps text of a process; empty if it has ended, as it then maps nothing.

    A QEMU that may not be read is an error, as no VM may be overlooked here. Any other
    process that may not be read cannot map the store at `path`, since only VMs that we may
    trace get one.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        try:
            return Path(f"/proc/{pid}/maps").read_bytes()
        except PermissionError as error:
            program = Path(f"/proc/{pid}/comm").read_text().strip()
            if "qemu" in program or "kvm" in program:
                raise StoreError(
                    f"{path}: cannot see whether {program} (pid {pid}) maps it: run as root"
                ) from error
    return b""


def remove_unused_stores(directory: Path) -> bool:
    """Delete every store that nothing maps, then the empty directory; `True` if all are gone.

    A directory with the sticky bit stays: it was made for us, and others may use it too.

    Stores that an engine works with stay, including our own: an engine closes or removes them.
    """
    if not directory.is_dir():
        return True
    all_gone = True
    for path in sorted(directory.glob(f"*{STORE_SUFFIX}")):
        with suppress(StoreError):  # another engine's, or not recognizable
            with StableStore(directory, unquote(path.name.removesuffix(STORE_SUFFIX))) as store:
                all_gone &= remove_if_unused(store)
            continue
        all_gone = False
    if all_gone and not directory.stat().st_mode & stat.S_ISVTX:
        with suppress(OSError):
            directory.rmdir()
    return all_gone


def remove_if_unused(store: StableStore) -> bool:
    """Delete a store unless a process maps it or may still map it; whether it was deleted."""
    usage = usage_of(store)
    if usage.mapped.any() or usage.unsettled:
        return False
    store.remove()
    return True
