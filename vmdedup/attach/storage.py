"""Whether a VM's storage answers: asked before a drain, which would otherwise freeze the VM.

QEMU drains with its big lock held: until the last request in flight has ended, no monitor
answers and no vCPU gets far. Owns the looks before a drain, their results, and when to look
again. Promises that no drain begins while a request is seen not to end, or not soon. A VM
whose disks are quiet costs one batch of monitor commands; a VM without disks costs nothing,
because its drain has nothing to wait for. A VM that was put off is looked at ever more
rarely. A request that begins to hang after the last look, a moment before the drain, is
not foreseen.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from vmdedup.attach.disks import Disks, find_disks, is_submitting, look
from vmdedup.attach.monitor import Monitor
from vmdedup.core.in_flight import (
    Doubtful,
    Ends,
    Judgement,
    Look,
    Slow,
    Stuck,
    Unclear,
    has_moved,
    judge,
)
from vmdedup.errors import DrainPostponedError, VmError

PAUSES_S = (*[0.0] * 20, 0.001, 0.002, 0.004, 0.008, *[0.016] * 13)
"""Pauses between looks, seconds, while looks are not conclusive; together at most 0.25 s."""
_HANGS_S, _BUSY_S = 1.0, 3.0
"""Seconds after which `away` reports requests that do not end, or that may not end soon."""
_LINGERS_S = 2.0
"""Seconds in the very same call after which a thread counts as hanging."""
_FIRST_RETRY_S = 0.25
_LAST_RETRY_S = 10.0
_LAST_SLOW_RETRY_S = 1.0
"""Longest pause if requests only take long, which may change from one moment to the next."""
_UNKNOWN_DISKS = Disks(exist=True)
"""Stands for disks that QEMU was not asked about yet: the kernel tells of their requests."""
_GOOD_SERIES, _GOOD_SERIES_AFTER_DOUBT = 3, 5
"""Successive series of looks that must go well: on a busy host one series in five may miss a
request that hangs among others."""
_LONG_DRAIN_MS = 50.0
"""Longest drain that the guest does not notice; its disk and devices stand still meanwhile."""
_DRAIN_SHARE = 0.05
"""Largest share of the time spent on such drains of a VM while nobody waits for a merge."""


@dataclass
class _PutOff:
    """A drain put off until `retry_at`. All times on CLOCK_MONOTONIC, seconds."""

    judged: Stuck | Doubtful | Slow
    reason: str
    look: Look
    """The look that found the trouble first."""
    since_s: float
    pause_s: float
    retry_at: float


class Storage:
    """The state of the storage of the VM behind `monitor`, whose drain guard it becomes.

    Raises VmError.
    """

    def __init__(self, monitor: Monitor) -> None:
        monitor.drain_guard = self
        self._monitor = monitor
        self._looking = threading.Lock()
        """A merge and a pause for memory ask on threads of their own."""
        self._earlier: Look | None = None
        self._put_off: _PutOff | None = None
        self._rests_until = 0.0
        self._disks: Disks | None = None
        """`None` until the VM's block devices are known."""
        self.find_disks()

    @property
    def away(self) -> str | None:
        """Why the VM could not be drained for a while, with the disk, in one line; or `None`."""
        put_off = self._put_off
        if put_off is None:
            return None
        least_s = _HANGS_S if isinstance(put_off.judged, Stuck) else _BUSY_S
        return put_off.reason if time.monotonic() - put_off.since_s >= least_s else None

    @property
    def is_put_off(self) -> bool:
        """Whether the VM should be left alone: `try_again` looks when that is due."""
        return self.away is not None or not self._is_due()

    @property
    def may_hang(self) -> bool:
        """Whether a drain was put off so lately that `away` does not tell yet."""
        return self._put_off is not None and self.away is None

    def _is_due(self) -> bool:
        put_off = self._put_off
        return put_off is None or time.monotonic() >= put_off.retry_at

    @property
    def rests(self) -> bool:
        """Whether the last drain took so long that the next one waits, unless it is awaited."""
        return time.monotonic() < self._rests_until

    def wait(self, most_s: float) -> bool:
        """Wait until a drain may be tried again; False if that takes longer than `most_s`."""
        if self.away is not None:
            return False
        if self._put_off is not None:
            left_s = self._put_off.retry_at - time.monotonic()
            if left_s > most_s:
                return False
            time.sleep(max(0.0, left_s))
        return True

    def drained(self, took_ms: float) -> None:
        """Note that a drain took so long."""
        if took_ms > _LONG_DRAIN_MS:
            self._rests_until = time.monotonic() + took_ms / 1000 / _DRAIN_SHARE

    def try_again(self) -> None:
        """Look again, if that is due, at storage that did not answer."""
        if self._put_off is not None and self._is_due():
            with suppress(VmError):  # the next caller that needs the VM finds the trouble again
                self.require_drainable()

    def find_disks(self) -> None:
        """Find out which block devices the VM has now. Raises VmError.

        Does nothing while a disk hangs: QEMU before 9.0 would wait for the stuck thread.
        """
        if self._put_off is None and not is_submitting(self._monitor.peer_pid):
            self._disks = find_disks(self._monitor)

    def require_drainable(self) -> None:
        """Raise DrainPostponedError if a drain would not end soon.

        Another VmError means that this cannot be found out.
        """
        with self._looking:
            if self._put_off is not None and not self._is_due():
                raise self._error(self._put_off.reason)
            if self._disks is None:
                self._look_until_clear(_UNKNOWN_DISKS)
                self._disks = find_disks(self._monitor)
            if self._disks.exist:
                self._look_until_clear(self._disks)
            self._put_off = None

    def _look_until_clear(self, disks: Disks) -> None:
        """Take as many looks as it needs; raise if requests do not end, or not soon."""
        first = look(self._monitor, disks, closely=False)
        self._require_moved(first)
        looks, judged = self._looks(disks, [first], closely=False)
        if judged != Ends(is_certain=True) and has_moved(looks[0], looks[-1]):
            # Not before: while nothing moves, the closer question may itself have to wait.
            looks, judged = self._look_closely(disks)
        assert not isinstance(judged, Unclear), "the last look decides"
        if not isinstance(judged, Ends):
            self._put_it_off(judged, looks)

    def _look_closely(self, disks: Disks) -> tuple[list[Look], Judgement]:
        """Several series of looks, for disks with some requests always in flight."""
        doubted = self._put_off is not None and isinstance(self._put_off.judged, Doubtful)
        looks, judged = self._looks(disks, [], closely=True)
        for _ in range(1, _GOOD_SERIES_AFTER_DOUBT if doubted else _GOOD_SERIES):
            if judged != Ends(is_certain=False):
                break
            looks, judged = self._looks(disks, [], closely=True)
        return looks, judged

    def _looks(
        self, disks: Disks, looks: list[Look], *, closely: bool
    ) -> tuple[list[Look], Judgement]:
        """Look, after the looks taken already, until they are conclusive or something moves."""
        looks = looks or [look(self._monitor, disks, closely=closely)]
        judged = judge(looks, is_last=False)
        for number, pause_s in enumerate(PAUSES_S, 1):
            moves = not closely and has_moved(looks[0], looks[-1])
            if moves or isinstance(judged, Ends):
                break
            time.sleep(pause_s)
            looks.append(look(self._monitor, disks, closely=closely))
            judged = judge(looks, is_last=number == len(PAUSES_S))
        return looks, judged

    def _require_moved(self, now: Look) -> None:
        """Raise at once if requests seen at an earlier look have not moved since."""
        put_off, earlier = self._put_off, self._earlier
        if put_off is not None and isinstance(put_off.judged, Stuck):
            place = put_off.judged.place
            before, there = put_off.look.places.get(place), now.places.get(place)
            if before and there and not before.ended_until(there):
                self._put_it_off(Stuck(place, there.count), [now])
        if earlier is not None and now.at_s - earlier.at_s < _LINGERS_S:
            return
        self._earlier = now
        for place, requests in now.places.items() if earlier is not None else ():
            assert earlier is not None
            before = earlier.places.get(place)
            lingering = requests.each & before.each if before is not None else frozenset()
            if lingering:
                self._earlier = earlier
                self._put_it_off(Stuck(place, len(lingering)), [earlier, now])

    def _put_it_off(self, judged: Stuck | Doubtful | Slow, looks: list[Look]) -> None:
        """Note it, and raise."""
        before = self._put_off
        first, since_s, pause_s = looks[0], looks[0].at_s, _FIRST_RETRY_S
        longest_s = _LAST_SLOW_RETRY_S if isinstance(judged, Slow) else _LAST_RETRY_S
        if before is not None and _goes_on(before.judged, judged):
            first, since_s = before.look, before.since_s
            pause_s = min(2 * before.pause_s, longest_s)
        retry_at = time.monotonic() + pause_s
        reason = _reason(judged, since_s)
        self._put_off = _PutOff(judged, reason, first, since_s, pause_s, retry_at)
        raise self._error(reason)

    def _error(self, reason: str) -> DrainPostponedError:
        return DrainPostponedError(self._monitor.vm, "drain", reason, pid=self._monitor.peer_pid)


def _goes_on(before: Stuck | Doubtful | Slow, now: Stuck | Doubtful | Slow) -> bool:
    """Whether it is the same trouble as before."""
    if isinstance(before, Stuck) or isinstance(now, Stuck):
        return type(before) is type(now) and before.place == now.place
    return True


def _reason(judged: Stuck | Doubtful | Slow, since_s: float) -> str:
    """The reason in one line: which disk, since when, what to do."""
    requests = "1 request" if judged.count == 1 else f"{judged.count} requests"
    what = f"{judged.place}: {requests} in flight"
    match judged:
        case Stuck():
            at = time.localtime(time.time() - time.monotonic() + since_s)
            verb = "does" if judged.count == 1 else "do"
            return (
                f"{what} {verb} not end since {time.strftime('%H:%M:%S', at)}, and a drain would"
                " freeze the VM; look at its storage, merging goes on when that answers"
            )
        case Doubtful():
            return (
                f"{what}, some at each look, and at times none ends: a drain might freeze the VM;"
                " merging goes on when its disk is less busy"
            )
        case Slow():
            return (
                f"{what} would take {judged.left_s:.0f} s to end, in which a drain freezes the"
                " VM; merging goes on when its disk is less busy"
            )
