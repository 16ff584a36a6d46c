"""Gates between QMP `stop` and `cont`, if a running VM cannot be protected.

Owns the pauses. `stop` drains as well. Each pause keeps to a budget and holds as many gates
as fit into it. Every pause is ended on every path out.

`stop` holds vCPUs and block devices only. A 9p request or a passed-through device still
writes guest memory in a pause. So the pages of each gate are write-protected as well, if the
kernel can (the gates are then those of `LiveSession`). If it cannot, a VM with such a device
is refused before (`remap.session`).

What a `kill -9` leaves between `stop` and `cont`: a stop note, from which the guardian
resumes the VM. What it leaves of protection and calls: see `live`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.gate_size import BatchSize
from vmdedup.errors import DisturbedError, MergeError, VmError
from vmdedup.guardian.guardian import Guardian
from vmdedup.guardian.resume import resume
from vmdedup.guardian.runtime_dir import RuntimeDirectory, StopNote
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.pagemap import Pagemap
from vmdedup.remap.burst import Prepared
from vmdedup.remap.gate import Batch, DrainsAndStops, Gate, WayBack, the_same
from vmdedup.remap.live import LiveSession
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.timings import Timings

_STOPPED_WAIT_S = 1.0
_LEAST_TURN_S = 2.0
"""Shortest rest of a turn on a shared monitor in which a pause is begun: it must also end."""

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]


class StoppedSession:
    """Batches between QMP `stop` and `cont`. A context manager.

    A VM that is already paused is neither paused nor resumed. One pause holds as many
    gates as fit the budget. `look` raises if the VM is not as it was examined.
    `protection`: an entered session that protects the pages of the gates, `None` if the
    kernel cannot.
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
        look: Callable[[], None],
        protection: LiveSession | None,
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
        self._look = look
        self._protection = protection
        self.protects_absent = protection is None or protection.protects_absent
        self.way_back: WayBack = the_same
        if protection is not None:
            protection.timings = self.timings
        self._paused = ExitStack()
        self._paused_at: float | None = None

    def __enter__(self) -> StoppedSession:
        if not self._runtime.begin_pause(self._note.pid):
            reason = "it is paused until there is memory; merged in pauses after that"
            raise MergeError(self.vm, "stop", reason, pid=self._note.pid)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._resume()
        finally:
            self._runtime.end_pause(self._note.pid)

    def arm(self, start: Int64s, pages: Int64s) -> None:
        """Do nothing: the pause protects everything at once."""

    def rest(self) -> None:
        """End the pause: the next gate may be a long time off."""
        self._resume()

    def witness(self, start: Int64s, pages: Int64s) -> Uint64s | None:
        """`None`: before a pause, and between two, the guest may write anything."""
        return None

    def fill(
        self, span: tuple[int, int], target: Int64s, source: Int64s, length_bytes: Int64s
    ) -> bool:
        """`False`: in a pause, scratch memory is filled by copies."""
        return False

    @property
    def reading(self) -> None:
        """`None`: all pages are compared in the gates."""

    @property
    def most_gates(self) -> int:
        """`0`: the content of a batch is only known in the pause."""
        return 0

    def gates(self, batches: Sequence[Prepared]) -> list[Int64s]:
        """Run none: each batch needs a `gate`."""
        return []

    @contextmanager
    def gate(self, start: Int64s, pages: Int64s) -> Iterator[Gate]:
        """Pause the VM unless it is paused; resume it once the budget is used up."""
        # The monitor is asked next, so QEMU's threads must be able to run.
        self._remote.dismiss()
        if self._monitor.status() == "running":
            # Also if somebody resumed it during our pause: pause it again.
            self._resume()
            self._monitor.require_drainable()
            self._pause()
        self._guardian.beat()
        # SAFETY: this runs in each gate, also of a VM that somebody else has paused: a device
        # may be plugged in even then, and somebody who resumed the VM in our pause let
        # requests begin. Arm, drain, look, gate, as in a live session.
        with self._guardian.beating():
            if self._protection is not None:
                self._protection.protect(start, pages * PAGE_BYTES)
                self._protection.drain_and_look()
            else:
                self._look()
                faults.reached("looked")
        try:
            if self._protection is not None:
                self._protection.way_back = self.way_back
                with self._protection.gate(start, pages) as gate:
                    yield gate
            else:
                with self._unprotected_gate() as gate:
                    yield gate
        finally:
            if self._paused_at is not None and self._paused_ms() >= self._budget_ms:
                self._resume()

    @contextmanager
    def _unprotected_gate(self) -> Iterator[Gate]:
        self._remote.hold()
        faults.reached("held")
        batch = _StoppedGate(self._remote, self._pagemap, way_back=self.way_back)
        try:
            yield batch
        finally:
            batch.settle()
            faults.reached("gate-done")
            if not batch.launched:
                self._remote.release()

    def _paused_ms(self) -> float:
        return 0.0 if self._paused_at is None else (time.monotonic() - self._paused_at) * 1000

    def _pause(self) -> None:
        with ExitStack() as exits:
            # `stop` and `cont` over one connection: nobody is waited for in a pause.
            exits.enter_context(self._monitor.turn())
            if self._monitor.misses_events:
                self._look()  # the long look, before the pause: the one inside it is short
            if self._monitor.turn_left_s < _LEAST_TURN_S:  # uncovered: takes slow answers
                # Else the pause might last until somebody else leaves the monitor.
                reason = "its turn on the shared monitor is nearly over; it is tried again"
                raise DisturbedError(self.vm, "stop", reason, pid=self._note.pid)
            # A separate lane: the resolver of a protected pause only shows that it lives itself.
            exits.enter_context(self._guardian.watching(apart=True))
            # SAFETY: the note is on disk before `stop` is sent and is removed after
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
        """Resume the VM, over a new connection if the monitor was lost.

        If that fails too, because its storage hangs, for instance, the guardian resumes the
        VM as soon as it answers; we do not wait for that. Raises VmError then.
        """
        self._remote.dismiss()
        try:
            with self._guardian.beating():
                if self._monitor.status() == "paused":
                    self._monitor.cont()
        except VmError as error:
            with self._guardian.beating():
                is_settled = resume(self._note, attempts=1)
            if not is_settled:
                self.timings.stopped_ms.append(self._paused_ms())
                self._paused_at = None
                # SAFETY: killed before the note is given up, or before the guardian is told:
                # the guardian resumes the VM, as for any dead engine.
                self._runtime.give_up(self._note)
                self._guardian.take_over()
                reason = f"it stays paused until its monitor answers ({error.reason})"
                raise MergeError(self.vm, "cont", reason, pid=self._note.pid) from error
        faults.reached("resumed")
        note.unlink(missing_ok=True)
        self.timings.stopped_ms.append(self._paused_ms())
        self._paused_at = None

    def _resume(self) -> None:
        self._paused.close()


class _StoppedGate(Batch):
    def held(self, entries: Uint64s, since: Uint64s | None = None) -> npt.NDArray[np.bool_]:
        """Every page: the VM is paused and drained."""
        return np.ones(len(entries), dtype=np.bool_)

    def run(self, calls: Uint64s) -> npt.NDArray[np.int64]:
        """Launch the calls on the held thread and wait for their results."""
        return self._mended(calls, self._run(calls, _STOPPED_WAIT_S))
