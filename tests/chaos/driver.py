"""The process that is killed: an engine whose fault hook ends or stops it.

Run as `python -m tests.chaos.driver`. For each job, a JSON object on one line of
stdin, it forks an engine that merges (and unmerges) without end; what happens is
told on stdout, one JSON object a line: the engine's `pid`, `attached` with the
guardian's pid, and its `exit` code. All is imported once, before the forks.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from tests.chaos import halting
from tests.chaos.lost import vm_at_hand
from vmdedup import faults
from vmdedup.deduplicator import Deduplicator
from vmdedup.remap import merge_vm
from vmdedup.settings import Settings

merge_vm.LEAST_IN_PLACE_PAGES = 1  # so that small guests go the way of large ones

EXIT_CODE = 7
"""Of an engine that ended by itself at its step."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _tell(**facts: object) -> None:
    os.write(1, (json.dumps(facts) + "\n").encode())


class _Trap:
    """The fault hook: does `action` when `step` is reached the `occurrence`-th time.

    With `after`, only those count that follow on that step without another between
    (steps of injection aside). Of `together` threads all but the last wait there.
    """

    def __init__(self, dedup: Deduplicator, job: dict[str, Any]) -> None:
        self._dedup = dedup
        self._step = job["step"]
        self._after = job["after"]
        self._action = job["action"]
        self._left = job["occurrence"]
        self._missing = job["together"]
        self._halt_at, self._halt = job["halt_at"], job["halt"]
        self._halted_pid = 0
        self._thread = threading.local()
        self._counting = threading.Lock()

    def __call__(self, step: str) -> None:
        last = getattr(self._thread, "last", "")
        if not step.startswith("inject-"):
            last = self._thread.last = step
        if step == self._halt_at and not self._halted_pid:
            self._halt_vm_at_hand()
        if step != self._step or self._after not in ("", last) or self._is_of_another_vm():
            return
        with self._counting:
            self._left -= 1
            if self._left >= 0:
                return
            self._missing -= 1
            waits = self._missing > 0
        while waits:
            time.sleep(1)
        if self._action == "EXIT":
            os._exit(EXIT_CODE)
        if self._action == "KILL_BOTH":
            os.kill(guardian_pid(self._dedup), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP if self._action == "STOP" else signal.SIGKILL)
        while True:  # a stop reaches this thread only after the main thread took the signal
            time.sleep(1)

    def _halt_vm_at_hand(self) -> None:
        vm = vm_at_hand()
        with self._counting:
            if vm is None or self._halted_pid:
                return
            self._halted_pid = vm.pid
        _tell(halted=vm.pid)
        halting.begin(vm.pid, self._halt)

    def _is_of_another_vm(self) -> bool:
        if not self._halt_at:
            return False
        vm = vm_at_hand()
        return vm is None or vm.pid != self._halted_pid


def guardian_pid(dedup: Deduplicator) -> int:
    """The process id of the guardian that watches this engine."""
    assert dedup._fleet is not None
    assert dedup._fleet.guardian_pid is not None
    return dedup._fleet.guardian_pid


def _engine(job: dict[str, Any]) -> None:
    with Deduplicator(Settings(**job["settings"])) as dedup:
        faults.hook = _Trap(dedup, job)
        vms = dedup.attach(job["qmp"]).vms
        refused = [f"{vm.name}: {vm.reason}" for vm in vms if not vm.mergeable]
        assert not refused, refused
        _tell(attached=True, guardian=guardian_pid(dedup))
        passes = 0
        while True:
            passes += 2
            if job["merge"]:
                report = dedup.run(passes=passes)
                lost = [f"{vm.name}: {vm.reason}" for vm in report.vms if vm.status == "gone"]
                assert not lost, lost
            if job["unmerge"]:
                dedup.unmerge()


def _run_job(job: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _tell(pid=os.getpid())
        _engine(job)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _tell(ready=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run_job(json.loads(line))
        _tell(exit=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
