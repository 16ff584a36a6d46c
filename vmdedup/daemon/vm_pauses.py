"""Pauses of VMs while memory is short.

Owns the VMs that are paused until there is memory, and their stop notes. Promises that a VM
is resumed by us only if we have paused it: one that a user has stopped is left alone, and one
that a user has resumed is the user's from then on. No VM is paused that could not be resumed
after our death. Used on one thread; pauses for a merge are `remap.stopped`'s.

What a `kill -9` leaves between `stop` and `cont`: a stop note, from which the guardian resumes
the VM. While a VM is paused the guardian watches this thread, and kills an engine that hangs.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vmdedup import faults
from vmdedup.attach.monitor import Monitor
from vmdedup.closing import Closing
from vmdedup.errors import VmError, VmGoneError
from vmdedup.guardian.guardian import Guardian
from vmdedup.guardian.resume import resume
from vmdedup.guardian.runtime_dir import RuntimeDirectory, StopNote
from vmdedup.linux.process import read_process_id
from vmdedup.vm.attached_vm import AttachedVm

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
            if vm.monitor.status() != "running":
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

    def resume(self, pid: int) -> None:
        """Resume a VM that we have paused, unless somebody else has resumed it.

        Raises VmError if that fails: then the guardian resumes it as soon as it answers.
        """
        pause = self._pauses[pid]
        try:
            with self._guardian.beating():
                if self._is_ours(pause) and pause.vm.monitor.status() == "paused":
                    pause.vm.monitor.cont()
        except VmGoneError:
            pass
        except VmError:
            if not resume(pause.vm.note, attempts=1):
                # SAFETY: killed before the note is given up, or before the guardian is told:
                # the guardian resumes the VM, as for any dead engine.
                self._runtime.give_up(pause.vm.note)
                self._guardian.take_over()
                self._forget(pid)
                raise
        faults.reached("shortage-resumed")
        pause.file.unlink(missing_ok=True)
        self._forget(pid)

    def beat(self) -> None:
        """Show the guardian that this thread lives; often, while a VM is paused."""
        self._guardian.beat()

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

    def _is_ours(self, pause: _Pause) -> bool:
        """Whether nobody has resumed it since: a user who did, and stopped it, must stay right."""
        return pause.resumes is None or pause.vm.monitor.resumes == pause.resumes

    def _watch(self) -> None:
        if not self._pauses:
            self._watched.close()
            self._watched.enter_context(self._guardian.watching(apart=True))

    def _unwatch(self) -> None:
        if not self._pauses:
            self._watched.close()

    def _forget(self, pid: int) -> None:
        del self._pauses[pid]
        self._runtime.end_pause(pid)
        self._unwatch()

    def close(self) -> None:
        """Resume all. Idempotent."""
        for pid in list(self._pauses):
            try:
                self.resume(pid)
            except VmError:
                continue  # the guardian has it
