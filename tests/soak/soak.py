"""Soaking the daemon: random things happen to it and its VMs until time is up.

Owns a daemon, VMs on all backends, and the choice of what happens next: loads and
controls change, VMs start and end, monitors are asked, the daemon is restarted or
killed, and so are its children. Records what must never be: a guest error, a
daemon that ends by itself, memory of ours that grows, anything left at the end.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.daemons import patiently
from tests.chaos.fleet import BACKENDS, becomes_true, is_running, merged_pages
from tests.harness.kernel import mappings
from tests.harness.limits import swap
from tests.harness.monitor import qmp
from tests.harness.vm import Vm
from tests.service.daemon import Directories
from vmdedup.client import ServiceError

_ATTEMPTS_S = 60.0
_SETTLED_SHARE = 0.25
"""The first part of the time, in which libraries and buffers fill, is no trend."""
_MOST_GROWTH_BYTES_PER_MIN = 512 << 10
_MOST_GROWTH_SHARE = 0.1
"""Of the daemon's memory over the whole time, when the trend is steeper than noise."""
_AGE_S = 20.0
"""A daemon younger than this still fills its buffers."""
_COLD_CONTROLS = "cold_after_s = 2\ncold_max_cpu = 20\n"
_REWRITE_RATES, _RARE_REWRITE_RATES = (0, 50, 500, 3000), (0, 5, 50)
_CHECKS_PER_S, _RARE_CHECKS_PER_S = 8192, 64
"""Pages that guests rewrite or check a second; where that is rare, some are cold in between."""


@dataclass
class Figures:
    """What happened, and what was seen."""

    seconds: float = 0.0
    events: dict[str, int] = field(default_factory=dict)
    vms_started: int = 0
    vms_ended: int = 0
    guest_checks: int = 0
    guest_errors: int = 0
    passes: int = 0
    most_merged_pages: int = 0
    most_cold_pages: int = 0
    store_pages_left: int = 0
    mappings_left: int = 0
    descriptors_of_vms_grown: int = 0
    engine_fds: tuple[int, int] = (0, 0)
    """First and last, of daemons that were old enough."""
    engine_threads: tuple[int, int] = (0, 0)
    memory_samples: int = 0
    engine_rss_mib: tuple[float, float] = (0.0, 0.0)
    """Medians of the first and of the last third of the samples after settling."""
    rss_trend_kib_per_min: float = 0.0
    unexpected: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What must not be, in words; empty when all is well."""
        found = list(self.unexpected)
        if self.guest_errors:
            found.append(f"{self.guest_errors} guest errors")
        if self.store_pages_left or self.mappings_left:
            found.append("something is left after the unmerge")
        if self.descriptors_of_vms_grown:
            found.append(f"{self.descriptors_of_vms_grown} descriptors were left in VMs")
        first, last = self.engine_rss_mib
        steep = self.rss_trend_kib_per_min * 1024 > _MOST_GROWTH_BYTES_PER_MIN
        if steep and last > first * (1 + _MOST_GROWTH_SHARE):
            found.append(f"the engine grew from {first:.1f} to {last:.1f} MiB")
        return found


class Soak:
    """A running soak. A context manager; `run` once. `cold`: cold pages are paged out to zram."""

    def __init__(self, folder: Path, *, vms: int = 5, seed: int = 1, cold: bool = False) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._wanted_vms = vms
        self._cold = cold
        self._exits = ExitStack()
        self._vms: list[Vm] = []
        self._descriptors: dict[int, int] = {}
        self._events: Counter[str] = Counter()
        self._samples: list[tuple[float, int]] = []
        self._daemon_began = 0.0
        self._fds: list[int] = []
        self._threads: list[int] = []
        self.figures = Figures()

    def __enter__(self) -> Soak:
        with ExitStack() as exits:
            if self._cold:
                exits.enter_context(swap())
            self._directories = exits.enter_context(Directories())
            self._sockets = self._folder / f"sockets-{secrets.token_hex(3)}"
            self._sockets.mkdir()
            exits.callback(shutil.rmtree, self._sockets, ignore_errors=True)
            self._directories.write(
                f'qmp = ["{self._sockets}/*.qmp"]\nfirst_look_ms = 20\nhang_limit_ms = 10000\n'
                f"[controls]\nsleep_millisecs = 20\n{_COLD_CONTROLS if self._cold else ''}"
            )
            exits.callback(self._end_all)
            while len(self._vms) < self._wanted_vms:
                self._start_vm()
            self._begin_daemon()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.kill()
        self._exits.close()

    def _end_all(self) -> None:
        for vm in self._vms:
            vm.close()

    # --- what happens -----------------------------------------------------------------

    def run(self, seconds: float, *, report_every_s: float = 0.0) -> Figures:
        """Soak for so long, then unmerge everything; the figures."""
        began = time.monotonic()
        happenings = self._happenings()
        names, weights = list(happenings), [weight for weight, _ in happenings.values()]
        last_report = began
        while time.monotonic() - began < seconds:
            (name,) = self._random.choices(names, weights)
            self._events[name] += 1
            self._tried(name, happenings[name][1])
            time.sleep(self._random.uniform(0, 0.4))
            self._look_round(began)
            if report_every_s and time.monotonic() - last_report > report_every_s:
                last_report = time.monotonic()
                print(f"{last_report - began:6.0f} s", dict(self._events), file=sys.stderr)
        self.figures.seconds = round(time.monotonic() - began, 1)
        self._tried("end", self._finish)
        return self._account()

    def _happenings(self) -> dict[str, tuple[int, Callable[[], None]]]:
        return {
            "load": (10, self._change_load),
            "controls": (8, self._change_controls),
            "merge": (4, lambda: self._ask(lambda: self._daemon.client.merge(timeout_s=10))),
            "unmerge": (2, lambda: self._ask(lambda: self._daemon.client.unmerge([self._any()]))),
            "report": (4, lambda: self._ask(lambda: self._daemon.client.report(fresh=True))),
            "pause": (2, self._pause),
            "start": (3, self._start_vm),
            "end": (3, self._end_vm),
            "restart": (1, self._restart),
            "kill engine": (2, self._kill_engine),
            "kill server": (2, lambda: self._kill_child("server")),
            "kill guardian": (2, lambda: self._kill_child("guardian")),
        }

    def _tried(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is belongs into the figures
            self.figures.unexpected.append(f"{name}: {type(error).__name__}: {error}"[:2000])

    def _any(self) -> str:
        return self._random.choice(self._vms).name

    def _ask(self, question: Callable[[], object]) -> None:
        """Ask the daemon; it may refuse, for a VM may just have ended."""
        with suppress(ServiceError):
            question()

    def _change_load(self) -> None:
        vm = self._random.choice(self._vms)
        rates = _RARE_REWRITE_RATES if self._cold else _REWRITE_RATES
        vm.set_rewrite_rate(self._random.choice(rates))

    def _change_controls(self) -> None:
        values: dict[str, Any] = self._random.choice(
            [
                {"sleep_millisecs": self._random.choice([5, 20, 200])},
                {"pages_to_scan": self._random.choice([100, 1000, 20000]), "advisor_mode": "none"},
                {"use_zero_pages": self._random.choice([0, 1])},
                {"run": self._random.choice([0, 2])},
                {"smart_scan": self._random.choice([0, 1])},
            ]
        )
        self._ask(lambda: self._daemon.client.set(**values))
        if "run" in values:
            time.sleep(self._random.uniform(0, 0.5))
            self._ask(lambda: self._daemon.client.set(run=1))

    def _pause(self) -> None:
        """A user pauses a VM and resumes it."""
        vm = self._random.choice(self._vms)
        qmp(vm.test_qmp_path, "stop")
        time.sleep(self._random.uniform(0, 0.3))
        qmp(vm.test_qmp_path, "cont")

    def _start_vm(self) -> None:
        if len(self._vms) > self._wanted_vms:
            return
        number = self.figures.vms_started
        self.figures.vms_started += 1
        rewrites, checks = (5, _RARE_CHECKS_PER_S) if self._cold else (500, _CHECKS_PER_S)
        parameters = {
            "mib": 4,
            "seed": number + 1,
            "rewrite_per_s": rewrites,
            "check_per_s": checks,
        }
        vm = Vm(
            "bare",
            name=f"soak{number}",
            backend=BACKENDS[number % len(BACKENDS)],
            parameters=parameters,
            timeout_s=_ATTEMPTS_S,
        )
        self._vms.append(vm)
        vm.wait_ready()
        self._descriptors[vm.pid] = len(os.listdir(f"/proc/{vm.pid}/fd"))
        (self._sockets / f"{vm.name}.qmp").symlink_to(vm.qmp_path)

    def _end_vm(self) -> None:
        if len(self._vms) < self._wanted_vms:
            return
        vm = self._vms.pop(self._random.randrange(len(self._vms)))
        self._book(vm)
        self.figures.vms_ended += 1
        if self._random.random() < 0.5:
            vm.kill()
        vm.close()
        (self._sockets / f"{vm.name}.qmp").unlink()

    def _restart(self) -> None:
        self._daemon.end()
        self._daemon.kill()
        self._begin_daemon()

    def _kill_engine(self) -> None:
        children = self._children()
        self._daemon.kill()
        for pid in children.values():
            assert becomes_true(lambda pid=pid: not is_running(pid), _ATTEMPTS_S)  # type: ignore[misc]
        self._begin_daemon()

    def _begin_daemon(self) -> None:
        self._daemon = patiently(self._directories)
        self._daemon_began = time.monotonic()

    def _children(self) -> dict[str, int]:
        with suppress(ServiceError):
            health = self._daemon.client.health()
            assert health.engine.guardian_pid is not None
            return {"server": health.server_pid, "guardian": health.engine.guardian_pid}
        return {}

    def _kill_child(self, child: str) -> None:
        if (pid := self._children().get(child)) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # --- what is seen -------------------------------------------------------------------

    def _look_round(self, began: float) -> None:
        if self._daemon.process.poll() is not None:
            said = self._directories.log.read_text()[-1500:]
            self.figures.unexpected.append(f"the daemon ended by itself: {said}")
            self._begin_daemon()
        for vm in self._vms:
            if not vm.alive:
                self.figures.unexpected.append(f"{vm.name} ended: {vm.transcript()}")
        merged = sum(merged_pages(vm.pid) for vm in self._vms if vm.alive)
        self.figures.most_merged_pages = max(self.figures.most_merged_pages, merged)
        if self._cold:
            self._ask(self._count_cold)
        if time.monotonic() - self._daemon_began < _AGE_S:
            return
        status = Path(f"/proc/{self._daemon.process.pid}/status").read_text()
        anonymous = re.search(r"RssAnon:\s+(\d+)", status)
        threads = re.search(r"Threads:\s+(\d+)", status)
        assert anonymous is not None
        assert threads is not None
        self._samples.append((time.monotonic() - began, int(anonymous[1]) << 10))
        self._threads.append(int(threads[1]))
        self._fds.append(len(os.listdir(f"/proc/{self._daemon.process.pid}/fd")))

    def _count_cold(self) -> None:
        pages = self._daemon.client.report().host.cold_pages
        self.figures.most_cold_pages = max(self.figures.most_cold_pages, pages)

    def _book(self, vm: Vm) -> None:
        """Add what a guest has checked and found."""
        status = vm.status()
        self.figures.guest_checks += status.checks
        self.figures.guest_errors += vm.errors

    def _finish(self) -> None:
        """All is well at the end, and nothing is left once everything is unmerged."""
        for vm in self._vms:
            vm.set_rewrite_rate(200)
        assert becomes_true(lambda: len(self._daemon.names()) == len(self._vms), _ATTEMPTS_S)
        self._daemon.client.merge(timeout_s=30)
        self.figures.passes = self._daemon.client.health().engine.passes
        assert becomes_true(self._is_unmerged, _ATTEMPTS_S)
        self._daemon.end()

    def _is_unmerged(self) -> bool:
        self._daemon.client.set(run=2)
        return all(merged_pages(vm.pid) == 0 for vm in self._vms)

    def _account(self) -> Figures:
        figures = self.figures
        figures.events = dict(sorted(self._events.items()))
        for vm in self._vms:
            vm.wait_passes(1)
            self._book(vm)
            figures.mappings_left += sum(m.is_ours for m in mappings(vm.pid))
            grown = len(os.listdir(f"/proc/{vm.pid}/fd")) - self._descriptors[vm.pid]
            figures.descriptors_of_vms_grown += max(0, grown)
        for store in self._directories.store.glob("*.store"):
            figures.store_pages_left += store.stat().st_blocks // 8
        if "Traceback" in (said := self._directories.log.read_text()):
            figures.unexpected.append(said[said.index("Traceback") :][:3000])
        settled = self._samples[int(len(self._samples) * _SETTLED_SHARE) :]
        figures.memory_samples = len(settled)
        if len(settled) >= 3:
            at, size = (np.array(column) for column in zip(*settled, strict=True))
            third = max(1, len(size) // 3)
            ends = np.median(size[:third]), np.median(size[-third:])
            figures.engine_rss_mib = (float(ends[0]) / (1 << 20), float(ends[1]) / (1 << 20))
            trend = float(np.polyfit(at, size, 1)[0]) if at[-1] > at[0] else 0.0
            figures.rss_trend_kib_per_min = round(trend * 60 / 1024, 1)
            figures.engine_fds = self._fds[0], self._fds[-1]
            figures.engine_threads = self._threads[0], self._threads[-1]
        return figures
