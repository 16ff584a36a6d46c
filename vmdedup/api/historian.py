"""The API server's side of the history: periodic samples, and reads of them.

Owns the thread that touches the disk. Promises that neither the engine nor any
other request waits for the disk: a read that the disk delays is refused as `busy`.
While a write hangs, no samples are taken. Reports on stderr, once, that the history
cannot be written, and again when it can.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from vmdedup.api.engine_link import EngineLink, RefusedByEngineError
from vmdedup.history.keeper import Keeper
from vmdedup.history.place import HistoryPlan
from vmdedup.history.series import sample_of, vm_samples_of
from vmdedup.ipc.protocol import HistoryHealth, Refusal
from vmdedup.models import History

_READ_LIMIT_S = 10.0
_RETRY_S = 1.0

_Result = TypeVar("_Result")


class Historian:
    """Notes the engine's snapshots. Without a plan there is no history."""

    def __init__(self, link: EngineLink, plan: HistoryPlan | None) -> None:
        self._link = link
        self._plan = plan
        self._keeper = Keeper(plan) if plan is not None else None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="history")
        self._said: tuple[str | None, str | None] = (None, None)

    async def run(self) -> None:
        """Note a sample now and after every interval, until the engine has ended."""
        if self._plan is None or self._keeper is None:
            return
        while True:
            try:
                snapshot = await self._link.snapshot()
            except RefusedByEngineError as refused:
                if refused.refusal.kind == "gone":
                    return
                await asyncio.sleep(_RETRY_S)
                continue
            gates = None if snapshot.gates is None else sum(snapshot.gates.counts)
            now = time.time()
            sample = sample_of(snapshot.report, gates, now)
            vms = vm_samples_of(snapshot.report, now)
            await self._on_disk(self._keeper.note, sample, vms)
            self._say()
            await asyncio.sleep(self._plan.interval_s)

    async def read(self, since_s: int, max_points: int, vm: str | None) -> History:
        """The samples of the last `since_s` seconds, of all VMs together or of one.

        Raises RefusedByEngineError.
        """
        if self._keeper is None:
            return History(samples=[], interval_s=0, vm=vm)
        now = time.time()
        try:
            async with asyncio.timeout(_READ_LIMIT_S):
                return await self._on_disk(self._keeper.read, now - since_s, now, max_points, vm)
        except TimeoutError:
            message = f"the history's disk did not answer within {_READ_LIMIT_S:.0f} s: try again"
            raise RefusedByEngineError(Refusal(kind="busy", message=message)) from None

    def health(self) -> HistoryHealth | None:
        """How the history is kept; `None` without a plan."""
        if self._plan is None or self._keeper is None:
            return None
        return HistoryHealth(
            directory=str(self._plan.directory) if self._plan.days else None,
            problem=self._keeper.problem,
            unsaved_samples=self._keeper.unsaved,
            moved_aside=self._keeper.moved_aside,
        )

    async def close(self) -> None:
        """Close the file, after the work under way."""
        if self._keeper is not None:
            await self._on_disk(self._keeper.close)

    async def _on_disk(self, do: Callable[..., _Result], *arguments: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk, do, *arguments)

    def _say(self) -> None:
        """Print the changes of the file's state since the last report."""
        assert self._keeper is not None
        problem, moved_aside = self._keeper.problem, self._keeper.moved_aside
        was_problem, was_moved = self._said
        lines = []
        if moved_aside != was_moved:
            lines.append(moved_aside)
        if problem is not None and was_problem is None:
            lines.append(f"{problem} (kept in memory until it can be written)")
        elif problem is None and was_problem is not None:
            lines.append("it is written again")
        self._said = problem, moved_aside
        for line in lines:
            with suppress(OSError):
                print(f"vmdedup: history: {line}", file=sys.stderr, flush=True)
