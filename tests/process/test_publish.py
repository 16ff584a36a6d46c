"""Publishing for VMs that are merged at the same time. The VMs are memory of our own."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.digests import digest_pages
from tests.harness.skips import require
from tests.process.test_bounded import hostile_process
from vmdedup.core.digest import apart_by_node, zero_digest
from vmdedup.core.nominate import NewPages
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import FIRST_SLOT, ZERO
from vmdedup.core.stable_tree import NOT_FOUND
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux import bounded
from vmdedup.linux.numa import NO_NODE, nodes_of
from vmdedup.remap.domain_store import DomainStore, open_domain_store, usage_of
from vmdedup.remap.publish import Publisher
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.ram_files import RamFiles

pytestmark = pytest.mark.process

PAGES = 2000
NO_REGIONS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Span:
    start: int
    size_bytes: int


@dataclass
class Guest:
    """Some random pages of our own, as those of a VM."""

    name: str
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self.memory = mmap.mmap(-1, PAGES * PAGE_BYTES)
        words = np.frombuffer(self.memory, dtype=np.uint64)
        words[:] = np.random.default_rng(len(self.name)).integers(0, 2**62, len(words))
        self.space = PageSpace([Span(words.ctypes.data, PAGES * PAGE_BYTES)])


@pytest.fixture
def store() -> Iterator[DomainStore]:
    with tempfile.TemporaryDirectory(prefix="vmdedup-test-", dir="/dev/shm") as folder:
        store = open_domain_store(Path(folder), "some")
        try:
            yield store
        finally:
            store.close()


@pytest.fixture
def guests() -> list[Guest]:
    return [Guest("a"), Guest("bb")]


@pytest.fixture
def publisher(store: DomainStore, guests: list[Guest]) -> Iterator[Publisher]:
    """Of all pages of both: the first half of the slots are the first guest's."""
    digests = [digest_pages(guest.memory[:], store.seed) for guest in guests]
    new = NewPages(
        store.next_slot,
        np.repeat(np.arange(2, dtype=np.int32), PAGES),
        np.tile(np.arange(PAGES), 2),
        np.concatenate(digests),
    )
    with Publisher(store, guests, new, lambda _: None) as publisher:
        yield publisher


def shown(first_slot: int, pages: int) -> Runs:
    """A run of a guest that is to show slots of the store, the `first_slot`-th and on."""
    slot = np.array([FIRST_SLOT + first_slot], dtype=np.int32)
    return Runs(np.array([0]), np.array([pages]), slot)


def sources(publisher: Publisher, number: int) -> int:
    """How many of a guest's own pages need no comparison with their slots."""
    page = np.arange(PAGES)
    slot = (FIRST_SLOT + page + number * PAGES).astype(np.int32)
    return int(publisher.for_vm(number).is_source(page, slot).sum())


def test_what_a_vm_published_of_itself_needs_no_comparison(publisher: Publisher) -> None:
    publisher.for_vm(0).publish_for(shown(0, 1000), NO_REGIONS)
    assert sources(publisher, 0) == 1000
    publisher.for_vm(0).publish_for(shown(0, PAGES), NO_REGIONS)
    publisher.for_vm(1).publish_for(shown(0, 2 * PAGES), NO_REGIONS)
    assert [sources(publisher, number) for number in (0, 1)] == [PAGES, PAGES]


def test_what_was_published_ahead_for_an_earlier_stretch_does(publisher: Publisher) -> None:
    """It was copied before its own stretch was witnessed."""
    contents = publisher.for_vm(0)
    page = np.arange(PAGES)
    slot = (FIRST_SLOT + page).astype(np.int32)
    for first, last in ((0, 300), (300, 1000), (1000, 1000)):
        contents.publish_for(shown(0, last), NO_REGIONS)
        assert np.flatnonzero(contents.is_source(page, slot)).tolist() == list(range(first, last))


def test_what_another_vm_published_of_it_does(
    publisher: Publisher, store: DomainStore, guests: list[Guest]
) -> None:
    """It was copied before the VM's own session: what was written since is not in the copy."""
    publisher.for_vm(1).publish_for(shown(0, 2 * PAGES), NO_REGIONS)
    guests[0].memory[:PAGE_BYTES] = b"w" * PAGE_BYTES
    publisher.for_vm(0).publish_for(shown(0, PAGES), NO_REGIONS)
    assert [sources(publisher, number) for number in (0, 1)] == [0, PAGES]
    assert store.file is not None
    (written,) = digest_pages(b"w" * PAGE_BYTES, store.seed)
    assert store.file.published_digests()[FIRST_SLOT] != written


def test_what_was_written_before_it_was_copied_is_not_what_was_nominated(
    publisher: Publisher, guests: list[Guest]
) -> None:
    """Neither for the page itself, which it equals, nor for those that were like it."""
    guests[0].memory[5 * PAGE_BYTES : 6 * PAGE_BYTES] = b"w" * PAGE_BYTES
    publisher.for_vm(0).publish_for(shown(0, PAGES), NO_REGIONS)
    slot = (FIRST_SLOT + np.arange(PAGES)).astype(np.int32)
    for number in (0, 1):
        expected = publisher.for_vm(number).is_as_nominated(slot)
        assert np.flatnonzero(~expected).tolist() == [5]
    known = np.array([ZERO, FIRST_SLOT], dtype=np.int32)
    assert publisher.for_vm(1).is_as_nominated(known).all()


def test_two_at_once_publish_each_content_once(
    publisher: Publisher, store: DomainStore, guests: list[Guest]
) -> None:
    def publish(number: int) -> None:
        for pages in range(100, PAGES + 1, 100):
            wanted = shown(number * PAGES, pages)
            exists = publisher.for_vm(number).publish_for(wanted, NO_REGIONS)
            assert exists.pages == pages

    threads = [threading.Thread(target=publish, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.next_slot == FIRST_SLOT + 2 * PAGES
    content = b"".join(guest.memory[:] for guest in guests)
    expected = digest_pages(content, store.seed)
    assert store.file is not None
    assert store.file.published_digests()[FIRST_SLOT:].tolist() == expected.tolist()
    assert len(store.tree) == 2 * PAGES
    address = publisher.address(np.array([FIRST_SLOT + PAGES + 7], dtype=np.int32))
    page = ctypes.string_at(int(address[0]), PAGE_BYTES)
    assert page == guests[1].memory[7 * PAGE_BYTES : 8 * PAGE_BYTES]


def test_who_waits_goes_on_when_its_own_part_is_there(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only when all is that another VM has published."""
    begun, goes_on = threading.Event(), threading.Event()
    pieces: list[str] = []

    def hook(step: str) -> None:
        if step == "published":
            pieces.append(threading.current_thread().name)
            if len(pieces) == 2:
                begun.set()
                assert goes_on.wait(30)

    monkeypatch.setattr("vmdedup.faults.hook", hook)
    other = threading.Thread(
        target=publisher.for_vm(1).publish_for, args=(shown(0, 2 * PAGES), NO_REGIONS), name="other"
    )
    other.start()
    assert begun.wait(30)
    try:
        exists = publisher.for_vm(0).publish_for(shown(0, 200), NO_REGIONS)
        assert exists.pages == 200
        assert pieces == ["other", "other"]
        assert other.is_alive()
    finally:
        goes_on.set()
        other.join()
    assert set(pieces) == {"other"}
    assert sources(publisher, 1) == PAGES


def test_a_slot_counts_as_mapped_only_where_it_is_merged(store: DomainStore) -> None:
    """A killed engine may leave a VM a shared mapping, of all slots, discarded ones too."""
    assert store.file is not None
    content = np.random.default_rng(3).integers(0, 256, (4, PAGE_BYTES)).astype(np.uint8)
    first = store.file.publish(content, digest_pages(content.reshape(-1).data, store.seed))
    store.file.discard(np.array([first]))
    fd, length = store.file.open_read_only(), (first + 4) * PAGE_BYTES
    try:
        with mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ):
            assert not usage_of(store.file).mapped.any()
        place = (first + 1) * PAGE_BYTES
        with mmap.mmap(fd, 2 * PAGE_BYTES, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=place):
            assert np.flatnonzero(usage_of(store.file).mapped).tolist() == [first + 1, first + 2]
    finally:
        os.close(fd)


def test_what_is_not_to_be_shared_across_nodes_is_published_on_its_own_node(
    guests: list[Guest],
) -> None:
    """And found there again by the next engine. A VM that has ended keeps nobody waiting."""
    guest, gone = guests
    with subprocess.Popen(["true"]) as ended:
        gone.pid = ended.pid
    with tempfile.TemporaryDirectory(prefix="vmdedup-test-", dir="/dev/shm") as folder:
        store = open_domain_store(Path(folder), "some", by_node=True)
        node = nodes_of(guest.pid, guest.space.hva(np.arange(PAGES)))
        assert NO_NODE not in node
        key = apart_by_node(digest_pages(guest.memory[:], store.seed), node, store.seed)
        vm = np.repeat(np.arange(2, dtype=np.int32), PAGES)
        new = NewPages(store.next_slot, vm, np.tile(np.arange(PAGES), 2), np.tile(key, 2))
        told: list[int] = []
        with Publisher(store, guests, new, lambda digest: told.extend(digest.tolist())) as one:
            assert one.for_vm(0).publish_for(shown(0, 2 * PAGES), NO_REGIONS).pages == 2 * PAGES
            slot = (FIRST_SLOT + np.arange(2 * PAGES)).astype(np.int32)
            assert one.is_as_nominated(slot).tolist() == [True] * PAGES + [False] * PAGES
        assert set(told) == {zero_digest(store.seed)}
        assert store.file is not None
        assert store.file.nodes(np.arange(FIRST_SLOT, FIRST_SLOT + PAGES)).tolist() == node.tolist()
        assert store.tree.search(key).tolist() == slot[:PAGES].tolist()
        fd = store.file.open_read_only()
        place = (FIRST_SLOT + 3) * PAGE_BYTES
        with mmap.mmap(fd, 2 * PAGE_BYTES, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=place):
            store.close()
            again = open_domain_store(Path(folder), "some", by_node=True)
            again.close()
        os.close(fd)
    assert len(again.tree) == 2
    assert again.tree.search(key[2:6]).tolist() == [NOT_FOUND, *slot[3:5].tolist(), NOT_FOUND]


def test_a_vm_that_cannot_be_read_publishes_nothing_of_its_own_and_the_others_go_on(
    store: DomainStore, guests: list[Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its read may end at any later time: then it must not write into what others publish."""
    require(root_missing())
    monkeypatch.setattr(bounded, "LIMIT_S", 0.3)
    with hostile_process() as hostile:
        stuck = Guest("stuck", hostile.pid)
        stuck.space = PageSpace([Span(int(hostile.never[0]), len(hostile.never) * PAGE_BYTES)])
        count = len(hostile.never)
        digest = digest_pages(guests[0].memory[:], store.seed)
        vm = np.repeat(np.arange(2, dtype=np.int32), [count, PAGES])
        page = np.concatenate([np.arange(count), np.arange(PAGES)])
        new = NewPages(store.next_slot, vm, page, np.concatenate([digest[:count], digest]))
        with Publisher(store, [stuck, guests[0]], new, lambda _: None) as publisher:
            publisher.for_vm(0).publish_for(shown(0, count), NO_REGIONS)
            hostile.serve()
            publisher.for_vm(1).publish_for(shown(0, count + PAGES), NO_REGIONS)
            slot = (FIRST_SLOT + np.arange(count + PAGES)).astype(np.int32)
            found = publisher.is_as_nominated(slot)
            own = publisher.is_source(1, np.arange(PAGES), slot[count:], 0)
    assert found.tolist() == [False] * count + [True] * PAGES
    assert own.all()
    assert store.file is not None
    published = store.file.published_digests()[FIRST_SLOT:]
    assert published.tolist() == [zero_digest(store.seed)] * count + digest.tolist()
    store_pages = store.file.path.read_bytes()[(FIRST_SLOT + count) * PAGE_BYTES :]
    assert store_pages == guests[0].memory[:]


def test_a_store_whose_room_is_not_known_takes_no_more_pages(
    store: DomainStore, guests: list[Guest]
) -> None:
    assert store.file is not None
    new = NewPages(
        store.next_slot,
        np.zeros(PAGES, dtype=np.int32),
        np.arange(PAGES),
        digest_pages(guests[0].memory[:], store.seed),
    )
    beside = RamFiles(store.file.path.parent / "gone")
    with Publisher(store, guests, new, lambda _: None, beside) as publisher:
        exists = publisher.for_vm(0).publish_for(shown(0, PAGES), NO_REGIONS)
        assert publisher.shortage == f"store {store.file.path}: No such file or directory"
    assert exists.pages == 0
    assert store.next_slot == FIRST_SLOT
