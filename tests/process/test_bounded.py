"""Reads of a process that keeps them from ending, and of others meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.images import REPOSITORY
from tests.harness.kernel import becomes_true
from tests.harness.skips import require
from vmdedup.errors import InjectionError, StuckError, VmGoneError
from vmdedup.guest.page_reader import copies_at, digests_at, equal_at
from vmdedup.guest.vm_readv import PageVanishedError, page_buffer, read_runs, write_runs
from vmdedup.inject.remote import RemoteThread
from vmdedup.inject.scratch_files import scratch_mappings
from vmdedup.linux import bounded, syscall_batch
from vmdedup.linux.syscall_batch import call_columns
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = 8

# Has pages whose faults nobody serves; on a line of input it serves them, by letting go.
HOSTILE = """
import ctypes, mmap, os, sys
from vmdedup.linux import syscalls
from vmdedup.linux.syscalls import NR
memory = mmap.mmap(-1, 16 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
memory[: 8 * 4096] = bytes(range(8)) * 4096
fd = syscalls.syscall(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
words = ctypes.c_ulong * 4
syscalls.ioctl(fd, 0xC018AA3F, words(0xAA, 0, 0, 0))
syscalls.ioctl(fd, 0xC020AA00, words(address + 8 * 4096, 8 * 4096, 1, 0))
print(address, flush=True)
sys.stdin.readline()
os.close(fd)
print("served", flush=True)
sys.stdin.readline()
"""


class Hostile:
    """The process; its first eight pages are there, the other eight never come."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", HOSTILE]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe)
        self.pid = self.process.pid
        first = int(self.hear())
        pages = np.arange(PAGES) * PAGE_BYTES
        self.there, self.never = first + pages, first + PAGES * PAGE_BYTES + pages

    def hear(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def serve(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        assert self.hear() == b"served"


@contextmanager
def hostile_process() -> Iterator[Hostile]:
    hostile = Hostile()
    try:
        yield hostile
    finally:
        hostile.process.kill()
        hostile.process.communicate()


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    require(root_missing())
    monkeypatch.setattr(bounded, "LIMIT_S", 0.3)
    with hostile_process() as running:
        yield running


def run_of(address: np.ndarray, pages: int = 1) -> tuple[np.ndarray, np.ndarray]:
    return address[:1], np.array([pages])


def content(hostile: Hostile) -> bytes:
    return read_runs("vm", hostile.pid, *run_of(hostile.there), page_buffer(1)).tobytes()


def test_a_thread_that_is_held_meanwhile_is_let_go(hostile: Hostile) -> None:
    beside = [(int(hostile.never[0]), int(hostile.never[-1]) + PAGE_BYTES)]

    def look_at_ram() -> None:
        with RemoteThread(
            "vm", hostile.pid, hostile.pid, require_futex=False, beside=beside
        ) as remote:
            remote.hold()
            remote.require_there(hostile.never[:1])

    with pytest.raises(InjectionError, match="its memory cannot be read"):
        look_at_ram()
    assert "TracerPid:\t0\n" in Path(f"/proc/{hostile.pid}/status").read_text()
    hostile.serve()
    assert becomes_true(lambda: reads(hostile))
    look_at_ram()
    assert scratch_mappings(hostile.pid) == []


def test_a_page_that_never_comes_is_given_up(hostile: Hostile) -> None:
    """Of that process nothing is read any more until it comes; others are read all the while."""
    with pytest.raises(StuckError, match="its memory cannot be read") as failure:
        digests_at("vm", hostile.pid, hostile.never, 1)
    assert failure.value.began_now
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(StuckError) as failure:
            content(hostile)
        assert not failure.value.began_now
    assert time.monotonic() - began < 10
    own = np.arange(4 * PAGE_BYTES, dtype=np.uint32).view(np.uint8)
    at = np.array([(own.ctypes.data // PAGE_BYTES + 1) * PAGE_BYTES])
    read = read_runs("me", os.getpid(), at, np.array([2]), page_buffer(2))
    begin = int(at[0]) - own.ctypes.data
    assert read.tobytes() == own[begin : begin + 2 * PAGE_BYTES].tobytes()
    hostile.serve()
    assert becomes_true(lambda: reads(hostile))
    assert content(hostile) == bytes(range(8)) * 512


def reads(hostile: Hostile) -> bool:
    try:
        content(hostile)
    except StuckError:
        return False
    return True


@pytest.mark.parametrize("way", ["digests", "copies", "equal", "read", "write"])
def test_no_way_to_its_memory_waits(way: str, hostile: Hostile) -> None:
    buffer = page_buffer(PAGES)
    expected = buffer.ctypes.data + np.zeros(PAGES, dtype=np.int64)
    run = run_of(hostile.never)
    ways: dict[str, Callable[[], object]] = {
        "digests": lambda: digests_at("vm", hostile.pid, hostile.never, 1),
        "copies": lambda: copies_at("vm", hostile.pid, hostile.never, 1, buffer),
        "equal": lambda: equal_at("vm", hostile.pid, hostile.never, expected),
        "read": lambda: read_runs("vm", hostile.pid, *run, buffer),
        "write": lambda: write_runs("vm", hostile.pid, *run, buffer),
    }
    with pytest.raises(StuckError):
        ways[way]()


def test_what_was_left_behind_still_has_its_memory(hostile: Hostile) -> None:
    """The copy goes where it was asked to, however late, and nowhere else."""
    buffer = page_buffer(1)
    buffer[:] = 7
    with pytest.raises(StuckError):
        read_runs("vm", hostile.pid, *run_of(hostile.never), buffer)
    others = [np.full((1, PAGE_BYTES), 7, dtype=np.uint8) for _ in range(64)]
    hostile.serve()
    assert becomes_true(lambda: not buffer.any())
    assert all((other == 7).all() for other in others)


def test_the_end_of_the_process_ends_the_read(hostile: Hostile) -> None:
    with pytest.raises(StuckError):
        digests_at("vm", hostile.pid, hostile.never, 1)
    hostile.process.kill()
    hostile.process.wait()
    with pytest.raises(VmGoneError):
        content(hostile)
    assert becomes_true(lambda: not bounded._pool._left or not bounded._pool.is_stuck(hostile.pid))


def test_slow_is_not_stuck(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as something ends, it is waited for; and who waits shows that it lives."""
    beats: list[int] = []

    class Told:
        def beat(self) -> None:
            beats.append(threading.get_native_id())

    told = Told()
    bounded.tell_while_waiting(told)
    monkeypatch.setattr(bounded, "LIMIT_S", 1.5)
    nap = np.array([0, 300_000_000], dtype=np.int64)
    rows = call_columns(NR.CLOCK_NANOSLEEP, 1, 0, nap.ctypes.data, np.zeros(8, dtype=np.int64))
    assert bounded.run("vm", hostile.pid, rows, nap).tolist() == [0] * 8
    assert set(beats) == {threading.get_native_id()}
    del told


@pytest.mark.parametrize("native", [True, False])
def test_results_are_those_of_the_calls(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From many threads at once, also where executable memory is denied to us."""
    monkeypatch.setattr(bounded, "_pool", bounded._Pool())
    if not native:
        monkeypatch.setattr(bounded, "loop_address", lambda: None)
        monkeypatch.setattr(syscall_batch, "_loop", lambda: None)
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            own = np.random.default_rng(seed).integers(0, 256, 64 * PAGE_BYTES, dtype=np.uint8)
            first = own.ctypes.data + -own.ctypes.data % PAGE_BYTES
            address = first + np.arange(63) * PAGE_BYTES
            for _ in range(20):
                read = read_runs("me", os.getpid(), address[:1], np.array([63]), page_buffer(63))
                begin = first - own.ctypes.data
                assert read.tobytes() == own[begin : begin + 63 * PAGE_BYTES].tobytes()
                with pytest.raises(PageVanishedError):
                    read_runs("me", os.getpid(), np.array([4096]), np.array([1]), page_buffer(1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
