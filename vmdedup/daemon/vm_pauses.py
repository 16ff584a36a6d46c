"""Pauses of VMs while memory is short.

Owns the VMs that are paused until there is memory, and their stop notes. Promises that a VM
is resumed by us only if we have paused it: one that a user has stopped is left alone, and one
that a user has resumed is the user's from then on. No VM is paused that could not be resumed
after our death, nor one that is being migrated: the other host would keep it paused for good.
Used on one thread; pauses for a merge are `remap.stopped`'s.

What a `kill -9` leaves between `stop` and `cont`: a stop note, from which the guardian resumes
the VM. While a VM is paused the guardian watches this thread, and kills an engine that hangs.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vmdedup import faults
from vmdedup.attach import replies
from vmdedup.attach.monitor import Monitor
from vmdedup.closing import Closing
from vmdedup.errors import VmError, VmGoneError
from vmdedup.guardian.guardian import Guardian
from vmdedup.guardian.resume import resume
from vmdedup.guardian.runtime_dir import RuntimeDirectory, StopNote
from vmdedup.linux.process import read_process_id
from vmdedup.policy.signs import MIGRATING
from vmdedup.vm.attached_vm import AttachedVm

_PATIENCE_MS = 10_000
"""Time beyond the hang limit until the guardian kills us while a VM is paused, milliseconds.
Memory is short then: the engine may wait for its own pages to be swapped in."""
_NO_THREAD = 0
"""Number of no thread: no call of ours runs in the VM for the pause."""


@dataclass(frozen=True)
class Pausable:
    """A VM that may be paused."""

    name: str
    pid: int
    priority: int
    monitor: Monitor
    note: StopNote


@dataclass(frozen=True)
class _Pause:
    vm: Pausable
    file: Path
    """The stop note."""
    resumes: int | None
    """How often the VM had been resumed when we paused it; `None` if its monitor cannot tell."""


def pausable(vm: AttachedVm) -> Pausable | None:
    """The VM as one that may be paused; `None` if nobody could resume it after a crash of ours."""
    address = vm.identity.monitor_address
    if address is None:
        return None
    note = StopNote(
        vm=vm.name,
        pid=vm.pid,
        start_ticks=vm.identity.start_ticks,
        monitor_path=address,
        thread_id=_NO_THREAD,
        engine_pid=os.getpid(),
        engine_start_ticks=read_process_id(os.getpid()).start_ticks,
    )
    return Pausable(vm.name, vm.pid, vm.identity.policy.priority, vm.monitor, note)


class VmPauses(Closing):
    """The VMs that are paused now. `close` resumes all."""

    def __init__(self, runtime: RuntimeDirectory, guardian: Guardian) -> None:
        self._runtime = runtime
        self._guardian = guardian
        self._pauses: dict[int, _Pause] = {}
        self._watched = ExitStack()

    @property
    def vms(self) -> dict[int, Pausable]:
        """The paused VMs by pid, the first paused first."""
        return {pid: pause.vm for pid, pause in self._pauses.items()}

    def pause(self, vm: Pausable) -> bool:
        """Pause a VM; whether we did. False if it does not run, or a merge pauses it just now.

        Raises VmError if its monitor does not answer, or refuses.
        """
        if not self._runtime.begin_pause(vm.pid):
            return False
        with ExitStack() as undo:
            undo.callback(self._runtime.end_pause, vm.pid)
            if self._runtime.is_noted(vm.note.pid, vm.note.start_ticks):
                return False  # the guardian may resume it at any moment
            # Already now: this thread is watched if another VM is paused.
            with self._guardian.beating():
                if vm.monitor.status() != "running":
                    return False
                if _migrates(vm.monitor) or vm.monitor.has_job():
                    return False
                vm.monitor.require_drainable()
            self._watch()
            undo.callback(self._unwatch)
            with self._guardian.beating():
                # SAFETY: the note is on disk before `stop` is sent and is removed after `cont`
                # was answered: killed in between, the guardian resumes the VM.
                file = self._runtime.write_note(vm.note)
                undo.callback(file.unlink, missing_ok=True)
                faults.reached("shortage-noted")
                # SAFETY: asked again, right before `stop`: a user may have stopped it since.
                if vm.monitor.status() != "running":
                    return False
                resumes = vm.monitor.resumes
                # SAFETY: from here on only `_end` removes the note: also a `stop` that is not
                # answered in time may pause the VM later.
                undo.pop_all()
                self._pauses[vm.pid] = _Pause(vm, file, resumes)
                vm.monitor.stop()
        faults.reached("shortage-stopped")
        return True

    def resume(self, pid: int) -> bool:
        """Resume a VM that we have paused, unless somebody else has resumed it.

        False, and the VM stays ours, if somebody's work on it forbids that just now.

        Raises VmError if that fails: then the guardian resumes it as soon as it answers.
        """
        pause = self._pauses[pid]
        try:
            with self._guardian.beating():
                if self._is_ours(pause) and pause.vm.monitor.status() == "paused":
                    if pause.vm.monitor.has_job():
                        return False
                    pause.vm.monitor.cont()
        except VmGoneError:
            pass
        except VmError:
            with self._guardian.beating():
                is_settled = resume(pause.vm.note, attempts=1)
            if not is_settled:
                self._hand_over(pause)
                raise
        faults.reached("shortage-resumed")
        pause.file.unlink(missing_ok=True)
        self._forget(pid)
        return True

    def beat(self) -> None:
        """Show the guardian that this thread lives; often, while a VM is paused."""
        self._guardian.beat()
        if self._pauses:
            # SAFETY: a pause lasts long, and memory is short: the guardian itself may be killed.
            with suppress(OSError):  # no memory for it now: tried again at the next look
                self._guardian.keep()

    def taken_over(self) -> list[Pausable]:
        """VMs that somebody else has resumed, or that ended, since we paused them.

        They are no longer ours. A monitor that does not answer tells nothing.
        """
        taken = []
        for pid, pause in list(self._pauses.items()):
            try:
                with self._guardian.beating():
                    if self._is_ours(pause) and pause.vm.monitor.status() == "paused":
                        continue
            except VmGoneError:
                pass
            except VmError:
                continue
            pause.file.unlink(missing_ok=True)
            self._forget(pid)
            taken.append(pause.vm)
        return taken

    def migrating(self) -> list[int]:
        """Paused VMs that somebody migrates: they must run before the other host takes over."""
        found = []
        for pid, pause in self._pauses.items():
            with suppress(VmError), self._guardian.beating():
                if _migrates(pause.vm.monitor):
                    found.append(pid)
        return found

    def _is_ours(self, pause: _Pause) -> bool:
        """Whether nobody has resumed it since: a user who did, and stopped it, must stay right."""
        return pause.resumes is None or pause.vm.monitor.resumes == pause.resumes

    def _watch(self) -> None:
        if not self._pauses:
            self._watched.close()
            watching = self._guardian.watching(apart=True, patience_ms=_PATIENCE_MS)
            self._watched.enter_context(watching)

    def _unwatch(self) -> None:
        if not self._pauses:
            self._watched.close()

    def _forget(self, pid: int) -> None:
        del self._pauses[pid]
        self._runtime.end_pause(pid)
        self._unwatch()

    def _hand_over(self, pause: _Pause) -> None:
        # SAFETY: killed before the note is given up, or before the guardian is told: the
        # guardian resumes the VM, as for any dead engine.
        self._runtime.give_up(pause.vm.note)
        self._guardian.take_over()
        self._forget(pause.vm.pid)

    def close(self) -> None:
        """Resume all. Idempotent."""
        for pid, pause in list(self._pauses.items()):
            with suppress(VmError):  # the guardian has it
                if not self.resume(pid):
                    self._hand_over(pause)


def _migrates(monitor: Monitor) -> bool:
    """Whether the VM is being migrated. Raises VmError."""
    return monitor.query("query-migrate", replies.MigrationReply).status in MIGRATING
