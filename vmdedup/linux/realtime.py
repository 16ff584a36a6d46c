"""Real-time scheduling for the moments in which a guest may wait for us.

Owns the scheduling policy of two threads: ours while a gate is closed, and the
borrowed thread of QEMU while a session is open. On a busy host a gate would
otherwise last as long as both have to wait for a processor. Our other threads that may
hold Python's lock just then join them (`company`): if a guest preempted one of these, the
gate would stay closed. Promises that all get back their policy, and that without the
privilege (CAP_SYS_NICE) everything works as before, only later.

A `kill -9` leaves QEMU's RCU thread, which sleeps nearly always, at the lowest
real-time priority, marked by SCHED_RESET_ON_FORK. The next session gives it back to
the ordinary scheduler.
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
    """Schedule thread `tid` before all ordinary threads while in the block."""
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
    """Schedule thread `tid` of ours like this one, from now on."""
    with suppress(OSError):
        if (policy := os.sched_getscheduler(_THIS_THREAD)) != os.sched_getscheduler(tid):
            _schedule(tid, policy, os.sched_getparam(_THIS_THREAD))


def is_allowed() -> bool:
    """Whether a thread of ours may be scheduled before ordinary ones, found by trying.

    CAP_SYS_NICE is not enough: a unit may restrict it (RestrictRealtime=), and a cgroup may
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
    """Threads that share Python's lock: while one of them is urgent, all are."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._usual: dict[int, tuple[int, os.sched_param]] = {}
        """Policy and parameters of each thread while none is urgent, by thread id."""
        self._hurrying = 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Add this thread to the company while in the block."""
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
        """Schedule this thread, and if it has joined, all of them, as urgent while in the block."""
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
        """End the urgency of thread `tid`, the caller; after the last one all are as usual."""
        with self._turn:
            self._hurrying -= 1
            if self._hurrying:
                return
            for other, usual in self._usual.items():
                if other != tid:
                    _schedule(other, *usual)
        # The scheduler may preempt this thread at once: if it held `_turn` then, no thread
        # could become urgent meanwhile.
        _schedule(tid, *self._usual[tid])
        with self._turn:
            if self._hurrying:
                _schedule(tid, _URGENT, _LOWEST)


company = Company()
"""The only one: the process has one Python lock."""


def _schedule(tid: int, policy: int, parameters: os.sched_param) -> None:
    with suppress(OSError):  # not permitted, or it has ended
        sched_setscheduler(tid, policy, parameters.sched_priority)
