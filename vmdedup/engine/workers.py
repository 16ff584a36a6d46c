"""The same work for several VMs, some of them at the same time.

Owns the threads. One VM's work is done on one thread from its beginning to its end, since
ptrace demands that of a session. Threads share only objects that are documented as shareable
(`Guardian`, `Publisher`, `MappedStores`). Promises that no work is under way any more when
`each` ends, for whatever reason.

Several threads pay off because Python's lock is mostly free: during system calls and batches
of them (`syscall_batch`), and during waits for QEMU's thread.
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
    """Threads for up to `most` VMs at a time, but no more than processors that we may use.

    `stop`, once set, ends merging after the current gate; see `remap.context.Host`.
    """

    def __init__(self, most: int, stop: threading.Event) -> None:
        self.most = min(most, len(os.sched_getaffinity(0)))
        """Most VMs that are worked on at the same time."""
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

        Items are done one by one on this thread until `is_foreground`, which is called before
        each item. As an item ends, `done` is called on this thread with its result, or with
        the VmError that it raised. Any other exception of either ends everything, after the
        work that has begun.
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
