"""Gates between QMP `stop` and `cont`, where a running VM can not be protected.

Owns the pauses: `stop` drains as well, each is within a budget and holds as many gates as
fit it. Every pause is ended on every path out.

What a `kill -9` leaves between `stop` and `cont`: a stop note, from which the guardian
resumes the VM.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.burst import Prepared
from vmdedup.core.gate_size import BatchSize
from vmdedup.errors import VmError
from vmdedup.gate import Batch, DrainsAndStops, Gate, Timings
from vmdedup.guardian import Guardian
from vmdedup.inject.remote import RemoteThread
from vmdedup.procfs.pagemap import Pagemap
from vmdedup.resume import resume
from vmdedup.runtime import RuntimeDirectory, StopNote

_STOPPED_WAIT_S = 1.0

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]


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

    @property
    def reading(self) -> None:
        """None: all is compared in the gates."""

    @property
    def most_gates(self) -> int:
        """None: what is in a batch is only known in the pause."""
        return 0

    def gates(self, batches: Sequence[Prepared]) -> list[Int64s]:
        """Leaves all to `gate`."""
        return []

    @contextmanager
    def gate(self, start: Int64s, pages: Int64s) -> Iterator[Gate]:
        """Pause the VM unless it is; resume it once the budget is used up."""
        if self._monitor.status() == "running":
            # Also when somebody resumed it during our pause: pause it anew.
            self._resume()
            self._monitor.require_drainable()
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


class _StoppedGate(Batch):
    def held(self, entries: Uint64s, since: Uint64s | None = None) -> npt.NDArray[np.bool_]:
        """Every page: the VM is paused and drained."""
        return np.ones(len(entries), dtype=np.bool_)

    def run(self, calls: Uint64s) -> npt.NDArray[np.int64]:
        """Launch the calls on the held thread and wait for their results."""
        return self._run(calls, _STOPPED_WAIT_S)
