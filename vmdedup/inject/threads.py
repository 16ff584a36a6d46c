"""A thread's state in /proc, and which thread of QEMU may be borrowed.

Owns the choice of the thread and the reasons for refusing one. Reads only. Promises
never to guess: if QEMU's RCU thread cannot be identified for certain, the process is
refused with the reason.

QEMU's RCU thread waits for events of its own (util/rcu.c: rcu_call_ready_event,
rcu_gp_event), which are static objects: their words lie in the data of QEMU's executable.
A library that was loaded before QEMU started may have made a thread earlier. That thread
waits for a word in the library's data or on the heap, or for no word at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from vmdedup.errors import InjectionError, VmGoneError
from vmdedup.linux.maps import Maps, read_maps
from vmdedup.linux.proc_file import read_record
from vmdedup.linux.syscalls import NR

# Threads that the kernel runs inside a user process (include/linux/sched.h).
_PF_IO_WORKER = 0x10
_PF_USER_WORKER = 0x4000
_PF_KTHREAD = 0x0020_0000
_KERNEL_WORKER = _PF_IO_WORKER | _PF_USER_WORKER | _PF_KTHREAD

_FLAGS, _START_TICKS, _START_BRK = 6, 19, 44
"""Indexes of these values in `_stat_fields`."""
_EV_BUSY = 0xFFFF_FFFF
"""Value of a QEMU event's word while a thread waits for it (util/qemu-thread-posix.c)."""

_SAMPLES = 40
_SAMPLE_INTERVAL_S = 0.005


class ThreadId(NamedTuple):
    """A thread, distinguished from later threads with the same number."""

    tid: int
    start_ticks: int


class Waiting(NamedTuple):
    """A futex wait in which a thread was seen."""

    address: int
    """Address of the word that the thread waits for."""
    expected: int
    """Value of the word when the wait began."""


def find_idle_thread(
    pid: int,
    excluded_tids: Callable[[], Collection[int]],
    *,
    vm: str = "",
    known: ThreadId | None = None,
) -> ThreadId:
    """QEMU's RCU thread: the one that waits for a word in QEMU's own data.

    It never touches guest RAM. QEMU makes it before any other, so it is the second thread
    of the process unless a preloaded library made one earlier; then it is the only
    other thread that waits for an event there. `excluded_tids` gives vCPU and I/O threads.
    It is not called if the thread is still the one that an earlier call found (`known`), as
    threads keep their purpose. The thread must be seen waiting within a fifth of a second.
    Raises InjectionError with the reason, VmGoneError.
    """
    vm = vm or f"pid {pid}"
    try:
        # In order of creation (fs/proc/base.c: proc_task_readdir, next_tid). Not by number:
        # numbers start again after pid_max.
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError as error:
        raise VmGoneError(vm, "the process ended", pid=pid) from error
    if len(tids) < 2:
        raise InjectionError(vm, "it has no second thread to run system calls on", pid=pid)
    if known is not None and known.tid in tids and _thread_id(vm, pid, known.tid) == known:
        _await_futex(vm, pid, known.tid)
        return known
    return _choose(vm, pid, tids, excluded_tids())


def _await_futex(vm: str, pid: int, tid: int) -> None:
    seen: int | None = None
    for _ in range(_SAMPLES):
        seen = current_call(pid, tid)
        if seen == NR.FUTEX:
            return
        time.sleep(_SAMPLE_INTERVAL_S)
    raise InjectionError(vm, f"thread {tid} is not idle ({call_name(seen)})", pid=pid)


def _choose(vm: str, pid: int, tids: list[int], excluded: Collection[int]) -> ThreadId:
    """The RCU thread among these, which are in order of creation."""
    second = tids[1]
    may_be = [tid for tid in tids[1:] if tid not in excluded]
    if not may_be:
        raise InjectionError(vm, "each other thread of it is a vCPU or I/O thread", pid=pid)
    try:
        data = executable_data(vm, pid, read_maps(vm, pid))
    except PermissionError as error:
        raise InjectionError(vm, "its mappings may not be read: run as root", pid=pid) from error
    found: list[int] = []
    for _ in range(_SAMPLES):
        waiting = {tid: futex_wait(pid, tid) for tid in may_be}
        inside = {tid: one for tid, one in waiting.items() if one and one.address in data}
        if second in inside:
            return _usable(vm, pid, second)
        # A lock of QEMU's may lie there too; a thread waiting for a lock expects another value.
        found = [tid for tid, one in inside.items() if one.expected == _EV_BUSY]
        if len(found) == 1:
            return _usable(vm, pid, found[0])
        time.sleep(_SAMPLE_INTERVAL_S)
    seen = current_call(pid, second)
    if found:
        names = ", ".join(map(str, found))
        reason = f"its RCU thread cannot be told: threads {names} all wait for events of QEMU's"
    elif second in excluded:
        reason = f"its second thread {second} is a vCPU or I/O thread, and no other waits as QEMU's"
        reason += " RCU thread does"
    elif seen != NR.FUTEX:
        reason = f"thread {second} is not idle ({call_name(seen)})"
    else:
        reason = f"no thread of it waits as QEMU's RCU thread does; thread {second} is a library's"
    raise InjectionError(vm, reason, pid=pid)


def _thread_id(vm: str, pid: int, tid: int) -> ThreadId:
    return ThreadId(tid, int(_stat_fields(vm, pid, tid)[_START_TICKS]))


def _usable(vm: str, pid: int, tid: int) -> ThreadId:
    if _is_kernel_worker(vm, pid, tid):  # uncovered: none was ever seen in futex
        reason = f"its thread {tid} is a kernel worker, not the RCU thread"
        raise InjectionError(vm, reason, pid=pid)
    return _thread_id(vm, pid, tid)


def executable_data(vm: str, pid: int, maps: Maps) -> range:
    """Addresses of the executable's own data: its writable mappings and the bss behind them.

    Directly behind the file's mapping the kernel puts anonymous memory for data that starts as
    zeroes (bss). Without address randomization the heap follows in the same mapping, from
    start_brk on. Empty if there is no such data. Raises VmGoneError, PermissionError.
    """
    try:
        found = os.stat(f"/proc/{pid}/exe")
        path = os.readlink(f"/proc/{pid}/exe")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmGoneError(vm, "the process ended", pid=pid) from error
    of_file = set(maps.of_file(found.st_dev, found.st_ino).tolist())
    # Filesystems with devices of their own (btrfs, overlay) show another device in maps.
    of_file |= {row for row, name in enumerate(maps.path) if name == path}
    writable = [row for row in sorted(of_file) if maps.permissions[row].startswith("rw")]
    if not writable:
        return range(0)
    start, end = int(maps.start[writable[0]]), int(maps.end[writable[-1]])
    for row in range(writable[-1] + 1, len(maps)):
        if maps.start[row] != end or maps.inode[row] or not maps.permissions[row].startswith("rw"):
            break
        end = int(maps.end[row])
        if maps.path[row] == "[heap]":
            start_brk = int(_stat_fields(vm, pid, pid)[_START_BRK])
            end = max(int(maps.start[row]), min(end, start_brk))
            break
    return range(start, end)


def _is_kernel_worker(vm: str, pid: int, tid: int) -> bool:
    """Whether the kernel itself runs this thread (kvm-nx-lpage-recovery, vhost, io_uring)."""
    return bool(int(_stat_fields(vm, pid, tid)[_FLAGS]) & _KERNEL_WORKER)


def _stat_fields(vm: str, pid: int, tid: int) -> list[str]:
    """Fields of /proc/PID/task/TID/stat, from the third on (proc_pid_stat(5))."""
    try:
        stat = read_record(f"/proc/{pid}/task/{tid}/stat")
    except OSError as error:  # uncovered: it was seen in futex a moment ago
        raise VmGoneError(vm, "the process or its thread ended", pid=pid) from error
    return stat[stat.rindex(")") + 2 :].split()


def current_call(pid: int, tid: int) -> int | None:
    """Number of the system call the thread waits in; `None` if it runs or is gone."""
    fields = _syscall_fields(pid, tid)
    if not fields or not fields[0].isdigit():
        return None
    return int(fields[0])


def futex_wait(pid: int, tid: int) -> Waiting | None:
    """The futex wait that the thread is in; `None` if it is in none, or gone."""
    fields = _syscall_fields(pid, tid)
    if len(fields) < 4 or fields[0] != str(int(NR.FUTEX)):
        return None
    return Waiting(int(fields[1], 16), int(fields[3], 16) & _EV_BUSY)


def stack_pointer(pid: int, tid: int) -> int | None:
    """Stack pointer of a thread that waits in a system call; `None` if it runs or is gone."""
    place = resting_place(pid, tid)
    return None if place is None else place.stack_pointer


class RestingPlace(NamedTuple):
    """The stack pointer and program counter of a thread that does not run."""

    stack_pointer: int
    program_counter: int


def resting_place(pid: int, tid: int) -> RestingPlace | None:
    """Place of a thread that waits, is stopped or frozen; `None` if it runs or is gone."""
    fields = _syscall_fields(pid, tid)
    return RestingPlace(int(fields[-2], 16), int(fields[-1], 16)) if len(fields) >= 3 else None


def _syscall_fields(pid: int, tid: int) -> list[str]:
    """Number, arguments, stack pointer, program counter (proc_pid_syscall(5)); else a word."""
    try:
        return read_record(f"/proc/{pid}/task/{tid}/syscall").split()
    except OSError:
        return []


def call_name(number: int | None) -> str:
    """The thread's activity in words, for messages."""
    if number is None:
        return "it runs"
    known = NR(number).name.lower() if number in NR.__members__.values() else str(number)
    return f"in system call {known}"


def thread_status(vm: str, pid: int, tid: int) -> dict[str, str]:
    """/proc/PID/task/TID/status. Raises VmGoneError if the process is gone, InjectionError if
    only the thread is.
    """
    try:
        text = read_record(f"/proc/{pid}/task/{tid}/status")
    except OSError as error:
        if not Path(f"/proc/{pid}").exists():
            raise VmGoneError(vm, "the process ended", pid=pid) from error
        raise InjectionError(vm, f"thread {tid} ended", pid=pid) from error
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key: value.strip() for key, value in pairs}


def tracer_of(status: dict[str, str]) -> int:
    """Pid of the debugger attached to the thread, `0` if there is none."""
    return int(status.get("TracerPid", "0"))


def refusal(status: dict[str, str]) -> str | None:
    """Why nothing may be injected into a thread with this status; `None` if it may."""
    if (tracer := tracer_of(status)) != 0:
        return f"a debugger (pid {tracer}) is attached; detach it first"
    if "shstk" in status.get("x86_Thread_features", "").split():
        return "it runs with user shadow stacks, which injected calls would violate"
    return None
