"""Running batches of system calls on one thread of another process.

Owns a session: opening it, batches, closing it. `kill -9` of this process at
any instant leaves the target running and intact: nothing is ever stepped from
outside. Everything that was started runs to its end by itself and restores the
thread as it was (see `x86_64`).

Promises: a batch is started only while the thread is idle in futex and no
earlier batch can still touch the table; results are those that the calls
returned in the target. Scratch that a killed predecessor left is removed when
the session opens (see `scratch`).

Refuses, with the reason: a traced thread, user shadow stacks, a 32-bit process,
missing permission, a thread that does not become idle, a process that another
vmdedup works on.

A session's life, by what its thread does (`ThreadState`):

    open          CLOSED -> IDLE
    hold          IDLE, RUNNING once its batch has ended, KEPT after a `dismiss` -> HELD
    release       HELD -> as before it was held
    launch        HELD -> RUNNING; KEPT -> KEPT_RUNNING; if it fails, as `release` or `dismiss`
    note_launched KEPT -> KEPT_RUNNING
    wait          RUNNING, KEPT_RUNNING -> KEPT if it was launched to be kept, else IDLE
    dismiss       KEPT -> IDLE; KEPT_RUNNING -> RUNNING
    close         any -> CLOSED
"""

from __future__ import annotations

import fcntl
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import TracebackType

import numpy as np
import numpy.typing as npt

from vmdedup.errors import InjectionError, UnsupportedError, VmGoneError
from vmdedup.inject.borrow import BorrowedThread, FaultPoint, HangWatch, Landmarks, Unwatched
from vmdedup.inject.guard import Guard
from vmdedup.inject.scratch import ScratchArea, call_rows
from vmdedup.inject.scratch_files import stale_scratch
from vmdedup.inject.stub import GUARD_IOCTL, STUB_STACK_BYTES
from vmdedup.inject.table import (
    CHAIN_RUNS,
    HEADER_BYTES,
    MOST_OWNED,
    ROW_BYTES,
    STUB_RUNS,
    W_BUSY,
    W_DONE,
    W_RSP,
    W_SPARE,
)
from vmdedup.inject.threads import find_idle_thread
from vmdedup.inject.x86_64 import WORD, chain, entering, resumed
from vmdedup.linux import mman, syscalls
from vmdedup.linux.process import Process
from vmdedup.linux.realtime import urgent
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

__all__ = [
    "FaultPoint",
    "Landmarks",
    "RemoteThread",
    "call_rows",
    "find_idle_thread",
    "stale_scratch",
]

_FUTEX_WAKE, _EVERYONE = 1, 0x7FFF_FFFF
_MOST_ERRNO = 4095
_WAIT_SLICE_S = 0.05
_CALL_TIMEOUT_S = 10.0

Uint64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]


class ThreadState(Enum):
    """The activity of the borrowed thread, as far as this process knows."""

    CLOSED = "there is no session"
    IDLE = "it does its own work"
    HELD = "it is stopped by ptrace, so that a batch can be launched"
    RUNNING = "it runs a batch whose results were not taken"
    KEPT = "it waits inside our stub for the guard of another batch"
    KEPT_RUNNING = "it was kept, and runs another batch whose results were not taken"


_LAUNCHABLE = (ThreadState.HELD, ThreadState.KEPT)
_IS_KEPT = (ThreadState.KEPT, ThreadState.KEPT_RUNNING)
_IS_RUNNING = (ThreadState.RUNNING, ThreadState.KEPT_RUNNING)


@dataclass
class _Session:
    """The resources of an open session, and what its thread does."""

    process: Process
    thread: BorrowedThread
    scratch: ScratchArea
    exits: ExitStack
    batch: ThreadState = ThreadState.IDLE
    """The state, but for HELD: only `thread` knows that, so that the two cannot disagree."""
    calls: int = 0
    """Number of calls of the batch launched last."""
    guard: Guard | None = None
    """Guard of the batch launched last; a kept thread waits for it."""
    watched: ExitStack = field(default_factory=ExitStack)
    """The watch over a thread that is to be kept."""
    kept_since: float = 0.0
    """Monotonic time at which the thread's first batch was done and it was kept, s."""


class RemoteThread:
    """Runs batches of system calls on thread `tid` of process `pid`. A context manager.

    A batch is `hold`, `launch`, `wait`; `call` does all three for one call. After a batch
    that was launched with `keep` the thread waits for the next batch, which needs only `launch`
    and `wait`, until `dismiss`. Only `wait`, `cancel` and `dismiss` may be called on another
    Python thread than the one that opened it.

    `stub=False` runs everything by sigreturn chain, which is also the fallback if executing
    a memfd is denied. `max_calls`: the most calls of one batch. `require_futex=False` accepts
    a thread in any state: for tests, see `borrow`. `fault_point` is called with the name of
    each step that was just done. `watch` is told while the thread is stopped, and that we
    live. `landmarks`: what earlier sessions on this process found in it. `beside`: (start, end)
    spans of its RAM, which hold many mappings but no session's scratch memory.
    """

    def __init__(
        self,
        vm: str,
        pid: int,
        tid: int,
        *,
        stub: bool = True,
        max_calls: int = 1024,
        workspace_bytes: int = 0,
        require_futex: bool = True,
        hold_timeout_s: float = 2.0,
        fault_point: FaultPoint | None = None,
        watch: HangWatch | None = None,
        landmarks: Landmarks | None = None,
        beside: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.vm = vm
        self.pid = pid
        self.tid = tid
        self.max_calls = max_calls
        self._workspace_bytes = workspace_bytes
        self._stub = stub
        self._require_futex = require_futex
        self._hold_timeout_s = hold_timeout_s
        self._fault: FaultPoint = fault_point or (lambda _step: None)
        self._watch: HangWatch = watch or Unwatched()
        self._landmarks = landmarks or Landmarks()
        self._beside = beside
        self._open: _Session | None = None
        self._changing = threading.Lock()
        """Held while `wait` or `dismiss` ends a batch or a keeping."""

    @property
    def _session(self) -> _Session:
        if self._open is None:
            raise RuntimeError("the session is not open")
        return self._open

    @property
    def state(self) -> ThreadState:
        """The activity of the thread now."""
        session = self._open
        if session is None:
            return ThreadState.CLOSED
        return ThreadState.HELD if session.thread.is_held else session.batch

    @property
    def _batch(self) -> ThreadState:
        """The state, but for HELD."""
        session = self._open
        return ThreadState.CLOSED if session is None else session.batch

    @property
    def uses_stub(self) -> bool:
        """Whether batches run by stub. Only then do floors and `cancel` work."""
        return self._session.scratch.has_stub

    # --- open and close ---------------------------------------------------------

    def __enter__(self) -> RemoteThread:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `close`; an error of closing does not hide the error that ended the block."""
        try:
            self.close()
        except InjectionError:
            if error is None:
                raise

    def survey(self) -> None:
        """Find and note landmarks that sessions need, so that the first one is not slower.

        Changes nothing in the target. Raises as `open`.
        """
        with Process(self.vm, self.pid) as process:
            self._borrowed(process).survey()

    def open(self) -> None:
        """Set up scratch memory in the target, after removing a killed predecessor's.

        Raises InjectionError (nothing of ours stays in the target), VmGoneError,
        UnsupportedError on another architecture.
        """
        if self._open is not None:
            raise RuntimeError("the session is open already")
        with ExitStack() as exits:
            process = exits.enter_context(Process(self.vm, self.pid))
            thread = self._borrowed(process)
            scratch = ScratchArea(
                process,
                thread,
                stub=self._stub,
                max_calls=self.max_calls,
                workspace_bytes=self._workspace_bytes,
                fault=self._fault,
                beside=self._beside,
            )
            exits.callback(scratch.close)
            scratch.create()
            exits.enter_context(urgent(self.tid))
            self._open = _Session(process, thread, scratch, exits.pop_all())
        self._fault("opened")

    def _borrowed(self, process: Process) -> BorrowedThread:
        if platform.machine() != "x86_64":  # uncovered: another architecture
            raise UnsupportedError("x86-64", "injection needs an x86-64 machine")
        return BorrowedThread(
            process,
            self.tid,
            require_futex=self._require_futex,
            hold_timeout_s=self._hold_timeout_s,
            fault=self._fault,
            watch=self._watch,
            landmarks=self._landmarks,
        )

    def close(self) -> None:
        """Remove the scratch from the target and release it. Quiet if the process is gone.

        Raises InjectionError if the thread could not be borrowed for that: the
        scratch then stays, unused, until the next session on this process.
        """
        if self._open is None:
            return
        self.dismiss()
        session, self._open = self._open, None
        session.watched.close()
        with session.exits:
            try:
                session.thread.release()
                session.scratch.remove()
            except VmGoneError:
                return

    # --- batches ------------------------------------------------------------------

    def call(self, number: int, *args: int) -> int:
        """Run one system call in the target and return its result.

        Raises OSError with the errno that it returned there, else as `hold`,
        `launch` and `wait`.
        """
        return self._call(None, number, *args)

    def call_guarded(self, guard: Guard, number: int, *args: int) -> int:
        """As `call`, by a batch that holds the descriptor of `guard` while it runs."""
        return self._call(guard, number, *args)

    def _call(self, guard: Guard | None, number: int, *args: int) -> int:
        self.hold()
        self.launch(call_rows([(number, *args)]), guard=guard)
        result = int(self.wait(_CALL_TIMEOUT_S)[0])
        if -_MOST_ERRNO <= result < 0:
            if number == GUARD_IOCTL:
                name = "ioctl"
            else:
                name = NR(number).name.lower() if number in list(NR) else f"system call {number}"
            raise OSError(-result, f"{name} inside {self.vm}: {os.strerror(-result)}")
        return result

    def own(self, numbers: Sequence[int]) -> list[int]:
        """Make copies of these descriptors inside the target that nobody else closes.

        They belong to the session until it closes, or until this is called again. QEMU closes
        lent descriptors when our monitor disconnects. Calls that we have launched continue
        after a kill, and would map any file that has the number by then. Returns the copies'
        numbers. Raises OSError, else as `call`.
        """
        session, table = self._session, self._session.scratch.table
        before = table.owned
        calls: list[tuple[int, ...]] = [(NR.CLOSE, fd) for fd in before]
        calls += [(NR.FCNTL, fd, fcntl.F_DUPFD_CLOEXEC, 1) for fd in numbers]
        if len(numbers) > MOST_OWNED:
            raise session.thread.error(f"more than {MOST_OWNED} descriptors would be needed in it")
        if not calls:
            return []
        self.hold()
        # SAFETY: killed from here on: a successor finds in the rows which copies were made.
        table.begin_owning(len(calls))
        self.launch(call_rows(calls))
        made: list[int] = self.wait(_CALL_TIMEOUT_S)[len(before) :].tolist()
        table.end_owning([fd for fd in made if fd >= 0])
        self._fault("owned")
        for fd in made:
            if fd < 0:
                raise OSError(-fd, f"fcntl inside {self.vm}: {os.strerror(-fd)}")
        return made

    def run(self, rows: Uint64s, reads: Int64s) -> Int64s:
        """Run a batch that holds up nobody and may be ended early; results as `wait`.

        `reads`: ascending addresses of RAM that the batch reads directly. Raises as `hold`,
        `require_there`, `launch` and `wait`.
        """
        self.hold()
        self.require_there(reads)
        self.launch(rows)
        self._fault("running")
        return self.wait_or_cancel()

    def hold(self) -> None:
        """Stop the thread where a batch can be launched; then `launch` or `release` it.

        Waits (bounded) while it is busy or still leaving the last batch; a kept
        thread is dismissed first. Raises InjectionError (`started` False), VmGoneError.
        """
        self.dismiss()
        self._session.scratch.hold(for_chain=not self.uses_stub)

    def release(self) -> None:
        """Resume the held thread without running anything; does nothing if none is held."""
        self._session.thread.release()

    def require_there(self, address: Int64s) -> None:
        """Raise unless all RAM blocks that contain these ascending addresses are still mapped.

        `beside` are the blocks, each mapped as a whole. While QEMU's RCU thread stands still
        none is unmapped (softmmu/physmem.c: reclaim_ramblock). If one is already gone, the
        thread is released and InjectionError raised.
        """
        if self.state not in _LAUNCHABLE:
            raise RuntimeError("the thread does not stand still: call hold() first")
        first = np.searchsorted(address, [start for start, _ in self._beside])
        for at, (_, end) in zip(first.tolist(), self._beside, strict=True):
            if at == len(address) or address[at] >= end:
                continue
            if not self._session.thread.read(int(address[at]), 1):
                self._session.thread.release()
                self.dismiss()
                raise self.error("memory of it that was to be read is not there any more")

    @property
    def stands_still(self) -> bool:
        """Whether the thread is held or kept: a batch can be launched."""
        return self.state in (*_LAUNCHABLE, ThreadState.KEPT_RUNNING)

    @property
    def is_kept(self) -> bool:
        """Whether the thread waits for another batch's guard."""
        return self._batch in _IS_KEPT

    @property
    def kept_s(self) -> float:
        """How long the thread has been kept, since its first batch was done; else `0`."""
        session = self._open
        if session is None or session.batch not in _IS_KEPT:
            return 0.0
        return max(0.0, time.monotonic() - session.kept_since)

    def dismiss(self) -> None:
        """Resume a kept thread as it was; does nothing if none is kept. Any Python thread may.

        Must not be called while a batch is being launched or runs.
        """
        with self._changing:
            session = self._open
            if session is None or session.batch not in _IS_KEPT:
                return
            is_running = session.batch is ThreadState.KEPT_RUNNING
            session.batch = ThreadState.RUNNING if is_running else ThreadState.IDLE
            assert session.guard is not None, "a thread is kept by its guard"
            session.guard.dismiss()
            session.watched.close()

    def launch(
        self,
        calls: Uint64s,
        floors: Int64s | None = None,
        guard: Guard | None = None,
        *,
        keep: bool = False,
    ) -> None:
        """Start a batch on the thread that stands still, and resume that thread at once.

        `calls`: uint64 of shape (n, 7), the system call's number and its six
        arguments, 1 <= n <= max_calls. `floors`: int64 of shape (n,): the batch
        ends after the first result below its floor, and the rest give -ECANCELED
        (`0` for "stop at the first error"). `guard`: the batch holds a copy of that
        descriptor while it runs, and begins no call without it; all batches of a kept thread
        have the same guard. `keep`: the thread is kept afterwards. Raises if nothing was
        started; the thread is resumed then too.
        """
        session, state = self._session, self.state
        if state is ThreadState.KEPT_RUNNING:
            raise RuntimeError("a batch is running: wait() for it first")
        if state not in _LAUNCHABLE:
            raise RuntimeError("the thread is not held: call hold() first")
        is_kept = state is ThreadState.KEPT
        try:
            self._require_batch(calls, floors, guard, keep=keep)
            if not is_kept:  # a kept thread already runs the stub in the scratch
                session.scratch.require_intact()
            # SAFETY: a held thread is outside of the table and its frames (see
            # ScratchArea.hold), a kept one waits for its guard, so nobody reads them.
            # Killed while they are filled: nothing points at them, or no guard comes.
            session.scratch.table.fill(calls, floors, session.scratch.table_address)
            start = None if is_kept else self._prepare(calls, guard, keep=keep)
            if guard is not None:
                guard.owe()
            self._fault("table-filled")
        except BaseException:
            session.thread.release()
            self.dismiss()
            raise
        session.calls = len(calls)
        session.batch = ThreadState.KEPT_RUNNING if is_kept else ThreadState.RUNNING
        if start is not None:
            if keep:
                session.watched.enter_context(self._watch.watching())
            start()
        if guard is not None:
            # SAFETY: the batch runs already, or the thread waits for nothing else, so it
            # is certain to take the copy and to close it. Killed before: the batch reads
            # the stream's end and begins no call.
            guard.give()
            self._fault("guarded")

    @property
    def pidfd(self) -> int:
        """The pidfd of the process."""
        return self._session.process.pidfd

    @property
    def table_addresses(self) -> tuple[int, int]:
        """Addresses of the table here and inside the target, for filling it without `launch`."""
        scratch = self._session.scratch
        return scratch.table.address, scratch.table_address

    @property
    def workspace(self) -> tuple[int, npt.NDArray[np.uint8]]:
        """Scratch memory for a batch's own data: its address inside the target, our view.

        It has at least `workspace_bytes`, in whole pages, zeroed at first; available only if
        batches run by stub. Drop the view before the session closes.
        """
        scratch = self._session.scratch
        return scratch.table_address + scratch.table.workspace_offset, scratch.table.workspace

    def error(self, reason: str, *, started: bool = False) -> InjectionError:
        """An error about this thread, to be raised."""
        return self._session.thread.error(reason, started=started)

    def note_launched(self, calls: int, *, given: bool) -> None:
        """Note that filling the table launched a batch of `calls` calls on the kept thread.

        Not `given` its guard: it begins no call, and the thread resumes its own work.
        `wait` for it in any case.
        """
        session = self._session
        # SAFETY: nothing is required of the state here. The batch runs already, and a gate
        # must not open before `wait` has seen its end.
        session.calls, session.batch = calls, ThreadState.KEPT_RUNNING
        if not given and session.guard is not None:
            session.guard.owe()
            session.guard.withdraw()

    def _require_batch(
        self, calls: Uint64s, floors: Int64s | None, guard: Guard | None, *, keep: bool
    ) -> None:
        if calls.ndim != 2 or calls.shape[1] != 7 or not 1 <= len(calls) <= self.max_calls:
            raise ValueError(f"calls must have shape (1..{self.max_calls}, 7), not {calls.shape}")
        if (keep and guard is None) or (self.is_kept and guard is not self._session.guard):
            raise ValueError("a thread is kept by its guard, and runs no batch without")
        if (floors is not None or guard is not None) and not self.uses_stub:
            raise self._session.thread.error("a batch that may end early needs the stub")

    def _prepare(self, calls: Uint64s, guard: Guard | None, *, keep: bool) -> Callable[[], None]:
        """Write what the held thread needs besides the calls; returns the function to start it."""
        session = self._session
        scratch, table = session.scratch, session.scratch.table
        held = session.thread.registers.copy()
        table.header[W_RSP] = held.rsp
        number = None if guard is None else guard.number
        table.fill_guard(number, scratch.table_address, keep=keep)
        session.guard = guard
        if not self.uses_stub:
            return partial(session.thread.start_chain, self._write_chain(calls))
        session.thread.require_stack(STUB_STACK_BYTES)
        table.save(resumed(held, keeps_restart_block=True))
        table.header[W_BUSY] = STUB_RUNS
        return partial(session.thread.start, entering(held, scratch.code_address))

    def _write_chain(self, calls: Uint64s) -> bytes:
        """Write the batch as frames into the table; returns the frames too."""
        session = self._session
        address, table = session.scratch.table_address, session.scratch.table
        done, spare = address + W_DONE * WORD, address + W_SPARE * WORD
        # The result of getpid is not 0, so storing it marks the batch as done.
        marks = call_rows([(NR.GETPID,), (NR.FUTEX, done, _FUTEX_WAKE, _EVERYONE)])
        first = address + HEADER_BYTES + 7 * WORD
        content = chain(
            address + table.frames_offset,
            np.concatenate([calls, marks]),
            session.thread.thread(),
            session.thread.gadgets,
            [*range(first, first + len(calls) * ROW_BYTES, ROW_BYTES), done, spare],
        )
        table.write_frames(content)
        table.header[W_BUSY] = CHAIN_RUNS
        return content

    def wait(self, timeout_s: float) -> Int64s:
        """Wait for the launched batch; its results, int64 of shape (n,), -errno for failures.

        May be called from any thread. Raises InjectionError (`started` True) after
        `timeout_s`: the batch still runs to its end, `wait` may be called again.
        VmGoneError when the process ended.
        """
        session = self._session
        if session.batch not in _IS_RUNNING:
            raise RuntimeError("no batch was launched")
        table = session.scratch.table
        deadline = time.monotonic() + timeout_s
        while not table.done:
            session.process.require_alive()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                reason = f"the calls launched in it did not end within {timeout_s:g} s"
                raise session.thread.error(reason, started=True)
            syscalls.futex_wait(table.done_address, 0, min(left_s, _WAIT_SLICE_S))
        results = table.results(session.calls, session.scratch.table_address)
        with self._changing:
            if not table.keeps:
                session.batch = ThreadState.IDLE
                session.watched.close()
            else:
                if session.batch is ThreadState.RUNNING:
                    session.kept_since = time.monotonic()
                session.batch = ThreadState.KEPT
        self._fault("completed")
        return results

    def wait_or_cancel(self) -> Int64s:
        """As `wait`, with the timeout of a call; if that fails no further row is begun.

        A batch of milliseconds takes that long only if the thread gets no processor.
        """
        try:
            return self.wait(_CALL_TIMEOUT_S)
        except BaseException:
            self.cancel()
            raise

    def room(self, pages: int) -> int:
        """Address of `pages` pages inside the target, to map scratch memory over.

        They belong to the session until it closes. Map there with MAP_FIXED; memory that is
        moved away must leave its mapping behind (MREMAP_DONTUNMAP). So at every instant the
        whole range is ours. Its first and last page carry our name, by which a successor
        finds and unmaps it. Raises OSError, and as `call`.
        """
        # Maps the table's file again, from its second page on: an old size of 0 copies a
        # shared mapping (mm/mremap.c). Beyond the file's end nothing can be touched.
        second_page = self._session.scratch.table_address + PAGE_BYTES
        size_bytes = (pages + 2) * PAGE_BYTES
        # SAFETY: a new mapping at an address that the kernel chooses. Killed here: it carries
        # our name.
        address = self.call(NR.MREMAP, second_page, 0, size_bytes, mman.MREMAP_MAYMOVE)
        self._session.scratch.note_room(address, size_bytes)
        return address + PAGE_BYTES

    def row_address(self, row: int) -> int:
        """Address of row `row` of the next batch inside the target: number, then arguments."""
        return self._session.scratch.table_address + HEADER_BYTES + row * ROW_BYTES

    @property
    def is_running(self) -> bool:
        """Whether a batch was launched whose results were not taken yet."""
        return self._batch in _IS_RUNNING

    def cancel(self) -> None:
        """Make the running batch begin no further call; `wait` then returns soon.

        A call that has begun (or is just beginning) still ends. Without the stub
        this has no effect: a chain always runs to its end.
        """
        session = self._session
        session.scratch.table.cancel()
        if session.guard is not None:
            session.guard.withdraw()
