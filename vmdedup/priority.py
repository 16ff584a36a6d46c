"""Real-time scheduling for the moments in which a guest may wait for us.

Owns the scheduling policy of two threads: ours while a gate is closed, and the
borrowed thread of QEMU while a session is open. On a busy host a gate would
otherwise last as long as both have to wait for a processor. Promises that both
get back what they had, and that without the privilege (CAP_SYS_NICE) everything
works as before, only later.

What a `kill -9` leaves: QEMU's RCU thread, which sleeps nearly always, stays at
the lowest real-time priority, marked by SCHED_RESET_ON_FORK; the next session
gives it back to the ordinary scheduler.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
        os.sched_setscheduler(tid, _URGENT, _LOWEST)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # it has ended
            os.sched_setscheduler(tid, policy, parameters)
