"""Time limits for tables of calls that another process may keep from ending.

Owns the threads that copy a process's memory. Such a copy waits in the kernel for as long as
the process's own page fault would: for ever if nothing serves that fault (a userfaultfd of
the process's own, a file of a FUSE that has stopped). Only our death would end it
(mm/userfaultfd.c waits killably), so it is done on a thread that can be left behind.

Promises that `run` returns, or raises StuckError, within `LIMIT_S` of the last call that
ended. Memory that a thread left behind may still write to is not freed, and no second
thread waits for the same process. Refuses reads in place: QEMU's thread does those.

The thread runs 85 bytes of machine code, which wait for a table, have `syscall_batch`'s loop
run it, and signal its end; they never take Python's lock. Handing a table over takes some
ten microseconds. Without executable memory Python does the same, more slowly.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup.errors import StuckError
from vmdedup.linux.process import ProcessId, read_process_id
from vmdedup.linux.realtime import like
from vmdedup.linux.syscall_batch import call_table, code_at, loop_address, run_table
from vmdedup.linux.syscalls import NR

LIMIT_S = 5.0
"""Longest time from the end of one call to the end of the next, seconds. A slow swap device
brings a MiB in two seconds."""
_SLICE_S = 0.05
_NOT_YET = np.uint64(0x8000_0000_5A5A_5A5A)
"""Marks a call without a result yet; no call returns it."""

SERVE = bytes.fromhex(
    "534889fb833b007516b8ca0000004889dfbe8000000031d24531d20f05ebe5c7"
    "0300000000488b7b084885ff7425488b7310ff5320c7431801000000b8ca0000"
    "00488d7b18be81000000ba010000000f05ebb15bc3"
)
"""`void serve(uint64_t mailbox[5])`; its source is tests/process/serve.S."""

_REQUEST, _FIRST, _BEHIND, _DONE, _LOOP = range(5)
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129

_libc = ctypes.CDLL(None)
_libc.syscall.restype = ctypes.c_long
# Keeps Python's lock, which a wake need not release.
_quick = ctypes.PyDLL(None)
_quick.syscall.restype = ctypes.c_long

Uint64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]


class _Helper:
    """A thread that runs tables, one after the other."""

    def __init__(self) -> None:
        self._mailbox = np.zeros(5, dtype=np.uint64)
        self._address = self._mailbox.ctypes.data
        self._mailbox[_LOOP] = loop_address() or 0
        self._tid = 0
        self._lives = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="vmdedup-copies", daemon=True)
        self._thread.start()
        self._lives.wait()

    def _serve(self) -> None:
        # A signal handler of Python's would have to run here.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._tid = threading.get_native_id()
        self._lives.set()
        code = code_at(SERVE) if self._mailbox[_LOOP] else None
        if code is not None:
            ctypes.CFUNCTYPE(None, ctypes.c_size_t)(code)(self._address)
            return
        while True:
            while not self._mailbox[_REQUEST]:
                _wait(self._address + 8 * _REQUEST, 1.0)
            self._mailbox[_REQUEST] = 0
            run_table(*self._mailbox[[_FIRST, _BEHIND]].tolist())
            self._mailbox[_DONE] = 1
            self._wake(_DONE)

    def _wake(self, word: int) -> None:
        address = ctypes.c_ulong(self._address + 8 * word)
        _quick.syscall(ctypes.c_long(NR.FUTEX), address, _FUTEX_WAKE_PRIVATE, 1)

    @property
    def is_done(self) -> bool:
        """Whether the last table has been run."""
        return bool(self._mailbox[_DONE])

    def start(self, first: int, behind: int) -> None:
        """Have it run the rows from `first` up to `behind`, scheduled like this thread."""
        like(self._tid)
        self._mailbox[_FIRST], self._mailbox[_BEHIND] = first, behind
        self._mailbox[_DONE] = 0
        self._mailbox[_REQUEST] = 1
        self._wake(_REQUEST)

    def wait(self, timeout_s: float) -> bool:
        """Whether the table was run within `timeout_s`."""
        _wait(self._address + 8 * _DONE, timeout_s)
        return self.is_done


def _wait(address: int, timeout_s: float) -> None:
    """Sleep while the word at `address` is `0`, for at most `timeout_s`."""
    timeout = (ctypes.c_long * 2)(0, int(timeout_s * 1_000_000_000) - 1)
    word = ctypes.c_ulong(address)
    _libc.syscall(ctypes.c_long(NR.FUTEX), word, _FUTEX_WAIT_PRIVATE, 0, ctypes.byref(timeout))


@dataclass(frozen=True)
class _Left:
    """A thread that was left behind, the process it copies, and memory it may still write to."""

    helper: _Helper
    process: ProcessId | None
    kept: object


class Beating(Protocol):
    """A listener that is told that the calling thread lives, while it waits here with a limit."""

    def beat(self) -> None:
        """Note that the thread lives."""


class _Pool:
    """The helpers: those that wait for work, and those that were left behind."""

    def __init__(self) -> None:
        self.told: weakref.WeakSet[Beating] = weakref.WeakSet()
        self.forget()

    def forget(self) -> None:
        """Forget all threads, as in a forked child: they stayed with the parent."""
        self._turn = threading.Lock()
        self._idle: list[_Helper] = []
        self._left: list[_Left] = []

    def take(self) -> _Helper:
        """A thread that waits for work. Raises OSError if none can be started."""
        with self._turn:
            if self._idle:
                return self._idle.pop()
        try:
            return _Helper()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from error

    def put(self, helper: _Helper) -> None:
        """Take back a thread that waits for work again."""
        with self._turn:
            self._idle.append(helper)

    def leave(self, helper: _Helper, pid: int, *kept: object) -> None:
        """Leave a thread behind, and keep the memory it may write to."""
        with self._turn:
            self._left.append(_Left(helper, _identity(pid), kept))

    def is_stuck(self, pid: int) -> bool:
        """Whether a thread is stuck on exactly this process; takes back those ended since."""
        if not self._left:
            return False
        with self._turn:
            ended = [left for left in self._left if left.helper.is_done]
            self._left = [left for left in self._left if left not in ended]
            self._idle += [left.helper for left in ended]
            stuck = {left.process for left in self._left}
        return _identity(pid) in stuck - {None}


_pool = _Pool()


def tell_while_waiting(told: Beating) -> None:
    """Have `told` hear that a thread of ours lives while it waits here."""
    _pool.told.add(told)


def is_stuck(pid: int) -> bool:
    """Whether a copy from exactly this process was left behind, and has not ended since."""
    return _pool.is_stuck(pid)


def run(vm: str, pid: int, rows: Uint64s, *kept: object) -> Int64s:
    """Results of rows that copy memory of process `pid`, as `syscall_batch.run_calls` gives them.

    `kept`: the memory that the rows point to. Raises StuckError, OSError.
    """
    if is_stuck(pid):
        raise StuckError(vm, pid, began_now=False)
    table = call_table(rows)
    table[:, -1] = _NOT_YET
    helper = _pool.take()
    try:
        helper.start(table.ctypes.data, table.ctypes.data + table.nbytes)
        if not helper.wait(_SLICE_S) and not _ends(helper, table):
            raise StuckError(vm, pid, began_now=True)
    except BaseException:  # an interrupt too: the memory it copies to must not be freed
        _pool.leave(helper, pid, table, kept)
        raise
    _pool.put(helper)
    return table[:, -1].view(np.int64).copy()


def _ends(helper: _Helper, table: Uint64s) -> bool:
    """Wait for the thread while calls of the table go on ending; whether all have ended."""
    done, since = -1, time.monotonic()
    while not helper.wait(_SLICE_S):
        for each in list(_pool.told):
            each.beat()
        now = int(np.count_nonzero(table[:, -1] != _NOT_YET))
        if now != done:
            done, since = now, time.monotonic()
        if time.monotonic() - since > LIMIT_S:
            return False
    return True


def _identity(pid: int) -> ProcessId | None:
    try:
        return read_process_id(pid)
    except OSError:
        return None


os.register_at_fork(after_in_child=_pool.forget)
