"""The one background thread that runs all QMP connections.

Owns an asyncio event loop and its thread. qemu.qmp is asyncio; everything else
here is synchronous, and a monitor must answer while the caller is busy with a
guest. Promises that `call` returns or raises within its timeout, and that
leaving the context ends the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from vmdedup.closing import Closing
from vmdedup.errors import UsageError

T = TypeVar("T")

_GRACE_S = 2.0
"""Longer than a coroutine needs to unwind after its own timeout."""

_log = logging.getLogger(__name__)


def call(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Run `work` in `loop`, which runs in another thread, and wait for its result.

    Raises TimeoutError past `timeout_s`: the work was cancelled. ConnectionAbortedError
    if the loop is closed meanwhile. UsageError if called from the loop's own
    thread, which would wait for itself, or if the loop is already closed.
    """
    with contextlib.suppress(RuntimeError):
        if asyncio.get_running_loop() is loop:
            work.close()
            raise UsageError("a monitor was used from inside its own event loop")
    waited = asyncio.wait_for(work, timeout_s)
    try:
        future = asyncio.run_coroutine_threadsafe(waited, loop)
    except RuntimeError as error:
        waited.close()
        work.close()
        raise UsageError("the monitor's event loop is closed") from error
    try:
        return future.result(timeout_s + _GRACE_S)
    except (TimeoutError, FutureTimeoutError) as error:
        future.cancel()
        raise TimeoutError from error
    except CancelledError as error:
        work.close()  # it may never have begun
        raise ConnectionAbortedError("the monitor's event loop was closed") from error


class MonitorLoop(Closing):
    """Context manager: the thread and its loop, shared by any number of monitors."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_quietly)
        self._thread = threading.Thread(target=self._run, name="vmdedup-monitors", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        # What was handed over after the others were cancelled: its caller waits for it.
        self.loop.run_until_complete(_cancel_all())

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """`call` in this loop."""
        return call(self.loop, work, timeout_s)

    def close(self) -> None:
        """Cancel everything that still runs and end the thread. Idempotent."""
        if self.loop.is_closed():
            return
        with contextlib.suppress(TimeoutError, FutureTimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(_GRACE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_GRACE_S)
        if not self._thread.is_alive():
            self.loop.close()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _quietly(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Ignore a connection that broke while nobody waited: the next command finds it."""
    _log.debug("event loop: %s", context.get("message"))
