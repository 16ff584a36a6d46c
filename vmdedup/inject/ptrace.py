"""ptrace on one thread, with a distinct reason for every refusal.

Owns PTRACE_SEIZE to PTRACE_DETACH of a single thread of another process.
Promises: all of it happens on the thread that seized the `Tracee` (the kernel
binds a tracee to one tracing thread); a signal that is on its way to the thread
is passed on, not lost; `detach` can always be called.

What a `kill -9` of this process leaves: the kernel detaches the thread, which
continues with the registers it has at that moment. PTRACE_O_EXITKILL is never set.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Final

from vmdedup.errors import InjectionError, VmError, VmGoneError
from vmdedup.inject.threads import thread_status, tracer_of
from vmdedup.inject.x86_64 import Registers
from vmdedup.linux import syscalls
from vmdedup.linux.syscalls import NR

# include/uapi/linux/ptrace.h
_DETACH = 17
_GETREGSET = 0x4204
_SETREGSET = 0x4205
_SEIZE = 0x4206
_INTERRUPT = 0x4207
_GETSIGMASK = 0x420A
_SECCOMP_GET_FILTER = 0x420C
_EVENT_STOP = 128
# include/uapi/linux/elf.h
_NT_PRSTATUS = 1
_NT_PRFPREG = 2
_NT_X86_XSTATE = 0x202

_WALL = 0x4000_0000
_XSTATE_MOST_BYTES = 1 << 16
_SOCK_FILTER_BYTES = 8
_FILTER_MOST_BYTES = 4096 * _SOCK_FILTER_BYTES
"""Longest filter: BPF_MAXINSNS instructions (include/uapi/linux/bpf_common.h)."""
NO_PERMISSION = (
    "no permission for ptrace: run as root (CAP_SYS_PTRACE), or see kernel.yama.ptrace_scope"
)

_ENDED = ("Z", "X")
"""States of a thread that has ended (proc_pid_stat(5))."""
_SPIN_S = 0.001
_POLL_S = 0.0002
_REAP_TIMEOUT_S = 5.0
_DYING_S = 0.2
"""Longest time from the end of one thread to the end of its process, on a busy host."""


class Stop(Enum):
    """Why a seized thread stands still."""

    TRAP = auto()
    """Our own PTRACE_INTERRUPT."""
    SIGNAL = auto()
    """A signal is about to be delivered to it."""
    GROUP = auto()
    """The whole process is stopped by SIGSTOP or the like."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))
    base: int
    length: int


class Tracee:
    """One thread of another process, seized or not.

    `beat` is called while we wait for the thread, to show that we live.
    """

    def __init__(
        self, vm: str, pid: int, tid: int, *, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.vm = vm
        self._beat = beat
        self.pid = pid
        self.tid: Final = tid
        self.seized = False
        self._stopped = False
        self._signal = 0
        self._owner = 0
        """Id of our thread that seized it."""

    def _require_owner(self) -> None:
        if threading.get_native_id() != self._owner:
            raise RuntimeError("ptrace: a process must be traced by the thread that attached to it")

    def seize(self) -> None:
        """PTRACE_SEIZE: attach without stopping. The same thread of ours must detach."""
        self._owner = threading.get_native_id()
        try:
            self._ptrace(_SEIZE)
        except PermissionError as error:
            raise self._not_permitted() from error
        self.seized = True

    def interrupt(self, timeout_s: float) -> Stop:
        """Stop the seized thread and wait until it has stopped.

        Raises InjectionError after `timeout_s`; the thread is then still seized and will
        stop later, so `detach` must be called (it waits for the stop).
        """
        self._ptrace(_INTERRUPT)
        return self._await_stop(timeout_s)

    def _await_stop(self, timeout_s: float) -> Stop:
        started = time.monotonic()
        while True:
            self._beat()
            try:
                found, status = os.waitpid(self.tid, os.WNOHANG | _WALL)
            except ChildProcessError as error:  # uncovered: it ends after PTRACE_INTERRUPT
                raise self._lost() from error
            if found:
                return self._stop_reason(status)
            waited_s = time.monotonic() - started
            if waited_s > timeout_s:
                reason = f"thread {self.tid} did not stop within {timeout_s:g} s"
                raise InjectionError(self.vm, reason, pid=self.pid)
            if waited_s > _SPIN_S:
                time.sleep(_POLL_S)
            else:
                os.sched_yield()

    def _stop_reason(self, status: int) -> Stop:
        if not os.WIFSTOPPED(status):
            raise self._lost()
        self._stopped = True
        if status >> 16 != _EVENT_STOP:
            # SAFETY: the kernel has handed us the signal; detach() delivers it. Killed
            # here: that one signal is lost (as with every debugger). QEMU's RCU thread
            # has all signals blocked, so it never gets here.
            self._signal = os.WSTOPSIG(status)
            return Stop.SIGNAL
        return Stop.TRAP if os.WSTOPSIG(status) == signal.SIGTRAP else Stop.GROUP

    def registers(self) -> Registers:
        """The stopped thread's registers; InjectionError for a 32-bit task."""
        registers = Registers()
        vector = _Iovec(ctypes.addressof(registers), ctypes.sizeof(registers))
        self._ptrace(_GETREGSET, _NT_PRSTATUS, ctypes.addressof(vector))
        if vector.length != ctypes.sizeof(registers) or not registers.is_64_bit:
            raise InjectionError(self.vm, "it is a 32-bit process", pid=self.pid)
        return registers

    def set_registers(self, registers: Registers) -> None:
        """Replace the stopped thread's registers, all at once."""
        vector = _Iovec(ctypes.addressof(registers), ctypes.sizeof(registers))
        self._ptrace(_SETREGSET, _NT_PRSTATUS, ctypes.addressof(vector))

    def signal_mask(self) -> int:
        """The thread's blocked signals, or the mask that a call such as ppoll(2) will restore."""
        mask = ctypes.c_uint64()
        self._ptrace(_GETSIGMASK, ctypes.sizeof(mask), ctypes.addressof(mask))
        return mask.value

    def extended_state(self) -> bytes:
        """The XSAVE area (x87, SSE, AVX, AVX-512, PKRU, …) in its standard format.

        If the processor has no XSAVE, or the kernel was told not to use it: the FXSAVE area
        (x87, SSE), which is then a thread's whole extended state.
        """
        try:
            return self._register_set(_NT_X86_XSTATE)
        except OSError as error:
            # xstateregs_get in arch/x86/kernel/fpu/regset.c
            if error.errno != errno.ENODEV:  # uncovered: no kernel gives another error
                raise
        return self._register_set(_NT_PRFPREG)

    def _register_set(self, which: int) -> bytes:
        buffer = ctypes.create_string_buffer(_XSTATE_MOST_BYTES)
        vector = _Iovec(ctypes.addressof(buffer), _XSTATE_MOST_BYTES)
        self._ptrace(_GETREGSET, which, ctypes.addressof(vector))
        return buffer.raw[: vector.length]

    def filters(self) -> tuple[bytes, ...]:
        """The stopped thread's system call filters, each an array of `struct sock_filter`.

        Raises OSError if they may not be read: without CAP_SYS_ADMIN, under a filter of
        our own, on a kernel without CONFIG_CHECKPOINT_RESTORE.
        """
        buffer = ctypes.create_string_buffer(_FILTER_MOST_BYTES)
        found: list[bytes] = []
        while True:
            try:
                count = self._ptrace(_SECCOMP_GET_FILTER, len(found), ctypes.addressof(buffer))
            except FileNotFoundError:
                return tuple(found)
            found.append(buffer.raw[: count * _SOCK_FILTER_BYTES])

    def detach(self, stop_timeout_s: float = 10.0) -> None:
        """Detach from the thread, which continues with the registers it has now.

        The kernel detaches only a stopped thread, so it is stopped first. Does nothing if not
        attached. Raises VmGoneError if the process ended, InjectionError if only the thread
        ended, RuntimeError on another thread than the one that seized it.
        """
        if not self.seized:
            return
        self._require_owner()
        if not self._stopped:
            # Once more does no harm if it was interrupted before.
            self._ptrace(_INTERRUPT)
            self._await_stop(stop_timeout_s)
        self._ptrace(_DETACH, 0, self._signal)
        self._forget()

    def _forget(self) -> None:
        self.seized = self._stopped = False
        self._signal = 0

    def _ptrace(self, request: int, address: int = 0, data: int = 0) -> int:
        try:
            return syscalls.syscall(NR.PTRACE, request, self.tid, address, data)
        except ProcessLookupError as error:
            raise self._lost() from error

    def _lost(self) -> VmError:
        """The error for a thread that has ended, or is about to end."""
        if self.seized and self._reap():
            self._forget()
        if self._process_runs():
            return InjectionError(self.vm, f"thread {self.tid} ended", pid=self.pid)
        return VmGoneError(self.vm, "the VM's process ended", pid=self.pid)

    def _reap(self) -> bool:
        """Reap the dying thread: until then its process stays a zombie because of us."""
        deadline = time.monotonic() + _REAP_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                found, status = os.waitpid(self.tid, os.WNOHANG | _WALL)
            except ChildProcessError:
                return True
            if found and not os.WIFSTOPPED(status):
                return True
            time.sleep(_POLL_S)
        return False  # uncovered: a thread ends for longer than _REAP_TIMEOUT_S

    def _process_runs(self) -> bool:
        """Whether the process outlives its thread: a kill of one thread soon ends them all."""
        deadline = time.monotonic() + _DYING_S
        while time.monotonic() < deadline:
            try:
                stat = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
            except OSError:
                return False
            if stat[stat.rindex(")") + 2] in _ENDED:
                return False
            time.sleep(_POLL_S)
        return True

    def _not_permitted(self) -> VmError:
        status = thread_status(self.vm, self.pid, self.tid)
        if tracer := tracer_of(status):
            reason = f"a debugger (pid {tracer}) is attached; detach it first"
            return InjectionError(self.vm, reason, pid=self.pid)
        if status.get("State", "")[:1] in _ENDED:
            return self._lost()
        return InjectionError(self.vm, NO_PERMISSION, pid=self.pid)
