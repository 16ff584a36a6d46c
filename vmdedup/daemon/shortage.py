"""The watch over the memory that is there, and the steps while it is short.

Owns the thread that looks, and acts by itself: the daemon's loop may be in a long merge. It
looks the sooner, the less is there above the reserve (`core.shortage`). Promises that each
step becomes an event, that no step holds up the looks but pausing, and that on `close` all VMs
run. The loop tells it which VMs there are, takes the news, and pages out when that is wanted.

It cannot act on what falls faster than `FASTEST_BYTES_PER_S`, nor while it gets no processor,
nor for a VM whose monitor does not answer.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from vmdedup.accounting.memory_places import Place, memory_now, places_of, reserve_of
from vmdedup.closing import Closing
from vmdedup.controls import Controls
from vmdedup.core import shortage
from vmdedup.core.forecast import BreakRates
from vmdedup.core.shortage import LEAST_INTERVAL_S, MOST_INTERVAL_S, PAUSE, Level
from vmdedup.core.trailing import Trailing
from vmdedup.daemon.memory_hook import MemoryHook
from vmdedup.daemon.vm_pauses import Pausable, VmPauses, pausable
from vmdedup.errors import DrainPostponedError, VmError
from vmdedup.linux.process import anonymous_bytes
from vmdedup.models import SCHEMA_VERSION
from vmdedup.remap.context import Host
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import AttachedVm

_GROWTH_S = 0.5
"""Time over which it is counted how much memory each VM takes, seconds."""
_RESUME_S = 1.0
"""Least time between two resumes, so that the effect of one shows; seconds."""
_PAUSED_INTERVAL_S = 0.1
"""Longest time between two looks while a VM is paused, seconds: the guardian wants to see us."""
_CHECK_S = 0.25
"""Time between two looks whether somebody else has resumed a paused VM, seconds."""
_FIND_S = 1.0
"""Least time until the limits of cgroups are looked for again, seconds."""
_FIND_SHARE = 0.005
"""Most of the time that is spent on that; with many VMs it comes less often."""
_AFTER_FAILURE_S = 0.5
"""Time until the look after one that failed, seconds: the guardian must still see us."""
_SAYING_INTERVAL_S = 0.25
"""Least time between two looks if this thread would do nothing but say it, seconds."""


@dataclass(frozen=True)
class ShortageNews:
    """Something that the daemon's loop makes an event of."""

    kind: str
    vm: str | None
    message: str


@dataclass
class _Watched:
    """One place from look to look."""

    place: Place
    short: bool = False
    there_bytes: int | None = None
    looked_at: float = 0.0
    """Time of the last look (time.monotonic)."""


@dataclass(frozen=True)
class _Known:
    """What the loop has told last."""

    places: Sequence[Place] = ()
    """The host first; it has all VMs that may need memory."""
    vms: dict[int, Pausable] = field(default_factory=dict)


class ShortageWatch(Closing):
    """Watches from its start to `close`. `wake` wakes the daemon's loop."""

    def __init__(self, host: Host, settings: Settings, wake: Callable[[], None]) -> None:
        self._settings = settings
        self._wake_loop = wake
        self._known = _Known()
        self._watched: dict[str, _Watched] = {}
        self._pauses = VmPauses(host.runtime, host.guardian)
        self.paused: frozenset[int] = frozenset()
        """Processes of the VMs that are paused now."""
        self.wants_page_out = False
        """Whether the loop should page cold memory out now."""
        self._left_alone: set[int] = set()
        """VMs that a user has resumed while memory was short."""
        self._grown: dict[int, Trailing] = {}
        """Anonymous memory of each VM, while memory is about to be short."""
        self._resumed_at = 0.0
        self._news: deque[ShortageNews] = deque()
        self._hook = MemoryHook(lambda message: self._tell("hook", message))
        self._checked_at = 0.0
        self._found: _Known | None = None
        """What the present places were found by."""
        self._find_at = 0.0
        self._changed = threading.Event()
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="vmdedup-shortage", daemon=True)
        self._thread.start()

    # --- for the daemon's loop --------------------------------------------------------

    def follow(self, places: Sequence[Place], vms: Iterable[AttachedVm]) -> None:
        """Take over where VMs may need memory now, and which of them may be paused."""
        found = [each for vm in vms if (each := pausable(vm)) is not None]
        self._known = _Known(places, {vm.pid: vm for vm in found})

    def use(self, settings: Settings) -> None:
        """Follow changed settings and controls from the next look, which is soon."""
        self._settings = settings
        self._changed.set()

    def take_news(self) -> list[ShortageNews]:
        """The news since the last call."""
        taken = []
        while self._news:
            taken.append(self._news.popleft())
        return taken

    def close(self) -> None:
        """Resume all VMs, kill the program if it runs, and end. Idempotent."""
        self._ends = True
        self._changed.set()
        self._thread.join()
        self._hook.close()

    # --- on the thread ----------------------------------------------------------------

    def _work(self) -> None:
        interval_s = MOST_INTERVAL_S
        try:
            while not self._ends:
                self._changed.wait(interval_s)
                self._changed.clear()
                try:
                    interval_s = self._look()
                except Exception as error:  # no thread or process, as memory is short: go on
                    interval_s = _AFTER_FAILURE_S
                    self._tell("failed", f"the watch over memory: {error!r}; it is tried again")
        finally:
            self._pauses.close()
            self.paused = frozenset()

    def _look(self) -> float:
        """Look at all places once, and do what is due; returns the time until the next look."""
        known, controls = self._known, self._settings.controls
        self._find_places(known)
        levels: list[tuple[_Watched, Level]] = []
        for watched in self._watched.values():
            with suppress(OSError, ValueError):  # the cgroup is gone
                levels.append((watched, self._level(watched, controls)))
        for watched, level in levels:
            self._judge(watched, level, controls)
        self._ask_for_page_out(controls)
        self._note_growth(known, is_near=any(_is_near(level) for _, level in levels))
        self._let_go(known, controls)
        if controls.shortage_pause:
            for watched, level in levels:
                if level.asks_for(PAUSE):
                    self._pause_one(watched.place, known)
        self._resume_one()
        most_s = _PAUSED_INTERVAL_S if self._pauses.vms else MOST_INTERVAL_S
        least_s = LEAST_INTERVAL_S
        if not (controls.shortage_pause or controls.shortage_hook):
            least_s = _SAYING_INTERVAL_S
        elif self._pauses.vms and not known.vms.keys() - self._pauses.vms.keys():
            least_s = most_s  # none is left that could take memory
        wanted_s = min((level.interval_s for _, level in levels), default=MOST_INTERVAL_S)
        return max(least_s, min(wanted_s, most_s))

    def _find_places(self, known: _Known) -> None:
        """Note where memory may be needed: from news, or by a look, as limits may change."""
        began_s = time.monotonic()
        if known is not self._found:
            found = known.places
        elif began_s < self._find_at:
            return
        else:
            found = places_of(known.places[0].vms) if known.places else ()
        self._found, before = known, self._watched
        self._watched = {}
        for place in found:
            watched = self._watched[place.name] = before.get(place.name, _Watched(place))
            watched.place = place
        now_s = time.monotonic()
        self._find_at = now_s + max(_FIND_S, (now_s - began_s) / _FIND_SHARE)

    def _level(self, watched: _Watched, controls: Controls) -> Level:
        """Read what is there. Raises OSError or ValueError."""
        room, now_s = watched.place.room(), time.monotonic()
        forecast = watched.place.forecast(room)
        there_bytes = forecast.there_bytes
        fall = 0.0
        if watched.there_bytes is not None:
            fall = (watched.there_bytes - there_bytes) / max(1e-3, now_s - watched.looked_at)
        watched.there_bytes, watched.looked_at = there_bytes, now_s
        return Level(forecast, reserve_of(room, controls), fall)

    def _judge(self, watched: _Watched, level: Level, controls: Controls) -> None:
        """Say and pass on that memory became short, or suffices again."""
        was_short, watched.short = watched.short, level.is_short(before=watched.short)
        if watched.short == was_short:
            return
        kind = "memory-short" if watched.short else "memory-enough"
        if controls.shortage_say:
            self._tell(kind, _said(watched, level))
        if controls.shortage_hook and self._settings.memory_hook:
            told = memory_now([watched.place], BreakRates(), controls, self.paused)
            document = {
                "schema_version": SCHEMA_VERSION,
                "event": kind,
                "memory": [each.model_dump(mode="json") for each in told],
            }
            timeout_s = self._settings.memory_hook_timeout_s
            self._hook.run(
                self._settings.memory_hook, timeout_s, watched.place.name, json.dumps(document)
            )

    def _ask_for_page_out(self, controls: Controls) -> None:
        """Have the loop page out while the host is short.

        The swap of a cgroup counts as memory that is there, so paging out changes nothing of it.
        """
        is_short = any(each.short and each.place.group is None for each in self._watched.values())
        wanted = bool(controls.shortage_page_out) and is_short
        begins = wanted and not self.wants_page_out
        self.wants_page_out = wanted
        if begins:
            self._wake_loop()

    def _note_growth(self, known: _Known, *, is_near: bool) -> None:
        """Note how much memory each VM has, while memory is about to be short."""
        if not is_near:
            self._grown.clear()
            return
        now_s = time.monotonic()
        self._grown = {pid: self._grown.get(pid, Trailing(_GROWTH_S)) for pid in known.vms}
        for pid, seen in self._grown.items():
            with suppress(OSError):  # it has ended
                seen.note(now_s, anonymous_bytes(pid))

    def _pause_one(self, place: Place, known: _Known) -> None:
        """Pause the VM of this place whose turn it is, if any takes memory."""
        growth = {pid: seen.change for pid, seen in self._grown.items()}
        busy = self._pauses.vms.keys() | self._left_alone
        candidates = [vm.pid for vm in place.vms if vm.pid in known.vms and vm.pid not in busy]
        while (pid := shortage.to_pause(candidates, growth, _priorities(known.vms))) is not None:
            vm = known.vms[pid]
            try:
                paused = self._pauses.pause(vm)
            except DrainPostponedError:
                paused = False  # its disk is busy: asked again at the next look
            except (VmError, OSError) as error:
                paused = False
                self._tell_of(vm, "failed", f"it could not be paused for lack of memory: {error}")
                self._left_alone.add(pid)
            if paused:
                self._tell_of(vm, "paused", f"until there is memory in {place.name}")
                return
            candidates.remove(pid)

    def _let_go(self, known: _Known, controls: Controls) -> None:
        """Forget pauses that others have ended, and end those that are not wanted any more."""
        self._pauses.beat()
        if self._pauses.vms and time.monotonic() - self._checked_at >= _CHECK_S:
            self._checked_at = time.monotonic()
            for vm in self._pauses.taken_over():
                self._left_alone.add(vm.pid)
                self._tell_of(vm, "resumed", "by somebody else, or it has ended")
            for pid in self._pauses.migrating():
                self._left_alone.add(pid)
                self._resume(pid, "it is being migrated, and would stay paused on the other host")
        for pid in self._pauses.vms:
            if pid not in known.vms or not controls.shortage_pause:
                self._resume(pid, "it is not to be paused any more")
        if not any(watched.short for watched in self._watched.values()):
            self._left_alone.clear()

    def _resume_one(self) -> None:
        """Resume the VM whose turn it is, if memory suffices in all its places."""
        if not self._pauses.vms or time.monotonic() - self._resumed_at < _RESUME_S:
            return
        short = {
            vm.pid
            for watched in self._watched.values()
            if watched.short
            for vm in watched.place.vms
        }
        pid = shortage.to_resume(
            [pid for pid in self._pauses.vms if pid not in short], _priorities(self._pauses.vms)
        )
        if pid is not None:
            self._resumed_at = time.monotonic()
            self._grown.pop(pid, None)
            self._resume(pid, "there is memory again")

    def _resume(self, pid: int, why: str) -> None:
        vm = self._pauses.vms[pid]
        try:
            if not self._pauses.resume(pid):
                return  # tried again later
        except VmError as error:
            why = f"{why}; it stays paused until its monitor answers ({error.reason})"
        self._tell_of(vm, "resumed", why)

    def _tell_of(self, vm: Pausable, kind: str, message: str) -> None:
        self.paused = frozenset(self._pauses.vms)
        self._tell(kind, message, vm.name)

    def _tell(self, kind: str, message: str, vm: str | None = None) -> None:
        """Make it news. From any thread."""
        self._news.append(ShortageNews(kind, vm, message))
        self._wake_loop()


def _priorities(vms: dict[int, Pausable]) -> dict[int, int]:
    return {pid: vm.priority for pid, vm in vms.items()}


def _is_near(level: Level) -> bool:
    """Whether memory may be short soon."""
    return level.soon_bytes < 2 * level.wanted_bytes


def _said(watched: _Watched, level: Level) -> str:
    forecast = level.forecast
    mib = [
        amount >> 20
        for amount in (forecast.there_bytes, level.reserve_bytes, forecast.needed_bytes)
    ]
    return (
        f"{watched.place.name}: {mib[0]} MiB are there, the reserve is {mib[1]} MiB,"
        f" {mib[2]} MiB are needed if all is written"
    )
