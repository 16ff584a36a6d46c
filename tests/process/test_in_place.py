"""Pages of another process, digested and compared by a thread of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from tests.process.victims import Victim, fork_and
from vmdedup.core.digest import digest_pages
from vmdedup.errors import InjectionError
from vmdedup.inject.in_place import (
    WORKSPACE_BYTES,
    differ_in_place,
    digests_in_place,
    reads_safely,
)
from vmdedup.inject.remote import RemoteThread
from vmdedup.inject.scratch_files import stale_scratch
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = 9000
"""More than one batch has, and no whole number of pieces."""
_ANONYMOUS = (3, 0x22, (1 << 64) - 1, 0)  # PROT_READ|WRITE, MAP_PRIVATE|ANONYMOUS, no fd

Int64s = npt.NDArray[np.int64]


class Memory:
    """Random pages inside the victim, every tenth of them zero, and who reads them."""

    def __init__(self, victim: Victim, remote: RemoteThread) -> None:
        self.remote = remote
        self.base = remote.call(NR.MMAP, 0, PAGES * PAGE_BYTES, *_ANONYMOUS)
        random = np.random.default_rng(5)
        words = random.integers(0, 2**63, (PAGES, PAGE_BYTES // 8), dtype=np.uint64)
        words[::10] = 0
        self.content = words.view(np.uint8)
        self.file = open(f"/proc/{victim.pid}/mem", "r+b", buffering=0)  # noqa: SIM115
        self.write(0, self.content)
        self.address = self.base + np.arange(PAGES) * PAGE_BYTES

    def write(self, page: int, content: npt.NDArray[np.uint8]) -> None:
        self.file.seek(self.base + page * PAGE_BYTES)
        assert self.file.write(content.reshape(-1).data) == content.nbytes

    def run(self, rows: npt.NDArray[np.uint64], _reads: Int64s) -> Int64s:
        self.remote.hold()
        self.remote.launch(rows)
        return self.remote.wait(10)

    def differ(self, page: Int64s, other: Int64s) -> npt.NDArray[np.bool_]:
        """`other`: page numbers, -1 for zeroes."""
        address = np.where(other < 0, 0, self.address[other])
        return differ_in_place(self.remote, self.run, self.address[page], address)


@pytest.fixture
def memory(victim: Victim) -> Iterator[Memory]:
    with RemoteThread(
        "victim", victim.pid, victim.worker, max_calls=64, workspace_bytes=WORKSPACE_BYTES
    ) as remote:
        assert remote.uses_stub
        memory = Memory(victim, remote)
        with memory.file:
            yield memory
    victim.require_no_scratch()
    victim.require_healthy()


@pytest.mark.parametrize("seed", [0, 1, 0x1234_5678_9ABC_DEF0, (1 << 64) - 1])
def test_digests_are_those_of_the_library(memory: Memory, seed: int) -> None:
    found = digests_in_place(memory.remote, memory.run, memory.address, seed)
    assert np.array_equal(found, digest_pages(memory.content.reshape(-1).data, seed))


def test_digests_of_scattered_pages(memory: Memory) -> None:
    page = np.flatnonzero(np.random.default_rng(6).random(PAGES) < 0.4)
    found = digests_in_place(memory.remote, memory.run, memory.address[page], 7)
    assert np.array_equal(found, digest_pages(memory.content[page].reshape(-1).data, 7))


def test_one_differing_bit_anywhere_is_seen(memory: Memory) -> None:
    random = np.random.default_rng(8)
    page, other = np.arange(1, 400), np.arange(1001, 1400)
    memory.write(1001, memory.content[1:400])
    assert not memory.differ(page, other).any()
    changed = np.sort(random.choice(len(other), 40, replace=False))
    copy = memory.content[1:400].copy()
    at = random.integers(0, PAGE_BYTES, len(changed))
    at[:4] = [0, 15, 63, PAGE_BYTES - 1]
    copy[changed, at] ^= (1 << random.integers(0, 8, len(changed))).astype(np.uint8)
    memory.write(1001, copy)
    assert np.flatnonzero(memory.differ(page, other)).tolist() == changed.tolist()


def test_pages_of_zeroes_are_told_from_others(memory: Memory) -> None:
    found = memory.differ(np.arange(PAGES), np.full(PAGES, -1))
    assert np.array_equal(found, memory.content.any(axis=1))


def test_runs_against_others_anywhere(memory: Memory) -> None:
    random = np.random.default_rng(9)
    page = np.flatnonzero(random.random(PAGES) < 0.7)
    other = np.where(random.random(len(page)) < 0.3, page, random.integers(-1, PAGES, len(page)))
    shown = np.where((other < 0)[:, None], 0, memory.content[other])
    expected = (memory.content[page] != shown).any(axis=1)
    assert 0 < expected.sum() < len(page)
    assert np.array_equal(memory.differ(page, other), expected)


def test_what_was_not_run_differs_and_has_no_digest(memory: Memory) -> None:
    def cancelled(rows: npt.NDArray[np.uint64], _reads: Int64s) -> Int64s:
        memory.remote.hold()
        memory.remote.launch(rows[:1])
        return np.append(memory.remote.wait(10), np.full(len(rows) - 1, -125))

    page = np.arange(1, 200)
    found = differ_in_place(memory.remote, cancelled, memory.address[page], memory.address[page])
    assert np.flatnonzero(found)[0] == 63
    assert found[63:].all()
    with pytest.raises(InjectionError, match="ended early"):
        digests_in_place(memory.remote, cancelled, memory.address, 1)


def test_a_thread_with_all_registers_in_use_gets_them_back(victim: Victim) -> None:
    with RemoteThread(
        "victim",
        victim.pid,
        victim.busy,
        max_calls=64,
        workspace_bytes=WORKSPACE_BYTES,
        require_futex=False,
    ) as remote:
        memory = Memory(victim, remote)
        with memory.file:
            for _ in range(20):
                digests_in_place(remote, memory.run, memory.address[:600], 1)
                assert not memory.differ(np.arange(600), np.arange(600)).any()
    before = int(victim.ask("check").split()[0])
    while int(victim.ask("check").split()[0]) < before + 2:
        pass
    victim.require_healthy()


def test_killed_while_the_thread_reads(victim: Victim) -> None:
    """It reads on, ends, and is as it was; the next session removes what is left."""

    def launch_and_die() -> None:
        remote = RemoteThread(
            "victim", victim.pid, victim.busy, workspace_bytes=WORKSPACE_BYTES, require_futex=False
        )
        remote.open()
        memory = Memory(victim, remote)

        def run(rows: npt.NDArray[np.uint64], _reads: Int64s) -> Int64s:
            remote.hold()
            remote.launch(np.tile(rows, (remote.max_calls // len(rows), 1)))
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("it was killed")

        digests_in_place(remote, run, memory.address, 1)

    for _ in range(5):
        os.waitpid(fork_and(launch_and_die), 0)
        victim.require_healthy()
        assert stale_scratch(victim.pid) != []
        with RemoteThread(
            "victim", victim.pid, victim.busy, require_futex=False, hold_timeout_s=20
        ) as remote:
            assert stale_scratch(victim.pid) == []
            assert remote.call(NR.GETPID) == victim.pid
        victim.require_no_scratch()
        victim.require_healthy()


def test_memory_that_was_unplugged_is_not_read(victim: Victim) -> None:
    """It would end the process."""
    block_bytes = 512 * PAGE_BYTES
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        start = [remote.call(NR.MMAP, 0, block_bytes, *_ANONYMOUS) for _ in range(2)]
        start.sort()
        with open(f"/proc/{victim.pid}/mem", "r+b", buffering=0) as file:
            for each in start:
                file.seek(each)
                file.write(b"x" * block_bytes)
    address = np.concatenate([each + np.arange(512) * PAGE_BYTES for each in start])
    blocks = [(each, each + block_bytes) for each in start]
    with RemoteThread(
        "victim", victim.pid, victim.worker, workspace_bytes=WORKSPACE_BYTES, beside=blocks
    ) as remote:
        (digest,) = set(digests_in_place(remote, remote.run, address, 1).tolist())
        remote.call(NR.MUNMAP, start[1], block_bytes)
        with pytest.raises(InjectionError, match="not there any more"):
            digests_in_place(remote, remote.run, address, 1)
        assert not remote.stands_still
        assert set(digests_in_place(remote, remote.run, address[:512], 1).tolist()) == {digest}
        remote.call(NR.MUNMAP, start[0], block_bytes)
    victim.require_no_scratch()
    victim.require_healthy()


def test_one_session_serves_several_threads_of_ours(memory: Memory) -> None:
    """One after the other."""
    with ThreadPoolExecutor(1) as other:
        expected = digest_pages(memory.content[:600].reshape(-1).data, 1)
        arguments = (memory.remote, memory.run, memory.address[:600], 1)
        for _ in range(2):
            assert np.array_equal(digests_in_place(*arguments), expected)
            assert np.array_equal(other.submit(digests_in_place, *arguments).result(), expected)


@pytest.mark.parametrize(
    ("filesystem", "safe"), [("", True), ("memfd", True), ("tmpfs", False), ("ext4", False)]
)
def test_only_memory_that_can_not_fail_is_read_in_place(filesystem: str, safe: bool) -> None:
    assert reads_safely(filesystem) == safe
