"""Arm, drain, gate: the moments in which a running guest's memory may be changed.

Owns the two ways to be sure that a page can not change between being compared
and being remapped:

- `LiveSession`: no VM is stopped. *Arm* write-protects the candidates through a
  userfaultfd that only this process holds; *drain* lets the requests end that
  were in flight before (their DMA may write to pages pinned earlier, which no
  protection stops); each *gate* then holds the faulting writers of one small
  batch while it is looked at once more and remapped.
- `StoppedSession`: where the kernel or the backing file can not do that. Each
  batch happens between QMP `stop` (which drains) and `cont`, within a budget.

Promises: a page is reported as held only while the kernel itself says that it
is still protected and registered, and the same page frame as when it was
witnessed, so neither a write, nor a discard, nor an unmapped and reused address
in between can be missed. What was compared after it was witnessed is therefore
as it was compared, though no gate was closed then. (A page that was discarded and
happens to be given the frame it had is taken for the old one: QEMU's balloon, the one
device allowed that discards, leaves open what such a page holds.) Every protection, gate
and pause is released on every path out. In a gate nothing waits for the monitor
or for a thread of QEMU that may touch guest memory: calls run on QEMU's RCU
thread, which never does, and which is also the only one that unmaps RAM blocks.

What a `kill -9` leaves: before the drain, nothing (the kernel lifts the
protection). In a gate, before the launch, nothing; after it, the launched calls
hold the protection by themselves until they have ended (see `inject.guard`), each
page is either the old one or the equal store page. QEMU's thread, which is kept from
gate to gate for a while, goes its own way. Between `stop` and `cont`: a
stop note, from which the guardian resumes the VM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.gate_size import BatchSize, GateSize
from vmdedup.errors import InjectionError, MergeError, VmError
from vmdedup.guardian import Guardian
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import RemoteThread
from vmdedup.memory.userfault import Resolver, Userfault
from vmdedup.priority import company
from vmdedup.procfs.pagemap import ENTRY_OF_PAGE, ENTRY_UFFD_WP, Pagemap
from vmdedup.resume import resume
from vmdedup.runtime import RuntimeDirectory, StopNote
from vmdedup.syscalls import NR
from vmdedup.units import PAGE_BYTES

_MOST_KEPT_S = 0.02
"""QEMU's RCU thread between gates: what waits for it (an unplug) waits as long at most, and
once more as long as the resolver may be idle."""

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

_STOPPED_WAIT_S = 1.0


@dataclass
class Timings:
    """What a session cost the guest; times in milliseconds."""

    gate_ms: list[float] = field(default_factory=list)
    drain_ms: list[float] = field(default_factory=list)
    stopped_ms: list[float] = field(default_factory=list)
    lifted_pages: int = 0


class DrainsAndStops(Protocol):
    """What a session needs of a monitor."""

    def drain(self, *, timeout_s: float) -> float: ...
    def stop(self) -> None: ...
    def cont(self) -> None: ...
    def status(self) -> str: ...


class GateMissedError(MergeError):
    """The gate was not done by its deadline and was opened again; retry later."""


class Gate(Protocol):
    """One batch, while nothing can change it."""

    def entries(self, start: Int64s, pages: Int64s) -> Uint64s:
        """The page table entries of these runs now: uint64, shape (pages.sum(),)."""

    def held(self, entries: Uint64s, since: Uint64s | None = None) -> npt.NDArray[np.bool_]:
        """Which pages certainly can not change now, by their `entries`.

        With `since`, what `Session.witness` gave for them: and have not changed since then.
        """

    def run(self, calls: Uint64s) -> npt.NDArray[np.int64]:
        """Run system calls inside QEMU; at most once per gate. Results are -errno on failure."""


class Session(Protocol):
    """A stretch of time in which batches of one VM may be changed."""

    timings: Timings

    @property
    def size(self) -> BatchSize | GateSize:
        """Of the next gate's batch."""

    def arm(self, start: Int64s, pages: Int64s) -> None:
        """Prepare these runs; before the first gate, and once."""

    def witness(self, start: Int64s, pages: Int64s) -> Uint64s | None:
        """What the kernel says of these armed runs: uint64, shape (pages.sum(),).

        For `Gate.held`. None where nothing vouches for the time before a gate.
        """

    def fill(
        self, span: tuple[int, int], target: Int64s, source: Int64s, length_bytes: Int64s
    ) -> bool:
        """Fill scratch memory in `span` with ours, as `Userfault.fill`; whether it could be."""

    def gate(self, start: Int64s, pages: Int64s) -> _GateContext:
        """Hold these runs; they were armed."""


class _GateContext(Protocol):
    def __enter__(self) -> Gate: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None: ...


class LiveSession:
    """Arm, drain, gate on a running VM. A context manager.

    `spans` are the (start, end) addresses of the regions; all their mappings are
    registered with `userfault` for the time of the session. Raises OSError with
    EINVAL on entry when a mapping can not be registered.
    """

    def __init__(
        self,
        vm: str,
        pid: int,
        *,
        spans: Sequence[tuple[int, int]],
        remote: RemoteThread,
        userfault: Userfault,
        guard: Guard,
        pagemap: Pagemap,
        monitor: DrainsAndStops,
        guardian: Guardian,
        size: GateSize,
        deadline_ms: int,
        drain_timeout_ms: int,
    ) -> None:
        self.vm = vm
        self.pid = pid
        self._drain_timeout_s = drain_timeout_ms / 1000
        self.timings = Timings()
        self.size = size
        self._spans = spans
        self._remote = remote
        self._userfault = userfault
        self._guard = guard
        self._pagemap = pagemap
        self._monitor = monitor
        self._guardian = guardian
        self._deadline_s = deadline_ms / 1000
        self._resolver = Resolver(userfault, self._show_that_we_live)
        self._exits = ExitStack()

    def __enter__(self) -> LiveSession:
        with ExitStack() as exits:
            self._lane = exits.enter_context(self._guardian.watching())
            exits.enter_context(self._resolver)
            exits.callback(self._unregister)
            self._userfault.register(self._spans)
            faults.reached("registered")
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remote.dismiss()
        self._exits.close()
        self.timings.lifted_pages = self._resolver.lifted_pages

    def _unregister(self) -> None:
        try:
            self._userfault.unregister(self._spans)
        except OSError:
            # A block was unplugged meanwhile: closing the descriptor does the same.
            self._userfault.close()

    def arm(self, start: Int64s, pages: Int64s) -> None:
        """Write-protect the runs, then wait until all requests in flight have ended."""
        # SAFETY: from here a guest thread that writes such a page waits for the
        # resolver thread, which lifts it at once. Killed here: the kernel lifts.
        self._userfault.protect(start, pages * PAGE_BYTES)
        faults.reached("armed")
        self.timings.drain_ms.append(self._monitor.drain(timeout_s=self._drain_timeout_s))
        faults.reached("drained")

    def witness(self, start: Int64s, pages: Int64s) -> Uint64s | None:
        """The page table entries, of which the protection is a part."""
        return self._pagemap.entries_of(start, pages)

    def fill(
        self, span: tuple[int, int], target: Int64s, source: Int64s, length_bytes: Int64s
    ) -> bool:
        """Not over a file of an ordinary filesystem."""
        try:
            self._userfault.fill(span, target, source, length_bytes)
        except OSError:
            return False
        return True

    @contextmanager
    def gate(self, start: Int64s, pages: Int64s) -> Iterator[Gate]:
        """Close the gate over one armed batch; writers to it wait until this is left."""
        self._require_resolver()
        with company.hurrying(), self._closed_gate(start, pages) as gate:
            yield gate

    @contextmanager
    def _closed_gate(self, start: Int64s, pages: Int64s) -> Iterator[Gate]:
        # Stop QEMU's RCU thread first: while it is held no RAM block can be
        # unmapped, and attaching costs more than the whole gate.
        if not self._remote.stands_still:
            self._remote.hold()
        faults.reached("held")
        batch = _LiveGate(self._remote, self._pagemap, self._guard, self._deadline_s)
        try:
            with self._standing_still():
                closed_at = time.monotonic()
                self._lane.beat()
                faults.reached("gate-closed")
                try:
                    yield batch
                finally:
                    batch.settle()
                    # SAFETY: nothing of the batch is running any more. Waiters
                    # retry: on a remapped page they get an ordinary copy-on-write
                    # fault.
                    faults.reached("gate-done")
                    if batch.remapped_bytes == pages.sum() * PAGE_BYTES:
                        # Nothing of it is registered any more: there is nothing to lift.
                        self._userfault.wake(
                            int(start.min()), int((start + pages * PAGE_BYTES).max())
                        )
                    else:
                        self._userfault.lift(start, pages * PAGE_BYTES)
                    self._resolver.serve()
                    closed_ms = (time.monotonic() - closed_at) * 1000
                    self.timings.gate_ms.append(closed_ms)
                    self.size.took(closed_ms, len(pages), int(pages.sum()))
        finally:
            if not batch.launched:
                self._remote.release()

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """The resolver's lock, while QEMU's thread stands still because of us."""
        with self._resolver.gate():
            if self._remote.stands_still:
                yield
                return
        # It had been kept long enough, and the resolver has just dismissed it.
        self._remote.hold()
        with self._resolver.gate():
            yield

    def _show_that_we_live(self) -> None:
        """While no gate is closed. A thread that has been kept for long goes its own way."""
        self._lane.beat()
        if self._remote.kept_s > _MOST_KEPT_S:
            self._remote.dismiss()

    def _require_resolver(self) -> None:
        if (failure := self._resolver.failure) is not None:
            raise MergeError(
                self.vm, "gate", f"the fault resolver ended: {failure}", pid=self.pid
            ) from failure


class _Batch:
    """Calls on the held thread, and the certainty that they have ended."""

    def __init__(self, remote: RemoteThread, pagemap: Pagemap, guard: Guard | None = None) -> None:
        self._remote = remote
        self._pagemap = pagemap
        self._guard = guard
        self._settled = False
        self.launched = False

    def entries(self, start: Int64s, pages: Int64s) -> Uint64s:
        """The page table entries of these runs now."""
        return self._pagemap.entries_of(start, pages)

    def _run(self, calls: Uint64s, timeout_s: float) -> Int64s:
        self.launched = True
        self._remote.launch(calls, guard=self._guard, keep=self._guard is not None)
        faults.reached("launched")
        results = _wait_out(self._remote, timeout_s)
        self._settled = True
        return results

    def settle(self) -> None:
        """After an exception (Ctrl-C) in the middle of `run`: wait until nothing runs."""
        while self.launched and not self._settled:
            with suppress(KeyboardInterrupt, InjectionError):
                self._remote.cancel()
                if self._remote.is_running:
                    self._remote.wait(math.inf)
                self._settled = True


class _LiveGate(_Batch):
    def __init__(
        self, remote: RemoteThread, pagemap: Pagemap, guard: Guard, deadline_s: float
    ) -> None:
        super().__init__(remote, pagemap, guard)
        self._deadline_s = deadline_s
        self._closed_at = time.monotonic()
        self.remapped_bytes = 0
        """By the calls that were run."""

    def held(self, entries: Uint64s, since: Uint64s | None = None) -> npt.NDArray[np.bool_]:
        """Pages whose write protection has stood since they were armed."""
        held = (entries & ENTRY_UFFD_WP) != 0
        if since is not None:
            # A hole punched into a RAM file leaves the protection, but not the frame.
            held &= (entries ^ since) & ENTRY_OF_PAGE == 0
        return np.asarray(held)

    def run(self, calls: Uint64s) -> npt.NDArray[np.int64]:
        """Launch the calls on the held thread and wait for their results."""
        remaining_s = self._deadline_s - (time.monotonic() - self._closed_at)
        if remaining_s <= 0:
            raise GateMissedError(self._remote.vm, "gate", "not ready by its deadline")
        # SAFETY: every page of these calls is held and was compared equal. After
        # the launch the thread runs by itself; the gate stays closed until it is done.
        results = self._run(calls, remaining_s)
        number = calls[:, 0]
        done = ((number == NR.MMAP) | (number == NR.MREMAP)) & (results > 0)
        self.remapped_bytes = int(calls[done, 2].sum())
        return results


class StoppedSession:
    """Batches between QMP `stop` and `cont`. A context manager.

    A VM that stands still already is neither paused nor resumed. One pause holds
    as many gates as fit the budget.
    """

    def __init__(
        self,
        vm: str,
        *,
        remote: RemoteThread,
        pagemap: Pagemap,
        monitor: DrainsAndStops,
        guardian: Guardian,
        runtime: RuntimeDirectory,
        note: StopNote,
        size: BatchSize,
        budget_ms: int,
    ) -> None:
        self.vm = vm
        self.timings = Timings()
        self.size = size
        self._remote = remote
        self._pagemap = pagemap
        self._monitor = monitor
        self._guardian = guardian
        self._runtime = runtime
        self._note = note
        self._budget_ms = budget_ms
        self._paused = ExitStack()
        self._paused_at: float | None = None

    def __enter__(self) -> StoppedSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resume()

    def arm(self, start: Int64s, pages: Int64s) -> None:
        """Nothing to prepare: the pause protects everything at once."""

    def witness(self, start: Int64s, pages: Int64s) -> Uint64s | None:
        """None: before the pause, and between two, the guest may write anything."""
        return None

    def fill(
        self, span: tuple[int, int], target: Int64s, source: Int64s, length_bytes: Int64s
    ) -> bool:
        """It has no userfaultfd to fill with."""
        return False

    @contextmanager
    def gate(self, start: Int64s, pages: Int64s) -> Iterator[Gate]:
        """Pause the VM unless it is; resume it once the budget is used up."""
        if self._monitor.status() == "running":
            # Also when somebody resumed it during our pause: pause it anew.
            self._resume()
            self._pause()
        self._guardian.beat()
        self._remote.hold()
        faults.reached("held")
        batch = _StoppedGate(self._remote, self._pagemap)
        try:
            yield batch
        finally:
            batch.settle()
            faults.reached("gate-done")
            if not batch.launched:
                self._remote.release()
            if self._paused_at is not None and self._paused_ms() >= self._budget_ms:
                self._resume()

    def _paused_ms(self) -> float:
        return 0.0 if self._paused_at is None else (time.monotonic() - self._paused_at) * 1000

    def _pause(self) -> None:
        with ExitStack() as exits:
            exits.enter_context(self._guardian.watching())
            # SAFETY: the note is on disk before `stop` is sent and goes after
            # `cont` was answered: killed in between, the guardian resumes the VM.
            note = self._runtime.write_note(self._note)
            faults.reached("noted")
            self._paused_at = time.monotonic()
            exits.callback(self._cont, note)
            with self._guardian.beating():
                self._monitor.stop()
            faults.reached("stopped")
            self._paused = exits.pop_all()

    def _cont(self, note: Path) -> None:
        """Resume the VM, over a connection of its own where the monitor was lost.

        Where that fails too the note stays: whoever attaches to the VM next resumes
        it, and when we end the guardian.
        """
        with self._guardian.beating():
            try:
                if self._monitor.status() == "paused":
                    self._monitor.cont()
            except VmError:
                if not resume(self._note):
                    raise
        faults.reached("resumed")
        note.unlink(missing_ok=True)
        self.timings.stopped_ms.append(self._paused_ms())
        self._paused_at = None

    def _resume(self) -> None:
        self._paused.close()


class _StoppedGate(_Batch):
    def held(self, entries: Uint64s, since: Uint64s | None = None) -> npt.NDArray[np.bool_]:
        """Every page: the VM is paused and drained."""
        return np.ones(len(entries), dtype=np.bool_)

    def run(self, calls: Uint64s) -> npt.NDArray[np.int64]:
        """Launch the calls on the held thread and wait for their results."""
        return self._run(calls, _STOPPED_WAIT_S)


def _wait_out(remote: RemoteThread, timeout_s: float) -> Int64s:
    """Results of the launched calls; past the timeout no further call is begun.

    Calls that were not begun give -ECANCELED.
    """
    try:
        return remote.wait(timeout_s)
    except InjectionError as error:
        if not error.started:
            raise
        # SAFETY: a launched call must never run after the gate was opened: its page
        # could have been written in between. So wait for the one that runs, for as
        # long as it takes; the guardian ends us if that is too long.
        remote.cancel()
        return remote.wait(math.inf)
