"""The daemon: the engine's process, from start to SIGTERM.

Owns the loop: take in the VMs that the scout found, serve the API's commands,
look at some pages, sleep, merge when a round is done, push what is known. One
thread does all of it, since ptrace wants one; the API server, the scout and the
guardian never wait for each other.

Promises: commands are answered between two slices of work; SIGTERM ends within
two seconds at a gate's end, keeping merges or unmerging as set; SIGHUP re-reads
the settings; a VM that ends or turns hazardous is dropped or unmerged and never
ends the daemon. Refuses a second instance on the same runtime directory.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from vmdedup.attach.discover import Attachment
from vmdedup.daemon.api_process import ApiServer
from vmdedup.daemon.commands import Commands, MergeJob
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.libvirt_events import DomainNews
from vmdedup.daemon.scouts import Scouts
from vmdedup.engine.fleet import LOCK_WAIT_S, Fleet
from vmdedup.engine.progress import PassOutcome
from vmdedup.engine.terms import Limits
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.history.place import HistoryPlan, default_directory
from vmdedup.ipc.channel import ChannelError
from vmdedup.ipc.protocol import ControlValues, EngineHealth, Histogram, Snapshot
from vmdedup.linux import malloc
from vmdedup.linux.meminfo import memory_bytes
from vmdedup.models import Model, SharingReport, VmList
from vmdedup.policy import advisor, pressure
from vmdedup.policy.controls import ONLY_UNSHARED, ControlFacts, Controls, change, initial
from vmdedup.settings import Settings

_IDLE_S = 0.5
"""Longest wait of the loop: how soon a VM that ended is noticed."""
_REEXAMINE_S = 10.0
"""How often every VM's devices and memory are looked at again."""
_WATCH_S = 0.5
"""How often a cheap look asks whether that should be at once."""
_UPKEEP_WAITS_S = 1.0
"""For how long both wait for a merge that is awaited, if it has no trouble."""
_REEXAMINE_CPU_SHARE = 0.01
"""Most of one CPU that goes into it; with many VMs it comes less often."""
_REEXAMINE_SHARE = 0.1
"""Most of the time, monitors that are slow to answer and a busy host included."""
_SETTLE_S = 0.5
"""How often it is asked whether an unmerge is to be tried again."""
_SWEEP_S = 5.0
"""How often store pages that nobody maps any more are looked for."""
_PUSH_S = 1.0
"""How often readers are told what rounds have changed, where nothing happened."""
_UPKEEP_CPU_SHARE = 0.005
"""Most of one CPU that goes into each of these; with many mappings they come less often."""
_JOB_PAGES = 1 << 18
"""Pages looked at in one slice while somebody waits for a merge."""

_FIXED = (
    "runtime_dir",
    "store_dir",
    "state_dir",
    "history_interval_s",
    "history_days",
    "api_group",
    "api_tcp_port",
    "libvirt",
)
"""Settings that a running daemon can not change."""

Reload = Callable[[], Settings]


class Daemon:
    """The service. `run` returns when SIGTERM or SIGINT came."""

    def __init__(self, settings: Settings, reload: Reload) -> None:
        self.settings = settings
        self.controls = _first_controls(settings)
        self.journal = Journal()
        self.jobs: list[MergeJob] = []
        self._reload = reload
        self._advice = advisor.start(self.controls)
        self._merging = True
        self._round_began = 0.0
        self._round_slept_s = 0.0
        self._round_cpu_s = 0.0
        self._round_pages = 0
        self._round_new_pages = 0
        self._next_slice_at = 0.0
        self._reexamine_at = time.monotonic() + _REEXAMINE_S
        self._watch_at = 0.0
        self._examined_at: dict[int, float] = {}
        """When each VM was last looked at again, by pid."""
        self._hindered: dict[str, str] = {}
        """Why VMs of these names waited at the last turn."""
        self._ended = False
        self._stop = threading.Event()
        self._wake_fd = -1
        self._reload_wanted = False
        self._dirty = True
        self._stale = False
        """Whether only rounds have changed what was pushed."""
        self._steered = False
        """Whether controls, or what the advisor makes of them, changed since the last push."""
        self._shown: tuple[SharingReport, VmList] | None = None
        """What was pushed last of the VMs."""
        self._push_at = 0.0
        self._sweep_at = self._settle_at = 0.0
        self._started_unix_s = time.time()
        self._last_pass_unix_s: float | None = None
        self._last_pass_ms: float | None = None
        self._gates = Histogram()
        self._drains = Histogram()
        self._booked: dict[int, tuple[int, int]] = {}
        """Gates and drains of each VM that are in the histograms already, by pid."""
        self._commands = Commands(self)

    def run(self) -> SharingReport:
        """Serve until a signal or `end`; the report of what is shared then.

        Raises VmdedupError when it can not start.
        """
        malloc.give_back()
        with ExitStack() as exits:
            wake = exits.enter_context(self._signals())
            self.fleet = Fleet(self.settings, merging=True, wait_s=LOCK_WAIT_S, stop=self._stop)
            exits.callback(self.fleet.close)
            self._apply_limits()
            if self.controls.run == 2:
                self.fleet.rest_all()
            self._server = exits.enter_context(
                ApiServer(
                    self.settings.runtime_dir,
                    group=self.settings.api_group,
                    tcp_port=self.settings.api_tcp_port,
                    history=_history_plan(self.settings),
                )
            )
            self.fleet.engine.served.hurries = self._is_awaited
            self.scout = exits.enter_context(Scouts(self.fleet.loop, self.settings, self._wake))
            self._domain_news = DomainNews(self.fleet, self.scout.libvirt, self.journal)
            self.journal.add("started", None, f"pid {os.getpid()}, API at {self._server.path}")
            malloc.settle()
            while not self._ended:
                self._turn(wake)
            if self.settings.unmerge_on_exit:
                for left in self.fleet.unmerge(None, lambda _: None).vms:
                    if left.remaining_pages:
                        self.journal.add("failed", left.name, left.reason or "")
            return self.fleet.report(converged=None)

    def end(self) -> None:
        """Have `run` return soon: after the gate at hand. From any thread or signal handler."""
        self._ended = True
        self._stop.set()
        self._wake()

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """SIGTERM, SIGINT and SIGHUP wake the loop; yields the descriptor to wait on."""
        read_fd, self._wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        handlers = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            yield read_fd
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            write_fd, self._wake_fd = self._wake_fd, -1
            os.close(read_fd)
            os.close(write_fd)

    def _wake(self) -> None:
        """End the loop's wait; from any thread, or a signal handler."""
        with suppress(BlockingIOError, OSError):
            os.write(self._wake_fd, b"x")

    def _heed_news(self) -> None:
        """Something about a VM changed: push it, and look for work at once."""
        self._dirty = True
        self.hurry()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload_wanted = True
        else:
            self.end()
            return
        self._wake()

    def _turn(self, wake: int) -> None:
        """One turn of the loop: wait, then do what there is to do, a slice of each."""
        self._wait(wake)
        if self._reload_wanted:
            with self._surviving():
                self._reread()
        self._take_in_found()
        with self._surviving():
            self._hear_of_domains()
        self._serve()
        self.fleet.drop_ended()
        with self._surviving():
            self._watch()
            self._reexamine()
        with self._surviving():
            self._settle()
        self._note_dropped()
        self._note_hindrances()
        self._slice()
        with self._surviving():
            self._sweep()
        aged = self._stale and not self.jobs and time.monotonic() >= self._push_at
        if self._dirty or aged or self._steered:
            with self._surviving():
                self._push(anew=self._dirty or aged)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """What fails in the block is an event, and tried again at its next turn."""
        try:
            yield
        except VmdedupError as error:
            self.journal.add("failed", None, str(error))

    def _settle(self) -> None:
        """Try again to unmerge what was to be unmerged and is not."""
        if time.monotonic() < self._settle_at:
            return
        self._settle_at = time.monotonic() + _SETTLE_S
        for tried in self.fleet.settle():
            if tried.restored_pages or not tried.remaining_pages:
                said = f"{tried.restored_pages} pages"
                self.journal.add("unmerged", tried.name, tried.reason or said)
            self._dirty = True

    def _may_wait(self, due_at: float) -> bool:
        """Whether what is due then need not be done yet.

        A merge that is awaited looks at each VM by itself, right before it merges there.
        """
        if time.monotonic() < due_at:
            return True
        is_awaited = bool(self.jobs) and time.monotonic() < due_at + _UPKEEP_WAITS_S
        return is_awaited and not any(tenant.record.trouble for tenant in self.fleet.engine.tenants)

    def _watch(self) -> None:
        """Examine at once the VMs of which a cheap look tells something new."""
        if self._may_wait(self._watch_at):
            return
        began, cpu_began = time.monotonic(), time.process_time()
        for name, reason in self.fleet.follow_changes(at_leisure=True):
            self.journal.add("changed", name, reason)
            self._heed_news()
        now, cpu_s = time.monotonic(), time.process_time() - cpu_began
        self._watch_at = now + max(
            _WATCH_S, (now - began) / _REEXAMINE_SHARE, cpu_s / _REEXAMINE_CPU_SHARE
        )

    def _reexamine(self) -> None:
        """Look at one VM's devices and memory again: the one that was not for longest."""
        tenants = self.fleet.reachable()
        if self._may_wait(self._reexamine_at) or not tenants:
            return
        began, cpu_began = time.monotonic(), time.process_time()
        tenant = min(tenants, key=lambda each: self._examined_at.get(each.pid, 0.0))
        reason = self.fleet.reexamine(tenant)
        if reason is not None:
            self.journal.add("changed", tenant.name, reason)
            self._heed_news()
        now = time.monotonic()
        pids = self.fleet.pids()
        self._examined_at[tenant.pid] = now
        self._examined_at = {pid: at for pid, at in self._examined_at.items() if pid in pids}
        cpu_s = time.process_time() - cpu_began
        self._reexamine_at = now + max(
            _REEXAMINE_S / max(1, len(pids)),
            (now - began) / _REEXAMINE_SHARE,
            cpu_s / _REEXAMINE_CPU_SHARE,
        )

    def _wait(self, wake: int) -> None:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.register(self._server.channel.fileno(), select.POLLIN)
        until_slice_s = self._next_slice_at - time.monotonic() if self._scans() else _IDLE_S
        poll.poll(max(0.0, min(_IDLE_S, until_slice_s)) * 1000)
        with suppress(BlockingIOError):
            os.read(wake, 4096)

    def _serve(self) -> None:
        try:
            for request in self._server.channel.poll():
                self._commands.serve(request)
        except ChannelError as error:
            # Whoever waited for a merge has lost the connection; its request means nothing now.
            self.jobs.clear()
            self.fleet.engine.hurry_ends()
            self._server.restart()
            self.journal.add("api-restarted", None, str(error))
            self.journal.rewind()
            self._dirty = True

    def _is_awaited(self) -> bool:
        """Whether a merge was asked for, or a request has come, which may ask for one."""
        return bool(self.jobs) or self._server.channel.is_ready()

    def reply(self, request_id: int, result: Model) -> None:
        """Answer a request with a model, or refuse it with a Refusal."""
        # A server that is gone is noticed, and started anew, by the next poll.
        with suppress(ChannelError):
            self._commands.answer(self._server.channel, request_id, result)

    def push(self) -> None:
        """Let readers see now what has changed."""
        self._push()

    def push_controls(self) -> None:
        """Let readers see now what has changed, where nothing may have but the controls."""
        self._push(anew=self._dirty)

    # --- VMs ----------------------------------------------------------------------

    def _hear_of_domains(self) -> None:
        """Act on what libvirt has told since."""
        if self._domain_news.take():
            self._heed_news()
        self._domain_news.warn()

    def _take_in_found(self) -> None:
        while not self.scout.results.empty():
            found = self.scout.results.get()
            if isinstance(found, Attachment):
                self._take_in(found)
            elif self.fleet.note_unreachable(found):
                self.journal.add("unreachable", found.name, found.reason)
                self._dirty = True
        self.scout.attached(self.fleet.keys())

    def _take_in(self, found: Attachment) -> None:
        pid, path = found.identity.pid, found.identity.socket_path
        if pid in self.fleet.pids():
            found.close()
        else:
            before = self.fleet.roster.reason_of(pid)
            try:
                row = self.fleet.take_in(found)
            except VmdedupError as error:
                # No VM's fault (its store can not be opened): it is tried again later.
                self.journal.add("failed", found.identity.name, str(error))
                found.close()
                self.scout.refused(pid, path)
                self.scout.taken(pid)
                return
            if row.mergeable:
                self.journal.add("attached", row.name, row.reason or "")
                self.hurry()
            else:
                self.scout.refused(pid, path)
                if row.reason != before:
                    self.journal.add("refused", row.name, row.reason or "")
            self._dirty = True
        self.scout.taken(pid)

    def hurry(self) -> None:
        """A VM has come: look at it at once, and as fast as the CPU limit allows."""
        self._advice = advisor.hurry(self._advice, self.controls)
        self._steered = True
        self._next_slice_at = 0.0

    def _note_dropped(self) -> None:
        for absent in self.fleet.dropped:
            self.journal.add("dropped", absent.name, absent.reason)
            self._dirty = True
        self.fleet.dropped.clear()
        if self.fleet.forget_ended():
            self._dirty = True
            self._sweep_at = 0.0
        self.scout.attached(self.fleet.keys())

    def _note_hindrances(self) -> None:
        """Tell of VMs whose storage or monitor does not answer, and of those that do again."""
        hindered = self.fleet.hindrances()
        for name in self._hindered.keys() - hindered.keys():
            self.journal.add("goes-on", name, "its storage and its monitor answer again")
        for name in hindered.keys() - self._hindered.keys():
            self.journal.add("waits", name, hindered[name])
        self._dirty = self._dirty or hindered.keys() != self._hindered.keys()
        self._hindered = hindered

    # --- scanning -----------------------------------------------------------------

    def _scans(self) -> bool:
        wanted = self._merging or any(job.begun for job in self.jobs)
        return self.controls.run == 1 and wanted and bool(self.fleet.pids())

    def _slice(self) -> None:
        """Look at some pages, or merge when a round is done."""
        self._begin_jobs()
        self._heed_pressure()
        if not self._scans() or time.monotonic() < self._next_slice_at:
            self._end_jobs_in_time()
            return
        try:
            self._scan()
        except VmdedupError as error:
            self.journal.add("failed", None, str(error))
            self._next_slice_at = time.monotonic() + 1.0
            self._dirty = True
        self._end_jobs_in_time()

    def _heed_pressure(self) -> None:
        """Decide whether merging is wanted at the memory that is available now."""
        threshold_percent = self.controls.pressure_threshold_percent
        if self._merging and not threshold_percent:
            return
        available_bytes, total_bytes = memory_bytes()
        wanted = pressure.decide(
            self._merging,
            available_bytes,
            total_bytes,
            threshold_percent,
            self.controls.pressure_hysteresis_percent,
        )
        if wanted != self._merging:
            self._merging = wanted
            verb = "merging goes on" if wanted else "merging pauses"
            percent = 100 * available_bytes / total_bytes
            self.journal.add("pressure", None, f"{percent:.1f}% of memory is available: {verb}")
            self._dirty = True

    def _scan(self) -> None:
        engine = self.fleet.engine
        cpu_before = time.process_time()
        if self.jobs:
            malloc.keep()
        if not engine.rounds.is_begun:
            self._round_began = time.monotonic()
            self._round_slept_s = self._round_cpu_s = 0.0
            self._round_pages = 0
            self._round_new_pages = engine.rounds.unknown_pages()
            engine.begin_round(everywhere=bool(self.jobs))
        pages = _JOB_PAGES if self.jobs else self._advice.pages_to_scan
        self._round_pages += engine.rounds.look_some(pages)
        pause_s = self.controls.sleep_millisecs / 1000
        still_s = self._until_second_look_s() if engine.rounds.compares_next else 0.0
        if engine.rounds.is_done and not still_s:
            outcome = engine.finish_round()
            self._round_cpu_s += time.process_time() - cpu_before
            pause_s = self._round_ended(outcome)
        else:
            self._round_cpu_s += time.process_time() - cpu_before
            self._round_slept_s += pause_s
        if self.jobs:
            pause_s = still_s if engine.rounds.is_done else 0.0
            if not engine.rounds.is_begun:
                pause_s = self._until_second_look_s()
        self._next_slice_at = time.monotonic() + pause_s

    def _until_second_look_s(self) -> float:
        """For how long a page must still hold still: the round has taken some of that time."""
        since_first_s = time.monotonic() - self._round_began
        return max(0.0, self.settings.first_look_ms / 1000 - since_first_s)

    def _round_ended(self, outcome: PassOutcome) -> float:
        """Book a finished round; returns how long to rest."""
        engine = self.fleet.engine
        scan = advisor.Scan(
            pages_scanned=self._round_pages,
            covered_pages=engine.rounds.covered_pages(),
            new_pages=self._round_new_pages,
            scan_s=time.monotonic() - self._round_began,
            slept_s=self._round_slept_s,
            cpu_s=self._round_cpu_s,
        )
        self._advice = advisor.advise(self._advice, scan, self.controls)
        self._last_pass_ms = scan.scan_s * 1000
        self._last_pass_unix_s = time.time()
        self._stale = True
        for job in filter(lambda job: job.begun, self.jobs):
            job.convergence.add(engine.standing_pages(), troubled=outcome.troubled)
        # A VM not looked at twice yet has merged nothing: look again soon.
        return 0.1 if self._round_new_pages else self._advice.rest_s

    def _sweep(self) -> None:
        """Give back unused store pages and our own: not while somebody waits, at a bounded cost."""
        began = time.process_time()
        if self.jobs or time.monotonic() < self._sweep_at:
            return
        self.fleet.engine.keep_headroom()
        self.fleet.engine.sweep()
        malloc.give_back()
        cpu_s = time.process_time() - began
        self._sweep_at = time.monotonic() + max(_SWEEP_S, cpu_s / _UPKEEP_CPU_SHARE)

    def _begin_jobs(self) -> None:
        """Begin the merges that waited for the scout to have looked for new VMs."""
        for job in list(self.jobs):
            if not job.begun and self.scout.has_looked(job.look):
                refusal = self._commands.begin(job)
                if refusal is not None:
                    self.jobs.remove(job)
                    self.reply(job.request_id, refusal)
                else:
                    self.hurry()

    def _end_jobs_in_time(self) -> None:
        for job in list(self.jobs):
            over = time.monotonic() >= job.deadline or self.controls.run != 1
            if job.begun and (
                job.convergence.reached or over or job.pids.isdisjoint(self.fleet.pids())
            ):
                self.jobs.remove(job)
                report = self._commands.merge_report(job)
                with self._surviving():
                    self._push()
                self.reply(job.request_id, report)
                if not self.jobs:
                    self.fleet.engine.hurry_ends()
                    malloc.give_back()

    # --- controls and state -------------------------------------------------------

    def use_controls(self, controls: Controls) -> None:
        """Make changed controls take effect."""
        self.controls = controls
        self._advice = advisor.readvise(self._advice, controls)
        self._next_slice_at = 0.0
        self._apply_limits()
        self._steered = True

    def _apply_limits(self) -> None:
        c = self.controls
        self.fleet.use(
            self.settings.model_copy(
                update={
                    "use_zero_pages": bool(c.use_zero_pages),
                    "vma_budget": c.vma_budget or None,
                    "gate_deadline_ms": c.gate_deadline_ms,
                }
            )
        )
        self.fleet.engine.limit(
            Limits(
                max_kernel_pages=c.max_kernel_pages or None,
                max_page_sharing=c.max_page_sharing,
                smart_scan=bool(c.smart_scan),
                merge_across_nodes=bool(c.merge_across_nodes),
            )
        )

    def _reread(self) -> None:
        """SIGHUP: take over the settings that can change while running."""
        self._reload_wanted = False
        self._dirty = True
        try:
            settings = self._reload()
            fixed = [
                name for name in _FIXED if getattr(settings, name) != getattr(self.settings, name)
            ]
            if fixed:
                raise UsageError(f"{', '.join(fixed)}: changes only with a new start")
            controls = self._reread_controls(settings)
        except VmdedupError as error:
            self.journal.add("reload-refused", None, f"nothing was changed: {error}")
            return
        self.settings = settings
        self.scout.follow(settings.qmp)
        self.journal.add("reloaded", None, "")
        with self._surviving():
            self.change_controls(controls)
        for name in self.fleet.follow_domains():
            self.journal.add("changed", name, "its trust domain changed")

    def _reread_controls(self, settings: Settings) -> Controls:
        """The controls with what the settings name; others stay as they were set by hand."""
        new, old = _named_controls(settings), _named_controls(self.settings)
        wanted = {name: value for name, value in new.items() if name in settings.controls}
        wanted |= {name: value for name, value in new.items() if value != old.get(name)}
        pages_to_scan = wanted.pop("pages_to_scan", self.controls.pages_to_scan)
        changed = change(self.controls, wanted, self.control_facts(wanted))
        return initial({**changed.model_dump(), "pages_to_scan": pages_to_scan})

    def control_facts(self, requested: Iterable[str]) -> ControlFacts:
        """What the rules of these controls ask about the present state."""
        if not set(ONLY_UNSHARED) & set(requested):
            return ControlFacts(pages_shared=0)  # nobody asks, and to count takes a while
        return ControlFacts(pages_shared=self.fleet.report(converged=None).host.pages_shared)

    def change_controls(self, controls: Controls) -> None:
        """Make changed controls take effect, also what `run` 2 means.

        Raises UnfinishedError when that left pages merged; they are tried again by `_settle`.
        """
        before = self.controls
        self.use_controls(controls)
        try:
            if controls.run == 2 and (before.run != 2 or self.fleet.left_to_unmerge_pages):
                malloc.keep()
                self.fleet.rest_all()
                self._commands.unmerge(None)
        finally:
            if controls.run != 1:
                self._dirty = True
                self.fleet.stop_tracking()
                malloc.give_back()
        if controls.run == 1 and before.run != 1:
            self.fleet.wake_all()
            self.hurry()

    def control_values(self) -> ControlValues:
        """Every control as it is; pages_to_scan as the advisor has it."""
        values = self.controls.model_dump()
        if self.controls.advisor_mode != "none":
            values["pages_to_scan"] = self._advice.pages_to_scan
        return ControlValues(values=values)

    def _push(self, *, anew: bool = True) -> None:
        """Push the state to the server; unless `anew`, the VMs' as it was pushed last."""
        began = time.process_time()
        self._steered = False
        if anew:
            self._dirty = self._stale = False
            self._book_durations()
            self._shown = self.fleet.report(converged=None, refresh=False), self.fleet.listed()
        assert self._shown is not None
        report, vms = self._shown
        snapshot = Snapshot(
            unix_s=time.time(),
            report=report,
            vms=vms,
            controls=self.control_values(),
            health=EngineHealth(
                engine_pid=os.getpid(),
                guardian_pid=self.fleet.guardian_pid,
                started_unix_s=self._started_unix_s,
                cpu_s=time.process_time(),
                passes=self.fleet.engine.full_scans,
                last_pass_unix_s=self._last_pass_unix_s,
                last_pass_ms=self._last_pass_ms,
                libvirt=self._domain_news.health(),
            ),
            events=tuple(self.journal.take()),
            gates=self._gates,
            drains=self._drains,
        )
        try:
            self._server.channel.push(snapshot)
        except ChannelError:
            self._dirty = True
        if anew:
            cpu_s = time.process_time() - began
            self._push_at = time.monotonic() + max(_PUSH_S, cpu_s / _UPKEEP_CPU_SHARE)

    def _book_durations(self) -> None:
        """Add the gates and drains since the last push to the histograms."""
        booked, self._booked = self._booked, {}
        for tenant in self.fleet.engine.tenants:
            totals = tenant.totals
            gates, drains = booked.get(tenant.pid, (0, 0))
            self._gates = self._gates.plus(_last(totals.gate_ms, totals.gates - gates))
            self._drains = self._drains.plus(_last(totals.drain_ms, totals.drains - drains))
            self._booked[tenant.pid] = totals.gates, totals.drains


def _history_plan(settings: Settings) -> HistoryPlan:
    directory = settings.state_dir or default_directory()
    return HistoryPlan(directory, settings.history_interval_s, settings.history_days)


def _named_controls(settings: Settings) -> dict[str, str | int]:
    """The controls that the settings name, also by settings of the same meaning."""
    return {
        "use_zero_pages": int(settings.use_zero_pages),
        "vma_budget": settings.vma_budget or 0,
        "gate_deadline_ms": settings.gate_deadline_ms,
        **settings.controls,
    }


def _first_controls(settings: Settings) -> Controls:
    return initial(_named_controls(settings))


def _last(values: deque[float], count: int) -> list[float]:
    return list(values)[-count:] if count > 0 else []
