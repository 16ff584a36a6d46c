"""The same work for several VMs, some of them at a time.

Owns the threads. One VM's work is done on one thread from its beginning to its end, since
ptrace demands that of a session; threads share nothing but what says that it may be shared
(`Guardian`, `Publisher`, `MappedStores`). Promises that no work is under way any more when
`each` is left, however that is.

More than one thread pays because most of the time goes into system calls and into tables
of them (`syscall_batch`), during which Python's lock is free, and into waiting for QEMU's thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

from vmdedup.errors import VmError
from vmdedup.linux.realtime import company

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers:
    """Threads for up to `most` VMs at a time, no more than there are processors for us.

    `stop`, when set, has merging end after the gate at hand; see `sessions.Host`.
    """

    def __init__(self, most: int, stop: threading.Event) -> None:
        self.most = min(most, len(os.sched_getaffinity(0)))
        """At a time."""
        self._stop = stop

    def each(
        self,
        items: Sequence[_Item],
        work: Callable[[_Item], _Result],
        done: Callable[[_Item, _Result | VmError], None],
        *,
        is_foreground: Callable[[], bool] = lambda: True,
    ) -> None:
        """Do `work` for each item, begun in their order.

        One by one on this thread until it `is_foreground`, which is asked before each.
        `done` is told on this thread what each gave, or the VmError that it raised, as they
        end. What else is raised, by either, ends everything; what was begun ends first.
        """
        left = deque(items)
        while left and (self.most == 1 or len(left) == 1 or not is_foreground()):
            item = left.popleft()
            done(item, _outcome(work, item))
        if not left:
            return
        count = min(self.most, len(left))
        with ThreadPoolExecutor(count, thread_name_prefix="vmdedup-worker") as pool:
            futures = {pool.submit(_in_company, work, item): item for item in left}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    with self._ending_soon():
                        pool.shutdown()
                raise

    @contextmanager
    def _ending_soon(self) -> Iterator[None]:
        self._stop.set()
        try:
            yield
        finally:
            self._stop.clear()


def _in_company(work: Callable[[_Item], _Result], item: _Item) -> _Result | VmError:
    with company.joined():
        return _outcome(work, item)


def _outcome(work: Callable[[_Item], _Result], item: _Item) -> _Result | VmError:
    try:
        return work(item)
    except VmError as error:
        return error
