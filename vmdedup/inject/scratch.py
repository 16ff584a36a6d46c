"""Scratch memory inside the target: made, checked, removed.

Owns the stub page and the table inside another process, from the first
memfd_create to the last munmap. All calls run as chains on a borrowed thread's stack.
Promises: the code page is never writable, by anybody; no existing mapping of the
target is mapped over; what a killed predecessor left is removed, unless one of its
batches may still be under way or its maker still runs.

A `kill -9` at any instant leaves at most two small files' mappings or descriptors in
the target. They are named after us, and the next session removes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vmdedup.errors import VmError, VmGoneError
from vmdedup.inject.borrow import BorrowedThread, FaultPoint
from vmdedup.inject.scratch_files import (
    Scratch,
    ScratchNames,
    scratch_fds,
    scratch_mappings,
    table_of,
)
from vmdedup.inject.stub import STUB
from vmdedup.inject.table import (
    CHAIN_RUNS,
    IDLE,
    MAGIC,
    W_BUSY,
    W_MAGIC,
    W_NONCE,
    W_RSP,
    W_TID,
    Table,
    launched_header,
    left_owned,
)
from vmdedup.inject.x86_64 import RED_ZONE_BYTES, WORD, Registers, chain_bytes
from vmdedup.linux import mman, syscalls
from vmdedup.linux.maps import Vma
from vmdedup.linux.process import Process, read_process_id
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

_XSAVE_MOST_BYTES = 16 << 10

Uint64s = npt.NDArray[np.uint64]
Calls = list[tuple[int, ...]]


class ScratchArea:
    """The scratch of one session. `create` it, then `remove` it, then `close`."""

    open_nonces: ClassVar[set[int]] = set()
    """Nonces of this process's open sessions: only their scratch is in use, no other of ours."""

    def __init__(
        self,
        process: Process,
        thread: BorrowedThread,
        *,
        stub: bool,
        max_calls: int,
        workspace_bytes: int,
        fault: FaultPoint,
        beside: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._beside = beside
        self._process = process
        self._thread = thread
        self._fault = fault
        self._max_calls = max_calls
        self._workspace_bytes = workspace_bytes
        self._names = ScratchNames.fresh()
        self._table: Table | None = None
        self._size_bytes = 0
        self.has_stub = stub
        """Whether the code page is wanted; after `create`, whether there is one."""
        self.code_address = 0
        """Address of the stub inside the target; the table follows one page later."""
        self._known: list[tuple[int, int]] | None = None
        """All its mappings, (address, size in bytes); `None` if they are not certain."""
        self.open_nonces.add(self._names.nonce)

    def close(self) -> None:
        """Unmap our own mapping; the target is not touched."""
        self.open_nonces.discard(self._names.nonce)
        if self._table is not None:
            self._table.close()
            self._table = None

    @property
    def table(self) -> Table:
        """Our view of the table."""
        assert self._table is not None, "there is no scratch memory"
        return self._table

    @property
    def table_address(self) -> int:
        """Address of the table inside the target."""
        return self.code_address + PAGE_BYTES

    # --- when it may be touched ---------------------------------------------------

    def hold(self, *, for_chain: bool) -> None:
        """Hold the thread once no earlier batch can touch the table."""
        self._thread.hold(
            for_chain=for_chain, in_use=self._batch_runs, still_there=self._still_inside
        )

    def _batch_runs(self) -> str | None:
        """The reason to wait, by the table alone, without disturbing the thread."""
        table = self._table
        if table is None or table.busy == IDLE or (table.busy == CHAIN_RUNS and table.done):
            return None
        return "the last batch is still running"

    def _still_inside(self, registers: Registers) -> str | None:
        """The reason to wait if the thread, after its results, has not left the scratch yet."""
        if self._table is None or self.code_address == 0:
            return None
        inside = range(self.code_address, self.code_address + self._size_bytes)
        if registers.rip in inside or registers.rsp in inside:
            return "the last batch is just ending"  # uncovered: it ends in microseconds
        self._table.header[W_BUSY] = IDLE
        return None

    def require_intact(self) -> None:
        """Raise unless table and stub are mapped in the target now, while the thread is held."""
        if self._what_is_there() < (True, self.has_stub):
            self._process.require_alive()
            raise self._thread.error("its scratch memory is not there any more")

    def _what_is_there(self) -> tuple[bool, bool]:
        """Whether the table is mapped, and whether the stub is: by one read."""
        header, stub = self._thread.read_all(
            [(self.table_address, 2 * WORD), (self.code_address, len(STUB))]
        )
        ours = self.table.header[[W_MAGIC, W_NONCE]]
        return np.array_equal(np.frombuffer(header, dtype=np.uint64), ours), stub == STUB

    # --- create ---------------------------------------------------------------------

    def create(self) -> None:
        """Map table and stub in the target and the table here.

        Raises InjectionError or VmGoneError; then nothing of them stays in a
        target that lives.
        """
        try:
            self._create()
        except BaseException:
            self._remove_after_failure()
            raise

    def _create(self) -> None:
        self.hold(for_chain=True)
        mapped = self._mappings()
        opened = scratch_fds(self._process.pid, vm=self._process.vm)
        self._require_no_other([scratch for scratch, _ in [*mapped, *opened]])
        self._make_files(self._cleaning_calls(mapped, [fd for _, fd in opened]))
        self.hold(for_chain=True)
        fds = {scratch.is_table: fd for scratch, fd in self._own_fds()}
        if True not in fds:
            reason = "memfd_create was refused inside it (descriptor limit, seccomp, memfd_noexec)"
            raise self._thread.error(reason)
        self._take_table(fds[True])
        if False in fds:
            self._write_stub(fds[False])
        self._fault("copied")
        self._thread.run_on_stack(self._mapping_calls(fds))
        self.hold(for_chain=True)
        self._require_mapped(with_stub=False in fds)
        if self.has_stub:
            self._known = [(self.code_address, self._size_bytes)]
        self._thread.release()

    def note_room(self, address: int, size_bytes: int) -> None:
        """Note another mapping of the table's file."""
        if self._known is not None:
            self._known.append((address, size_bytes))

    def _make_files(self, before: Calls) -> None:
        """Run `before`, then memfd_create for both files."""
        data = self._names.table.encode() + b"\0" + self._names.stub.encode() + b"\0"
        address = self._thread.data_address(len(data))
        calls = [*before, (NR.MEMFD_CREATE, address, _memfd_flags(mman.MFD_NOEXEC_SEAL))]
        if self.has_stub:
            stub_name = address + len(self._names.table) + 1
            calls.append((NR.MEMFD_CREATE, stub_name, _memfd_flags(mman.MFD_EXEC)))
        self._thread.run_on_stack(call_rows(calls), data)

    def _take_table(self, remote_fd: int) -> None:
        """Copy the table's descriptor, size the file and map it here."""
        store = self._thread.gadgets.store
        frames_bytes = chain_bytes(self._max_calls + 2, _XSAVE_MOST_BYTES, store)
        size_bytes = Table.size_bytes(self._max_calls, max(frames_bytes, self._workspace_bytes))
        fd = self._copy_fd(remote_fd)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._table = Table(fd, size_bytes, self._max_calls)
        finally:
            os.close(fd)
        header = self._table.header
        header[W_NONCE], header[W_TID] = self._names.nonce, self._thread.tid
        header[W_MAGIC] = MAGIC
        self._size_bytes = PAGE_BYTES + size_bytes

    def _write_stub(self, remote_fd: int) -> None:
        """Write the stub into its file, which nobody can write from then on."""
        fd = self._copy_fd(remote_fd)
        try:
            os.pwrite(fd, STUB.ljust(PAGE_BYTES, b"\xcc"), 0)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        finally:
            os.close(fd)

    def _copy_fd(self, remote_fd: int) -> int:
        try:
            return syscalls.pidfd_getfd(self._process.pidfd, remote_fd)
        except ProcessLookupError as error:  # uncovered: /proc still had its descriptors
            raise VmGoneError(
                self._process.vm, "the VM's process ended", pid=self._process.pid
            ) from error
        except OSError as error:
            raise self._thread.error(f"no descriptor could be copied from it: {error}") from error

    def _mapping_calls(self, fds: dict[bool, int]) -> Uint64s:
        """Calls that map table and stub side by side and close their descriptors."""
        self.code_address = self._thread.free_gap()
        # SAFETY: MAP_FIXED_NOREPLACE never touches a mapping that exists.
        table = (mman.PROT_READ_WRITE, mman.MAP_SHARED | mman.MAP_FIXED_NOREPLACE, fds[True], 0)
        table_bytes = self._size_bytes - PAGE_BYTES
        calls: Calls = [(NR.MMAP, self.table_address, table_bytes, *table)]
        if False in fds:
            stub = (mman.PROT_READ_EXEC, mman.MAP_PRIVATE | mman.MAP_FIXED_NOREPLACE, fds[False], 0)
            calls.append((NR.MMAP, self.code_address, PAGE_BYTES, *stub))
        calls += [(NR.CLOSE, fd) for fd in fds.values()]
        return call_rows(calls)

    def _require_mapped(self, *, with_stub: bool) -> None:
        """Check whether the mapping calls did what they should."""
        table_is_there, stub_is_there = self._what_is_there()
        if not table_is_there:
            self._thread.landmarks.forget()
            reason = "scratch memory could not be mapped inside it (address space or VMA limit)"
            raise self._thread.error(reason)
        self.has_stub = with_stub and stub_is_there
        if not self.has_stub and self._thread.gadgets.store is None:
            raise self._thread.error("neither stub nor chain can deliver results in it")

    # --- remove ---------------------------------------------------------------------

    def remove(self) -> None:
        """Unmap both files and close both descriptors in the target, as far as they exist.

        The thread continues in any case. What cannot be found now (we have no descriptor
        left to look) stays until the next session on this process.
        """
        try:
            self.hold(for_chain=True)
            if self._known is None:
                calls = _unmap([vma for _, vma in self._own_mappings()])
                calls += [(NR.CLOSE, fd) for _, fd in self._own_fds()]
                calls += self._disowning_calls()
            else:
                # Searching takes milliseconds if a VM has thousands of mappings.
                # The chain that mapped the files has closed their descriptors too.
                calls = [(NR.MUNMAP, *mapped) for mapped in self._known]
                calls += self._disowning_calls()
            if calls:
                self._thread.run_on_stack(call_rows(calls))
                self.hold(for_chain=True)
        finally:
            self._thread.release()
        self._fault("removed")

    def _disowning_calls(self) -> Calls:
        # SAFETY: the calls that used the descriptors have ended. Killed before they are closed:
        # the table has their numbers while it is mapped, and a successor closes them.
        owned = [] if self._table is None else self._table.left_owned()
        return [(NR.CLOSE, fd) for fd in owned]

    def _remove_after_failure(self) -> None:
        """As `remove`, but the first failure is the one to report."""
        with suppress(VmError, OSError):
            self._thread.release()
            self.remove()

    def _own_mappings(self) -> list[tuple[Scratch, Vma]]:
        return [
            (scratch, vma)
            for scratch, vma in self._mappings()
            if scratch.nonce == self._names.nonce
        ]

    def _mappings(self) -> list[tuple[Scratch, Vma]]:
        """The scratch mappings of all sessions on this process."""
        return scratch_mappings(self._process.pid, vm=self._process.vm, beside=self._beside)

    def _own_fds(self) -> list[tuple[Scratch, int]]:
        found = scratch_fds(self._process.pid, vm=self._process.vm)
        return [(scratch, fd) for scratch, fd in found if scratch.nonce == self._names.nonce]

    # --- predecessors -----------------------------------------------------------------

    def _require_no_other(self, there: list[Scratch]) -> None:
        """Raise if a running vmdedup uses any of this scratch: it must not be removed."""
        for found in there:
            if self._in_use(found):
                raise self._thread.error(f"vmdedup (pid {found.maker.pid}) works on it already")

    def _in_use(self, scratch: Scratch) -> bool:
        if scratch.maker == read_process_id(os.getpid()):
            return is_open_here(scratch)
        return scratch.maker_runs()

    def _cleaning_calls(self, mapped: list[tuple[Scratch, Vma]], fds: list[int]) -> Calls:
        """Calls that remove predecessors' scratch that cannot be in use any more."""
        left: dict[int, list[Vma]] = {}
        for scratch, vma in mapped:
            left.setdefault(scratch.nonce, []).append(vma)
        calls: Calls = []
        # SAFETY: the thread is held, and _may_still_run rules out that a batch of
        # the predecessor is under way on it. Its descriptors are known by name; only
        # the predecessor would have closed them.
        for vmas in left.values():
            if not self._may_still_run(vmas):
                calls += _unmap(vmas)
                if (table := table_of(vmas)) is not None:
                    owned = left_owned(self._thread.read, table.start)
                    calls += [(NR.CLOSE, fd) for fd in owned]
        return calls + [(NR.CLOSE, fd) for fd in fds]

    def _may_still_run(self, vmas: list[Vma]) -> bool:
        """Whether a predecessor's batch may still be under way, by its table's header.

        A batch that was interrupted by a signal handler has a higher stack pointer
        than the thread has now.
        """
        registers = self._thread.registers
        for vma in vmas:
            if vma.start <= registers.rip < vma.end or vma.start <= registers.rsp < vma.end:
                return True
        table = table_of(vmas)
        if table is None:
            return False
        header = launched_header(self._thread.read, table.start)
        if header is None:
            return False
        was_here = int(header[W_TID]) == self._thread.tid
        return not (was_here and registers.rsp >= int(header[W_RSP]) - RED_ZONE_BYTES)


def is_open_here(scratch: Scratch) -> bool:
    """Whether an open session of this process uses this scratch."""
    is_ours = scratch.maker == read_process_id(os.getpid())
    return is_ours and scratch.nonce in ScratchArea.open_nonces


def call_rows(calls: Calls) -> Uint64s:
    """Calls of any number of arguments as rows of seven, uint64 of shape (n, 7)."""
    rows = np.zeros((len(calls), 7), dtype=np.uint64)
    for row, call in zip(rows, calls, strict=True):
        row[: len(call)] = [value & 0xFFFF_FFFF_FFFF_FFFF for value in call]
    return rows


def _unmap(vmas: Sequence[Vma]) -> Calls:
    """Calls that unmap one session's mappings: stub, table, and all of its rooms.

    SAFETY: only rooms map the table's file at an offset. Everything between the named ends of
    a room is ours, whatever is mapped over it (see RemoteThread.room).
    """
    calls: Calls = [(NR.MUNMAP, v.start, v.end - v.start) for v in vmas if not v.offset_bytes]
    rooms: dict[int, list[Vma]] = {}
    for vma in vmas:
        if vma.offset_bytes:
            rooms.setdefault(vma.start - vma.offset_bytes, []).append(vma)
    for left in rooms.values():
        start, end = min(vma.start for vma in left), max(vma.end for vma in left)
        calls.append((NR.MUNMAP, start, end - start))
    return calls


def _memfd_flags(wanted: int) -> int:
    """Flags for memfd_create, with `wanted` if this kernel knows it (Linux 6.3)."""
    flags = mman.MFD_CLOEXEC | mman.MFD_ALLOW_SEALING
    try:
        os.close(os.memfd_create("vmdedup-probe", flags | wanted))
    except OSError as error:  # uncovered: Linux before 6.3, or vm.memfd_noexec=2
        return flags if error.errno == errno.EINVAL else flags | wanted
    return flags | wanted
