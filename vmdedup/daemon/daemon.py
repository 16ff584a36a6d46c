"""The daemon: the engine's process, from start to SIGTERM.

Owns the loop and the order of one turn of it; each part has a module of its own:

    signals       SIGTERM, SIGHUP, waking      membership    VMs that come and go
    scan_loop     slices of a pass             commands      requests of the API
    pace          controls, advice, sleep      merge_jobs    merges that a client waits for
    steering      `set`, changed settings      upkeep        looks, unmerges, sweeps, cold pages
    snapshot      pushes to the API server     scouts        finding VMs, in threads
    shortage      the watch over memory, in a thread
    content_looks looks at all contents that a client waits for

One thread does all else, since ptrace wants one; the API server, the scouts and the
guardian never wait for each other.

Promises: commands are answered between two slices of work; SIGTERM ends within
two seconds at a gate's end, keeping merges or unmerging as set; SIGHUP re-reads
the settings; a VM that ends or turns hazardous is dropped or unmerged and never
ends the daemon. Refuses a second instance on the same runtime directory.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from vmdedup.daemon.api_process import ApiServer, TlsListener
from vmdedup.daemon.commands import Commands
from vmdedup.daemon.content_looks import ContentLooks
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.libvirt_events import DomainNews
from vmdedup.daemon.membership import Membership
from vmdedup.daemon.merge_jobs import MergeJobs
from vmdedup.daemon.pace import Pace
from vmdedup.daemon.scan_loop import ScanLoop
from vmdedup.daemon.scouts import Scouts
from vmdedup.daemon.shortage import ShortageWatch
from vmdedup.daemon.signals import Signals
from vmdedup.daemon.snapshot import SnapshotFeed
from vmdedup.daemon.steering import Reload, Steering, apply_controls
from vmdedup.daemon.upkeep import Upkeep
from vmdedup.engine.fleet import LOCK_WAIT_S, Fleet
from vmdedup.history.place import HistoryPlan, default_directory
from vmdedup.ipc.channel import ChannelError
from vmdedup.linux import malloc
from vmdedup.models import SharingReport
from vmdedup.settings import ApiTlsSettings, Settings
from vmdedup.tls import TlsFiles

_IDLE_S = 0.5
"""Longest wait of the loop, seconds: the delay until the end of a VM is noticed."""


class Daemon:
    """The service. `run` returns after SIGTERM or SIGINT. Raises ControlError."""

    def __init__(self, settings: Settings, reload: Reload) -> None:
        self._settings = settings
        self._reload = reload
        self._controls = settings.controls
        self._signals = Signals()

    def run(self) -> SharingReport:
        """Serve until a signal or `end`; returns the final report of the sharing.

        Raises VmdedupError if it cannot start.
        """
        settings, signals = self._settings, self._signals
        malloc.give_back()
        with ExitStack() as exits:
            exits.enter_context(signals)
            fleet = Fleet(settings, merging=True, wait_s=LOCK_WAIT_S, stop=signals.stop)
            exits.callback(fleet.close)
            apply_controls(fleet, settings, self._controls)
            if self._controls.run == 2:
                fleet.rest_all()
            server = exits.enter_context(_api_server(settings))
            scouts = exits.enter_context(Scouts(fleet.loop, settings, signals.wake))
            watch = exits.enter_context(ShortageWatch(fleet.host, fleet.settings, signals.wake))
            service = _Service(
                settings, self._reload, Pace(self._controls), fleet, server, scouts, signals, watch
            )
            malloc.settle()
            while not signals.ended:
                service.turn()
            service.end()
            return fleet.report(converged=None)

    def end(self) -> None:
        """Have `run` return soon, after the current gate. From any thread or signal handler."""
        self._signals.end()


class _Service:
    """The parts around a fleet, put together, and one turn over all of them."""

    def __init__(
        self,
        settings: Settings,
        reload: Reload,
        pace: Pace,
        fleet: Fleet,
        server: ApiServer,
        scouts: Scouts,
        signals: Signals,
        watch: ShortageWatch,
    ) -> None:
        journal = Journal()
        news = DomainNews(fleet, scouts.libvirt, journal)
        feed = SnapshotFeed(fleet, journal, server, pace, news, watch)
        jobs = MergeJobs(fleet, scouts, journal, pace, feed, server)
        looks = ContentLooks(fleet, server)
        steering = Steering(settings, reload, fleet, scouts, journal, pace, feed, watch)
        self._fleet = fleet
        self._server = server
        self._signals = signals
        self._watch = watch
        self._journal = journal
        self._feed = feed
        self._jobs = jobs
        self._looks = looks
        self._steering = steering
        self._scan_loop = ScanLoop(fleet, journal, pace, jobs, feed)
        self._upkeep = Upkeep(fleet, journal, pace, jobs, feed)
        self._membership = Membership(fleet, scouts, news, journal, pace, feed)
        self._commands = Commands(fleet, scouts, journal, steering, pace, jobs, looks, feed, server)
        self._pace = pace
        fleet.engine.served.is_foreground = jobs.may_be_awaited
        journal.add("started", None, f"pid {os.getpid()}, API at {server.path}")

    def turn(self) -> None:
        """One turn of the loop: wait, then do a slice of each kind of work that is due."""
        surviving = self._journal.surviving
        self._wait()
        if self._signals.take_reload():
            with surviving():
                self._steering.reread()
        self._membership.take_in_found()
        with surviving():
            self._membership.hear_of_domains()
        self._serve()
        self._fleet.drop_ended()
        with surviving():
            self._upkeep.look_at_vms()
        with surviving():
            self._upkeep.settle()
        if self._membership.note_dropped():
            self._upkeep.sweep_soon()
        self._membership.note_hindrances()
        self._note_shortage()
        self._scan_loop.run_slice()
        self._looks.step()
        with surviving():
            self._upkeep.sweep()
        with surviving():
            self._upkeep.collapse()
        with surviving():
            self._upkeep.page_out_cold()
        with surviving():
            self._upkeep.page_out_at_once(is_wanted=self._watch.wants_page_out)
        with surviving():
            self._feed.push_if_wanted(awaited=self._jobs.waiting)

    def _note_shortage(self) -> None:
        """Make events of what the watch over memory has seen and done."""
        for news in self._watch.take_news():
            self._journal.add(news.kind, news.vm, news.message)
            self._feed.note_change()

    def _wait(self) -> None:
        """Wait until something happens, or the next slice is due."""
        until_slice_s = self._pace.until_slice_s if self._scan_loop.scans else _IDLE_S
        longest_s = 0.0 if self._looks.reads else min(_IDLE_S, until_slice_s)
        self._signals.wait(self._server.channel.fileno(), longest_s)

    def _serve(self) -> None:
        """Carry out the requests that have come; start the server again if it is gone."""
        try:
            for request in self._server.channel.poll():
                self._commands.serve(request)
        except ChannelError as error:
            self._jobs.forget()
            self._looks.close()
            self._server.restart()
            self._journal.add("api-restarted", None, str(error))
            self._journal.rewind()
            self._feed.note_change()

    def end(self) -> None:
        """After the last turn: unmerge everything, if that is set."""
        self._looks.close()
        if self._steering.settings.unmerge_on_exit:
            for left in self._fleet.unmerge(None, lambda _: None).vms:
                if left.remaining_pages:
                    self._journal.add("failed", left.name, left.reason or "")


def _api_server(settings: Settings) -> ApiServer:
    directory = settings.state_dir or default_directory()
    return ApiServer(
        settings.runtime_dir,
        group=settings.api_group,
        tcp_port=settings.api_tcp_port,
        tls=None if settings.api_tls is None else _tls_listener(settings.api_tls),
        history=HistoryPlan(directory, settings.history_interval_s, settings.history_days),
    )


def _tls_listener(tls: ApiTlsSettings) -> TlsListener:
    files = TlsFiles(tls.certificate, tls.key, tls.client_ca)
    return TlsListener(str(tls.address), tls.port, files)
