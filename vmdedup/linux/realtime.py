"""Real-time scheduling for the moments in which a guest may wait for us.

Owns the scheduling policy of two threads: ours while a gate is closed, and the
borrowed thread of QEMU while a session is open. On a busy host a gate would
otherwise last as long as both have to wait for a processor. With them go those of our
threads that may hold Python's lock just then (`company`): one that was put aside in
favour of a guest would keep the gate closed. Promises that all get back what they had,
and that without the privilege (CAP_SYS_NICE) everything works as before, only later.

What a `kill -9` leaves: QEMU's RCU thread, which sleeps nearly always, stays at
the lowest real-time priority, marked by SCHED_RESET_ON_FORK; the next session
gives it back to the ordinary scheduler.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vmdedup.linux.syscalls import sched_setscheduler

_URGENT = os.SCHED_RR | os.SCHED_RESET_ON_FORK
_LOWEST = os.sched_param(1)
_THIS_THREAD = 0


@contextmanager
def urgent(tid: int = _THIS_THREAD) -> Iterator[None]:
    """Thread `tid` is scheduled before all ordinary ones while in the block."""
    try:
        policy, parameters = os.sched_getscheduler(tid), os.sched_getparam(tid)
        if policy == _URGENT and tid != _THIS_THREAD:  # left so by a killed predecessor
            policy, parameters = os.SCHED_OTHER, os.sched_param(0)
        sched_setscheduler(tid, _URGENT, _LOWEST.sched_priority)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        _schedule(tid, policy, parameters)


def like(tid: int) -> None:
    """Thread `tid` of ours is scheduled as this one, from now on."""
    with suppress(OSError):
        if (policy := os.sched_getscheduler(_THIS_THREAD)) != os.sched_getscheduler(tid):
            _schedule(tid, policy, os.sched_getparam(_THIS_THREAD))


def is_allowed() -> bool:
    """Whether a thread of ours may be scheduled before ordinary ones, found out by trying.

    CAP_SYS_NICE is not all it takes: a unit may restrict it (RestrictRealtime=), a cgroup may
    have no real-time budget.
    """
    found: list[int] = []

    def look() -> None:
        with urgent():
            found.append(os.sched_getscheduler(_THIS_THREAD))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0] & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR


class Company:
    """Threads that share Python's lock: while one of them hurries all do."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._usual: dict[int, tuple[int, os.sched_param]] = {}
        """By thread id, how it is scheduled when nobody hurries."""
        self._hurrying = 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """This thread is one of them while in the block."""
        tid = threading.get_native_id()
        with self._turn:
            self._usual[tid] = os.sched_getscheduler(0), os.sched_getparam(0)
            if self._hurrying:
                _schedule(tid, _URGENT, _LOWEST)
        try:
            yield
        finally:
            with self._turn:
                usual = self._usual.pop(tid)
            _schedule(tid, *usual)

    @contextmanager
    def hurrying(self) -> Iterator[None]:
        """This thread, and if it is one of them all, before ordinary ones while in the block."""
        tid = threading.get_native_id()
        if tid not in self._usual:
            with urgent():
                yield
            return
        with self._turn:
            self._hurrying += 1
            if self._hurrying == 1:
                for each in self._usual:
                    _schedule(each, _URGENT, _LOWEST)
        try:
            yield
        finally:
            self._calm(tid)

    def _calm(self, tid: int) -> None:
        """Thread `tid`, the caller, hurries no more; with the last all are as usual."""
        with self._turn:
            self._hurrying -= 1
            if self._hurrying:
                return
            for other, usual in self._usual.items():
                if other != tid:
                    _schedule(other, *usual)
        # It may be put aside at once: with the turn, none could hurry meanwhile.
        _schedule(tid, *self._usual[tid])
        with self._turn:
            if self._hurrying:
                _schedule(tid, _URGENT, _LOWEST)


company = Company()
"""One for the process, as Python's lock is."""


def _schedule(tid: int, policy: int, parameters: os.sched_param) -> None:
    with suppress(OSError):  # not permitted, or it has ended
        sched_setscheduler(tid, policy, parameters.sched_priority)
