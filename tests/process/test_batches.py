"""Results and effects of injected calls, by stub and by chain."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from tests.harness.kernel import becomes_true
from tests.process.victims import Victim
from vmdedup.errors import BorderError, InjectionError
from vmdedup.inject.remote import RemoteThread, call_rows
from vmdedup.inject.table import HEADER_BYTES, ROW_BYTES, W_END
from vmdedup.inject.x86_64 import WORD
from vmdedup.linux.maps import read_maps
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process

_POLL = 7
_ANONYMOUS = (3, 0x22, (1 << 64) - 1, 0)  # PROT_READ|WRITE, MAP_PRIVATE|ANONYMOUS, no fd


@pytest.mark.parametrize("program", ["dynamic", "static"])
def test_calls_return_what_they_return_there(
    programs: dict[str, Path], program: str, stub: bool
) -> None:
    with Victim(programs[program]) as victim:
        with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
            assert remote.uses_stub == stub
            assert remote.call(NR.GETPID) == victim.pid
            address = remote.call(NR.MMAP, 0, 8192, *_ANONYMOUS)
            assert read_maps("victim", victim.pid).covers(address, address + 8192)
            assert remote.call(NR.MUNMAP, address, 8192) == 0
            assert not len(read_maps("victim", victim.pid).within(address, address + 8192))
            with pytest.raises(OSError, match="munmap inside victim") as failure:
                remote.call(NR.MUNMAP, 1, 4096)
            assert failure.value.errno == errno.EINVAL
        victim.require_no_scratch()
        victim.require_healthy()


def test_a_batch_of_a_thousand(victim: Victim, stub: bool) -> None:
    calls = call_rows([(NR.GETPID,), (NR.CLOSE, 9999), (NR.MADVISE, 0, 0, 0)] * 333)
    expected = np.array([victim.pid, -errno.EBADF, 0] * 333)
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
        for _ in range(20):
            remote.hold()
            remote.launch(calls)
            assert np.array_equal(remote.wait(10), expected)
    victim.require_healthy()


def test_all_six_arguments_arrive(victim: Victim, stub: bool, tmp_path: Path) -> None:
    file = tmp_path / "content"
    file.write_bytes(b"a" * 4096 + b"b" * 4096)
    name = str(file).encode() + b"\0"
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
        page = remote.call(NR.MMAP, 0, 4096, *_ANONYMOUS)
        with open(f"/proc/{victim.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(page)
            memory.write(name)
            fd = remote.call(2, page, os.O_RDONLY)  # open
            mapped = remote.call(NR.MMAP, page, 4096, 1, 0x12, fd, 4096)  # MAP_PRIVATE|FIXED
            assert mapped == page
            memory.seek(page)
            assert memory.read(4096) == b"b" * 4096
        remote.call(NR.CLOSE, fd)
    victim.require_healthy()


@pytest.mark.parametrize("shape", [(0, 7), (5, 6), (9, 7)])
def test_a_batch_of_another_shape_is_refused_and_the_thread_let_go(
    victim: Victim, shape: tuple[int, int], stub: bool
) -> None:
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub, max_calls=8) as remote:
        remote.hold()
        with pytest.raises(ValueError, match="shape"):
            remote.launch(np.zeros(shape, dtype=np.uint64))
        victim.enter("nanosleep", 1)
        assert victim.result().result == 0
        assert remote.call(NR.GETPID) == victim.pid


def test_a_released_thread_goes_on(victim: Victim, stub: bool) -> None:
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
        remote.hold()
        victim.enter("nanosleep", 1)
        assert not victim.has_answer(0)
        remote.release()
        assert victim.result().result == 0
        assert remote.call(NR.GETPID) == victim.pid


def test_a_batch_ends_after_a_result_below_its_floor(victim: Victim) -> None:
    calls = call_rows([(NR.GETPID,), (NR.CLOSE, 9999), (NR.GETPID,), (NR.GETPID,)])
    floors = np.zeros(4, dtype=np.int64)
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        remote.hold()
        remote.launch(calls, floors)
        cancelled = -errno.ECANCELED
        assert remote.wait(10).tolist() == [victim.pid, -errno.EBADF, cancelled, cancelled]
        floors[1] = -errno.EBADF
        remote.hold()
        remote.launch(calls, floors)
        assert remote.wait(10).tolist() == [victim.pid, -errno.EBADF, victim.pid, victim.pid]


def test_floors_need_the_stub(victim: Victim) -> None:
    with RemoteThread("victim", victim.pid, victim.worker, stub=False) as remote:
        remote.hold()
        with pytest.raises(InjectionError, match="needs the stub"):
            remote.launch(call_rows([(NR.GETPID,)]), np.zeros(1, dtype=np.int64))
        assert remote.call(NR.GETPID) == victim.pid


def test_a_cancelled_batch_begins_no_further_call(victim: Victim) -> None:
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        remote.hold()
        remote.launch(call_rows([(_POLL, 0, 0, 100)] * 1000))
        remote.cancel()
        results = remote.wait(30)
        ran = int(np.count_nonzero(results == 0))
        assert ran < 1000
        assert (results[ran:] == -errno.ECANCELED).all()
        assert remote.call(NR.GETPID) == victim.pid
    victim.require_healthy()


def test_waiting_too_short_harms_nothing(victim: Victim, stub: bool) -> None:
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
        remote.hold()
        remote.launch(call_rows([(_POLL, 0, 0, 300), (NR.GETPID,)]))
        with pytest.raises(InjectionError, match="did not end") as failure:
            remote.wait(0.01)
        assert failure.value.started
        with pytest.raises(RuntimeError, match="not held"):
            remote.launch(call_rows([(NR.GETPID,)]))
        remote.hold()  # waits until the batch has ended
        remote.release()
        assert remote.wait(10).tolist() == [0, victim.pid]
    victim.require_healthy()


def test_the_code_page_can_not_be_written(victim: Victim) -> None:
    with RemoteThread("victim", victim.pid, victim.worker):
        maps = read_maps("victim", victim.pid)
        rows = [maps.row(i) for i, path in enumerate(maps.path) if "vmdedup-stub" in path]
        assert [row.permissions for row in rows] == ["r-xp"]
        link = f"/proc/{victim.pid}/map_files/{rows[0].start:x}-{rows[0].end:x}"
        fd = os.open(link, os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"\xcc", 0)
        finally:
            os.close(fd)


def test_scratch_that_was_unmapped_is_noticed(victim: Victim, stub: bool) -> None:
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
        maps = read_maps("victim", victim.pid)
        table = next(maps.row(i) for i, path in enumerate(maps.path) if "vmdedup-table" in path)
        # Unmapping only the rows would crash the stub itself: take the header's page
        # away by a second chain, as a program with a bug could.
        remote._session.scratch.hold(for_chain=True)
        remote._session.thread.run_on_stack(call_rows([(NR.MUNMAP, table.start, 4096)]))
        remote.hold()
        with pytest.raises(InjectionError, match="not there any more"):
            remote.launch(call_rows([(NR.GETPID,)]))
    victim.require_healthy()
    victim.require_no_scratch()


def test_a_session_owns_so_many_descriptors_at_most(victim: Victim) -> None:
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        with pytest.raises(InjectionError, match="more than 64 descriptors"):
            remote.own([0] * 65)
        owned = remote.own([0] * 64)
        assert len(set(owned)) == 64
        assert remote.own([]) == []
        with pytest.raises(OSError, match="close inside victim"):
            remote.call(NR.CLOSE, owned[0])
    victim.require_healthy()


def test_an_end_that_lies_outside_of_the_batch_is_not_believed(victim: Victim) -> None:
    """The process can write into the table: its number must not become an index of ours."""
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        remote.hold()
        remote.launch(call_rows([(NR.GETPID,)] * 4))
        assert remote.wait(10).tolist() == [victim.pid] * 4
        remote.hold()
        remote.launch(call_rows([(NR.GETPID,)] * 4))
        assert becomes_true(lambda: remote._session.scratch.table.done)
        address = remote.table_addresses[1]
        for end in (1, address, address + HEADER_BYTES + 5 * ROW_BYTES):
            with open(f"/proc/{victim.pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(address + W_END * WORD)
                memory.write(end.to_bytes(8, "little"))
            with pytest.raises(BorderError, match="a batch of 4 calls ended at"):
                remote.wait(10)
        assert remote.call(NR.GETPID) == victim.pid
    victim.require_healthy()
    victim.require_no_scratch()
