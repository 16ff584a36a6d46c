"""The scan loop: when the daemon scans, in which pieces, and how long it sleeps between them.

Owns the pass under way and whether memory pressure wants merging. A pass is scanned in
slices (`Engine.look_some`), with a sleep after each; it ends with a merge and is measured
for the advisor. Promises that a client that waits for a merge is served without sleeps. A
slice that fails becomes an event, and is tried again a second later. Refuses to scan
while `run` is not 1, no VM is attached, or memory is plenty.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from vmdedup.daemon.journal import Journal
from vmdedup.daemon.merge_jobs import MergeJobs
from vmdedup.daemon.pace import Pace
from vmdedup.daemon.snapshot import SnapshotFeed
from vmdedup.engine.fleet import Fleet
from vmdedup.engine.progress import PassOutcome
from vmdedup.errors import VmdedupError
from vmdedup.linux import malloc
from vmdedup.linux.meminfo import memory_bytes
from vmdedup.policy import advisor, pressure

_JOB_PAGES = 1 << 18
"""Pages looked at in one slice while a client waits for a merge."""
_FAILED_PAUSE_S = 1.0
_NEW_PAUSE_S = 0.1
"""Rest after a pass that saw pages for the first time: it has merged none of these."""


@dataclass
class _Pass:
    """The measures of one pass."""

    began_s: float = 0.0
    """Time of the begin on CLOCK_MONOTONIC, seconds."""
    slept_s: float = 0.0
    cpu_s: float = 0.0
    pages: int = 0
    """Pages that were looked at."""
    new_pages: int = 0
    """Pages that had never been looked at when the pass began."""


class ScanLoop:
    """Scans in slices. `run_slice` is one turn of the loop."""

    def __init__(
        self, fleet: Fleet, journal: Journal, pace: Pace, jobs: MergeJobs, feed: SnapshotFeed
    ) -> None:
        self._fleet = fleet
        self._journal = journal
        self._pace = pace
        self._jobs = jobs
        self._feed = feed
        self._merging = True
        """Whether merging is wanted at the memory that is available."""
        self._pass = _Pass()

    @property
    def scans(self) -> bool:
        """Whether there is anything to scan, and scanning is wanted."""
        wanted = self._merging or self._jobs.begun
        return self._pace.controls.run == 1 and wanted and bool(self._fleet.pids())

    def run_slice(self) -> None:
        """If it is due, look at some pages, or merge at the end of a pass."""
        self._jobs.begin_waiting()
        self._heed_pressure()
        if self.scans and self._pace.until_slice_s <= 0:
            try:
                self._scan()
            except VmdedupError as error:
                self._journal.add("failed", None, str(error))
                self._pace.sleep(_FAILED_PAUSE_S)
                self._feed.note_change()
        self._jobs.end_in_time()

    def _heed_pressure(self) -> None:
        """Decide whether merging is wanted at the memory that is available now."""
        controls = self._pace.controls
        if self._merging and not controls.pressure_threshold_percent:
            return
        available_bytes, total_bytes = memory_bytes()
        wanted = pressure.decide(
            self._merging,
            available_bytes,
            total_bytes,
            controls.pressure_threshold_percent,
            controls.pressure_hysteresis_percent,
        )
        if wanted != self._merging:
            self._merging = wanted
            verb = "merging goes on" if wanted else "merging pauses"
            self._journal.add("pressure", None, f"{_available()} of memory is available: {verb}")
            self._feed.note_change()

    def _scan(self) -> None:
        """Do one slice, and set the pause after it."""
        engine = self._fleet.engine
        cpu_began_s = time.process_time()
        if self._jobs.waiting:
            malloc.keep()
        if not engine.looks.is_begun:
            self._begin_pass()
        most_pages = _JOB_PAGES if self._jobs.waiting else self._pace.pages_to_scan
        self._pass.pages += engine.looks.look_some(most_pages)
        still_s = self._until_second_look_s() if engine.looks.compares_next else 0.0
        outcome = engine.finish_pass() if engine.looks.is_done and not still_s else None
        self._pass.cpu_s += time.process_time() - cpu_began_s
        if outcome is not None:
            pause_s = self._end_pass(outcome)
        else:
            pause_s = self._pace.controls.sleep_millisecs / 1000
            self._pass.slept_s += pause_s
        if self._jobs.waiting:
            pause_s = still_s if engine.looks.is_done else 0.0
            if not engine.looks.is_begun:
                pause_s = self._until_second_look_s()
        self._pace.sleep(pause_s)

    def _begin_pass(self) -> None:
        engine = self._fleet.engine
        self._pass = _Pass(began_s=time.monotonic(), new_pages=engine.looks.unknown_pages())
        density = engine.huge_page_density
        engine.begin_pass(everywhere=self._jobs.waiting)
        if engine.huge_page_density != density:
            said = f"huge pages are split from {engine.huge_page_density} savable pages on"
            self._journal.add("pressure", None, f"{_available()} of memory is available: {said}")

    def _until_second_look_s(self) -> float:
        """How much longer a page must stay unchanged, seconds; the pass took part of that time."""
        since_first_s = time.monotonic() - self._pass.began_s
        return max(0.0, self._fleet.settings.first_look_ms / 1000 - since_first_s)

    def _end_pass(self, outcome: PassOutcome) -> float:
        """Book a finished pass; returns the rest after it, in seconds."""
        scan = advisor.Scan(
            pages_scanned=self._pass.pages,
            covered_pages=self._fleet.engine.looks.covered_pages(),
            new_pages=self._pass.new_pages,
            scan_s=time.monotonic() - self._pass.began_s,
            slept_s=self._pass.slept_s,
            cpu_s=self._pass.cpu_s,
        )
        self._pace.follow(scan)
        self._feed.note_pass(scan.scan_s * 1000)
        self._jobs.note_pass(outcome)
        # A VM not looked at twice yet has merged nothing: look again soon.
        return _NEW_PAUSE_S if self._pass.new_pages else self._pace.rest_s


def _available() -> str:
    """The share of the host's memory that is available, for people."""
    available_bytes, total_bytes = memory_bytes()
    return f"{100 * available_bytes / total_bytes:.1f}%"
