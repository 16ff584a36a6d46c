"""Arm, drain, look, gate on a running VM.

*Arm* write-protects the candidates through a userfaultfd that only this process holds;
*drain* waits until requests that were already in flight have ended (their DMA may write to
pages pinned earlier, which no protection stops); *look* asks whether a new device pins pages
for good. Each *gate* then holds the faulting writers of one small batch while the batch is
looked at again and remapped. If nothing is unusual, compiled code closes several gates one
after the other (`burst`).

Promises: a page is reported as held only while the kernel says that it is still protected
and registered, with the page frame that was witnessed. So no write, discard, or unmapped and
reused address in between can be missed. A page that was witnessed and then compared is
therefore still as compared, though no gate was closed then.
(A page that was discarded and happens to get its old frame again is taken for the old page.
QEMU's balloon, the one allowed device that discards, leaves the content of such a page
undefined. No discard begins while a gate is closed: it would drop the protection of anonymous
memory.) Every protection and gate is released on every path out.

What a `kill -9` leaves: before the drain, nothing (the kernel lifts the
protection). In a gate, before the launch, nothing. After the launch, the launched calls
hold the protection by themselves until they have ended (see `inject.guard`); each
page is either the old one or the equal store page. QEMU's thread, which is kept from
gate to gate for a while, resumes its own work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.gate_size import GateSize
from vmdedup.core.sorting import lengths
from vmdedup.errors import MergeError
from vmdedup.guardian.guardian import Guardian
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.pagemap import ENTRY_OF_PAGE, ENTRY_UFFD_WP, Pagemap
from vmdedup.linux.realtime import company
from vmdedup.linux.syscalls import NR
from vmdedup.linux.userfaultfd import Resolver, Userfault
from vmdedup.remap import burst
from vmdedup.remap.burst import Prepared
from vmdedup.remap.gate import Batch, DrainsAndStops, Gate, GateMissedError, WayBack, the_same
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.timings import Timings

_NARROW_GAP_BYTES = 8 * PAGE_BYTES
"""Gaps up to this size are protected together with both neighbours. A write to a page in the
gap costs one fault, resolved at once. Another call would cost us a microsecond, and each
processor that runs QEMU a flush."""
_MOST_KEPT_S = 0.02
"""How long QEMU's RCU thread is kept between gates. What needs that thread (an unplug) waits
this long at most, plus the longest idle time of the resolver or the length of a burst."""

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]


class LiveSession:
    """Arm, drain, look, gate on a running VM. A context manager.

    `spans` are the (start, end) addresses of the regions; all their mappings are
    registered with `userfault` for the time of the session. `bursts`: whether compiled code
    may close several gates one after the other. `look` raises if the VM is no longer as it
    was examined. Raises OSError with EINVAL on entry if a mapping cannot be registered.
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
        look: Callable[[], None],
        bursts: bool,
    ) -> None:
        self.vm = vm
        self.pid = pid
        self._bursts = bursts
        self._look = look
        self._drain_timeout_s = drain_timeout_ms / 1000
        self.timings = Timings()
        self.way_back: WayBack = the_same
        self.size = size
        self._spans = spans
        self._remote = remote
        self._userfault = userfault
        self.protects_absent = userfault.protects_absent
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
            self._userfault.register(self._spans)
            exits.callback(self._unregister)
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
        """Write-protect the runs, wait until all requests in flight have ended, then look."""
        self.protect(*over_narrow_gaps(start, pages * PAGE_BYTES, self._spans))
        self.drain_and_look()

    def drain_and_look(self) -> None:
        """After `protect`: wait until all requests in flight have ended, then look."""
        self.timings.drain_ms.append(self._monitor.drain(timeout_s=self._drain_timeout_s))
        faults.reached("drained")
        self._look()
        faults.reached("looked")

    def protect(self, start: Int64s, length_bytes: Int64s) -> None:
        """Write-protect ranges in which nothing was remapped yet."""
        # SAFETY: from here a guest thread that writes such a page waits for the resolver
        # thread, which lifts the protection at once. Killed here: the kernel lifts it.
        self._userfault.protect(start, length_bytes)
        faults.reached("armed")

    def rest(self) -> None:
        """Do nothing: between gates nobody is held."""

    def witness(self, start: Int64s, pages: Int64s) -> Uint64s | None:
        """The page table entries, which include the protection."""
        return self._pagemap.entries_of(start, pages)

    def fill(
        self, span: tuple[int, int], target: Int64s, source: Int64s, length_bytes: Int64s
    ) -> bool:
        """As `Session.fill`; impossible over a file of an ordinary filesystem."""
        try:
            self._userfault.fill(span, target, source, length_bytes)
        except OSError:
            return False
        return True

    @contextmanager
    def gate(self, start: Int64s, pages: Int64s) -> Iterator[Gate]:
        """Close the gate over one armed batch; its writers wait until the block ends."""
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
        batch = self._new_gate()
        try:
            with self._standing_still():
                closed_at = time.monotonic()
                self._lane.beat()
                faults.reached("gate-closed")
                try:
                    yield batch
                finally:
                    self._open_gate(batch, start, pages)
                    closed_ms = (time.monotonic() - closed_at) * 1000
                    self.timings.gate_ms.append(closed_ms)
                    self.size.took(closed_ms, len(pages), int(pages.sum()))
        finally:
            if not batch.launched:
                self._remote.release()

    def _new_gate(self) -> _LiveGate:
        means = (self._remote, self._pagemap, self._guard)
        return _LiveGate(*means, self._deadline_s, self.way_back)

    def _open_gate(self, batch: _LiveGate, start: Int64s, pages: Int64s) -> None:
        """Wait until nothing of the batch runs, then let the writers go on."""
        batch.settle()
        # SAFETY: no call of the batch is running any more. Waiters retry: on a remapped
        # page they get an ordinary copy-on-write fault.
        faults.reached("gate-done")
        if batch.remapped_bytes == pages.sum() * PAGE_BYTES:
            # No page of the batch is registered any more: there is nothing to lift.
            self._userfault.wake(int(start.min()), int((start + pages * PAGE_BYTES).max()))
        else:
            self._userfault.lift(start, pages * PAGE_BYTES)
        self._resolver.serve()

    @property
    def reading(self) -> Callable[[Uint64s, Int64s], Int64s] | None:
        """Runs rows while writers are served; the thread is kept for the next gate."""
        return self._read

    def _read(self, rows: Uint64s, reads: Int64s) -> Int64s:
        self._require_resolver()
        if not self._remote.stands_still:
            self._remote.hold()
        with self._standing_still():
            self._remote.require_there(reads)
            # SAFETY: the batch writes only results. Killed from here on: as in a gate, the
            # protection is held until the batch has ended.
            self._remote.launch(rows, guard=self._guard, keep=True)
        faults.reached("reading")
        return self._remote.wait_or_cancel()

    @property
    def most_gates(self) -> int:
        """`0` until a gate has kept QEMU's thread, and without the compiled code."""
        return burst.MOST_GATES if self._bursts and self._remote.is_kept else 0

    def gates(self, batches: Sequence[Prepared]) -> list[Int64s]:
        """Close them in bursts, while QEMU's thread is kept and nothing is unusual."""
        results: list[Int64s] = []
        while len(results) < len(batches):
            self._require_resolver()
            with company.hurrying(), self._resolver.gate():
                if not self._remote.is_kept:
                    break
                left = batches[len(results) :]
                done = burst.run_burst(self._means(), left, deadline_s=self._deadline_s)
                self._note(done, left)
                results += done.results
                if done.state == burst.BurstState.CAREFUL:
                    self._resolver.serve()
                elif done.state != burst.BurstState.GO_ON:
                    results.append(self._finish(done, left[len(done.results)]))
            if done.state != burst.BurstState.GO_ON:
                break
        return results

    def _means(self) -> burst.Means:
        here, there = self._remote.table_addresses
        return burst.Means(
            pagemap_fd=self._pagemap.fd,
            userfault_fd=self._userfault.fd,
            guard_fd=self._guard.ours,
            pidfd=self._remote.pidfd,
            table_here=here,
            table_there=there,
            beat_here=self._lane.beat_address,
            most_calls=self._remote.max_calls,
        )

    def _note(self, done: burst.Burst, batches: Sequence[Prepared]) -> None:
        closed_ms = done.closed_ms[: len(done.results)]
        self.timings.gate_ms.extend(closed_ms)
        self._resolver.lifted_pages += done.lifted_pages
        if closed_ms:
            # The mean: a gate that waited for a processor says nothing about its size.
            runs = [len(batch.pages) for batch in batches[: len(closed_ms)]]
            pages = [int(batch.pages.sum()) for batch in batches[: len(closed_ms)]]
            self.size.took(sum(closed_ms) / len(closed_ms), max(runs), max(pages))

    def _finish(self, done: burst.Burst, batch: Prepared) -> Int64s:
        """End the gate that a burst has left closed; returns the results of its batch."""
        began = time.monotonic()
        gate = self._new_gate()
        try:
            left_s = self._deadline_s - done.closed_ms[-1] / 1000
            given = done.state == burst.BurstState.LAUNCHED
            return gate.take_over(batch.calls, left_s, given=given)
        finally:
            self._open_gate(gate, batch.start, batch.pages)
            closed_ms = done.closed_ms[-1] + (time.monotonic() - began) * 1000
            self.timings.gate_ms.append(closed_ms)
            self.size.took(closed_ms, len(batch.pages), int(batch.pages.sum()))

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Hold the resolver's lock while QEMU's thread stands still because of us."""
        with self._resolver.gate():
            if self._remote.stands_still:
                yield
                return
        # The thread had been kept long enough, and the resolver has just dismissed it.
        self._remote.hold()
        with self._resolver.gate():
            yield

    def _show_that_we_live(self) -> None:
        """Beat while no gate is closed; dismiss a thread that has been kept for long."""
        self._lane.beat()
        if self._remote.kept_s > _MOST_KEPT_S and not self._remote.is_running:
            self._remote.dismiss()

    def _require_resolver(self) -> None:
        if (failure := self._resolver.failure) is not None:
            raise MergeError(
                self.vm, "gate", f"the fault resolver ended: {failure}", pid=self.pid
            ) from failure


def over_narrow_gaps(
    start: Int64s, length_bytes: Int64s, spans: Sequence[tuple[int, int]]
) -> tuple[Int64s, Int64s]:
    """Ranges within `spans`, joined over narrow gaps: (start, length in bytes).

    Only neighbours in the columns are joined, and never from one span into another.
    """
    end = start + length_bytes
    span = np.searchsorted(np.sort([begin for begin, _ in spans]), start, side="right")
    gap_bytes = start[1:] - end[:-1]
    joins = (gap_bytes >= 0) & (gap_bytes <= _NARROW_GAP_BYTES) & (span[1:] == span[:-1])
    begins = np.ones(len(start), dtype=np.bool_)
    np.logical_not(joins, out=begins[1:])
    first = np.flatnonzero(begins)
    last = first + lengths(first, len(start)) - 1
    return start[first], end[last] - start[first]


class _LiveGate(Batch):
    def __init__(
        self,
        remote: RemoteThread,
        pagemap: Pagemap,
        guard: Guard,
        deadline_s: float,
        way_back: WayBack,
    ) -> None:
        super().__init__(remote, pagemap, guard, way_back=way_back)
        self._deadline_s = deadline_s
        self._closed_at = time.monotonic()
        self.remapped_bytes = 0
        """Bytes that the calls of this gate have remapped."""

    def held(self, entries: Uint64s, since: Uint64s | None = None) -> npt.NDArray[np.bool_]:
        """Which pages have been write-protected ever since they were armed."""
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
        # SAFETY: every page of these calls is held and was compared equal. After the
        # launch the thread runs by itself; the gate stays closed until it has finished.
        return self._noted(calls, self._run(calls, remaining_s))

    def take_over(self, calls: Uint64s, timeout_s: float, *, given: bool) -> npt.NDArray[np.int64]:
        """Wait for the results of calls that a burst has launched."""
        self.launched = True
        self._remote.note_launched(len(calls), given=given)
        return self._noted(calls, self._ended(timeout_s))

    def _noted(self, calls: Uint64s, results: Int64s) -> Int64s:
        results = self._mended(calls, results)
        number = calls[:, 0]
        done = ((number == NR.MMAP) | (number == NR.MREMAP)) & (results > 0)
        self.remapped_bytes = int(calls[done, 2].sum())
        return results
