"""What /proc says of a thread, and which thread of QEMU may be borrowed.

Owns the choice of the thread and the reasons for which one is refused. Reads
only. Promises never to guess: a process in which QEMU's RCU thread can not be
told for certain is refused with the reason.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from vmdedup.errors import InjectionError, VmGoneError
from vmdedup.procfs.files import read_record
from vmdedup.syscalls import NR

# Threads that the kernel runs inside a user process (include/linux/sched.h).
_PF_IO_WORKER = 0x10
_PF_USER_WORKER = 0x4000
_PF_KTHREAD = 0x0020_0000
_KERNEL_WORKER = _PF_IO_WORKER | _PF_USER_WORKER | _PF_KTHREAD

_FLAGS, _START_TICKS = 6, 19
"""Where they stand in `_stat_fields`."""

_SAMPLES = 40
_SAMPLE_INTERVAL_S = 0.005


class ThreadId(NamedTuple):
    """A thread, told from a later one of its number."""

    tid: int
    start_ticks: int


def find_idle_thread(
    pid: int,
    excluded_tids: Callable[[], Collection[int]],
    *,
    vm: str = "",
    known: ThreadId | None = None,
) -> ThreadId:
    """QEMU's RCU thread: the second thread of the process.

    It is created before any other and never touches guest RAM. Not the second by number:
    numbers begin anew at pid_max. `excluded_tids` tells vCPU and I/O threads; it is not
    asked if the thread is `known`, which an earlier call gave: none changes what it is for.
    It must be seen waiting in futex within a fifth of a second. Raises InjectionError with
    the reason, VmGoneError.
    """
    vm = vm or f"pid {pid}"
    try:
        # In order of creation (fs/proc/base.c: proc_task_readdir, next_tid).
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError as error:
        raise VmGoneError(vm, "the process ended", pid=pid) from error
    if len(tids) < 2:
        raise InjectionError(vm, "it has no second thread to run system calls on", pid=pid)
    tid = tids[1]
    fields = _stat_fields(vm, pid, tid)
    found = ThreadId(tid, int(fields[_START_TICKS]))
    if found != known and tid in excluded_tids():
        reason = f"its second thread {tid} is a vCPU or I/O thread, not the RCU thread"
        raise InjectionError(vm, reason, pid=pid)
    if int(fields[_FLAGS]) & _KERNEL_WORKER:
        reason = f"its second thread {tid} is a kernel worker, not the RCU thread"
        raise InjectionError(vm, reason, pid=pid)
    seen: int | None = None
    for _ in range(_SAMPLES):
        seen = current_call(pid, tid)
        if seen == NR.FUTEX:
            return found
        time.sleep(_SAMPLE_INTERVAL_S)
    raise InjectionError(vm, f"thread {tid} is not idle ({call_name(seen)})", pid=pid)


def is_kernel_worker(vm: str, pid: int, tid: int) -> bool:
    """Whether the kernel itself runs this thread (kvm-nx-lpage-recovery, vhost, io_uring)."""
    return bool(int(_stat_fields(vm, pid, tid)[_FLAGS]) & _KERNEL_WORKER)


def _stat_fields(vm: str, pid: int, tid: int) -> list[str]:
    """Of /proc/PID/task/TID/stat, from the third on (proc_pid_stat(5))."""
    try:
        stat = read_record(f"/proc/{pid}/task/{tid}/stat")
    except OSError as error:
        raise VmGoneError(vm, "the process or its thread ended", pid=pid) from error
    return stat[stat.rindex(")") + 2 :].split()


def current_call(pid: int, tid: int) -> int | None:
    """Number of the system call the thread waits in; None when it runs or is gone."""
    fields = _syscall_fields(pid, tid)
    if not fields or not fields[0].isdigit():
        return None
    return int(fields[0])


def stack_pointer(pid: int, tid: int) -> int | None:
    """Of a thread that waits in a system call; None when it runs or is gone."""
    place = resting_place(pid, tid)
    return None if place is None else place.stack_pointer


class RestingPlace(NamedTuple):
    """Where a thread that does not run is: two addresses."""

    stack_pointer: int
    program_counter: int


def resting_place(pid: int, tid: int) -> RestingPlace | None:
    """Of a thread that waits, is stopped or frozen; None when it runs or is gone."""
    fields = _syscall_fields(pid, tid)
    return RestingPlace(int(fields[-2], 16), int(fields[-1], 16)) if len(fields) >= 3 else None


def _syscall_fields(pid: int, tid: int) -> list[str]:
    """Number, arguments, stack pointer, program counter (proc_pid_syscall(5)); else a word."""
    try:
        return read_record(f"/proc/{pid}/task/{tid}/syscall").split()
    except OSError:
        return []


def call_name(number: int | None) -> str:
    """For messages: what the thread does."""
    if number is None:
        return "it runs"
    known = NR(number).name.lower() if number in NR.__members__.values() else str(number)
    return f"in system call {known}"


def thread_status(vm: str, pid: int, tid: int) -> dict[str, str]:
    """/proc/PID/task/TID/status; VmGoneError when the process is gone, else InjectionError."""
    try:
        text = read_record(f"/proc/{pid}/task/{tid}/status")
    except OSError as error:
        if not Path(f"/proc/{pid}").exists():
            raise VmGoneError(vm, "the process ended", pid=pid) from error
        raise InjectionError(vm, f"thread {tid} ended", pid=pid) from error
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key: value.strip() for key, value in pairs}


def tracer_of(status: dict[str, str]) -> int:
    """Pid of the debugger attached to the thread, 0 for none."""
    return int(status.get("TracerPid", "0"))


def refusal(status: dict[str, str]) -> str | None:
    """Why nothing may be injected into a thread with this status; None when it may."""
    if (tracer := tracer_of(status)) != 0:
        return f"a debugger (pid {tracer}) is attached; detach it first"
    if "shstk" in status.get("x86_Thread_features", "").split():
        return "it runs with user shadow stacks, which injected calls would violate"
    return None
