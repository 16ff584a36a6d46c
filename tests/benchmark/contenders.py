"""KSM and vmdedup behind one set of verbs, so that both go through the same course.

Owns how each is started, hurried, paced, asked and undone. Promises that whatever
works for a contender is counted as its processor time: ksmd for KSM; for vmdedup
the daemon with all its processes, and what runs inside QEMU on its behalf.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from tests.benchmark import ksm
from tests.benchmark.errors import BenchError
from tests.benchmark.gauge import (
    Gauge,
    Kernel,
    descendants,
    process_cpu_s,
    pss_bytes_of,
    thread_cpu_s,
)
from tests.benchmark.guests import BackendKind, Guests
from vmdedup.accounting.sharing_report import VMA_BYTES
from vmdedup.client import Client, ServiceError
from vmdedup.controls import Controls
from vmdedup.core.rmap import BYTES_PER_PAGE
from vmdedup.core.smart_scan import BYTES_PER_PAGE as AGE_BYTES_PER_PAGE
from vmdedup.ipc.protocol import SOCKET_NAME
from vmdedup.models import SharingReport

_START_LIMIT_S = 60.0
_END_LIMIT_S = 20.0
_POLL_S = 0.05
_STILL = 0.001
"""Share of the saved pages that a scan adds at most when there is nothing left to do."""

FULL_SPEED: dict[str, str | int] = {
    "advisor_mode": "none",
    "pages_to_scan": 100_000,
    "sleep_millisecs": 0,
}
"""What `ksm.FULL_SPEED` is for KSM: passes are compared at equal controls."""


@dataclass(frozen=True)
class Unmerging:
    """What giving every page back took."""

    wall_s: float
    cpu_s: float


class Contender(Protocol):
    """One way to merge the fleet. A context manager: outside it nothing is merged."""

    name: str
    backend: BackendKind
    limit_s: float
    """When to give up waiting for it to have merged everything."""
    is_steady: bool
    """Whether it is measured on running guests too."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None: ...
    def begin(self) -> None:
        """Merge, from now on, as fast as this contender does."""

    def settled(self) -> bool:
        """Whether it has nothing left to merge on frozen guests."""

    def saved_pages_soon(self) -> int:
        """Pages saved so far, cheap enough to ask a hundred times a second."""

    def cpu_s(self, *, frozen: bool) -> float:
        """Its processor time so far; what runs inside QEMU is told apart by `frozen`."""

    def hurry(self) -> None:
        """Scan on at full speed, until `ease`."""

    def ease(self) -> bool:
        """Scan on at the pace it has by itself; False when it has no other."""

    def passes(self) -> int:
        """Whole scans so far."""

    def unmerge(self) -> Unmerging:
        """Give every page back, and do not merge until `begin`."""

    def overhead_bytes(self, before: Kernel) -> dict[str, int]:
        """Memory it costs now, by what for; `before` was measured unmerged."""

    def report(self) -> SharingReport | None:
        """Its own account of gates and drains, where it has one."""

    def complaints(self) -> list[str]:
        """What makes its figures worth less; asked while all is merged."""


class Ksm:
    """The kernel's KSM with some settings."""

    def __init__(
        self,
        name: str,
        settings: Mapping[str, str],
        kernel: ksm.KsmSettings,
        gauge: Gauge,
        *,
        backend: BackendKind,
        limit_s: float,
        is_steady: bool,
    ) -> None:
        self.name = name
        self.backend = backend
        self.limit_s = limit_s
        self.is_steady = is_steady
        self._settings = settings
        self._kernel = kernel
        self._gauge = gauge
        self._ksmd = ksm.ksmd_pid()
        self._pids = [ram.pid for ram in gauge.rams]
        self._foreign_pages = 0
        self._scans: dict[int, int] = {}

    def __enter__(self) -> Self:
        self._kernel.use(self._settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        self._kernel.unmerge()

    def begin(self) -> None:
        self._scans = {}
        self._kernel.run()

    def settled(self) -> bool:
        now = ksm.share_of(self._pids)
        self._foreign_pages = max(self._foreign_pages, now.foreign_pages)
        self._scans.setdefault(self.passes(), now.saved_pages)
        last = list(self._scans.values())[-3:]
        # The first scan has only taken checksums, and may have begun before.
        return len(self._scans) > 4 and last[-1] - last[0] <= _STILL * last[-1]

    def saved_pages_soon(self) -> int:
        return ksm.share_of(self._pids).saved_pages

    def cpu_s(self, *, frozen: bool) -> float:
        return process_cpu_s(self._ksmd)

    def hurry(self) -> None:
        self._kernel.run()

    def ease(self) -> bool:
        return False

    def passes(self) -> int:
        return ksm.counters().full_scans

    def unmerge(self) -> Unmerging:
        began = time.monotonic()
        cpu_s = self._kernel.unmerge()
        return Unmerging(time.monotonic() - began, cpu_s)

    def overhead_bytes(self, before: Kernel) -> dict[str, int]:
        items = sum(ksm.rmap_items(pid) for pid in self._pids)
        now = self._gauge.kernel()
        return {
            "rmap_items": items * ksm.RMAP_ITEM_BYTES,
            "stable_nodes": ksm.counters().pages_shared * ksm.STABLE_NODE_BYTES,
            "page_tables": now.page_table_bytes - before.page_table_bytes,
        }

    def report(self) -> SharingReport | None:
        return None

    def complaints(self) -> list[str]:
        if not self._foreign_pages:
            return []
        return [f"KSM also worked on {self._foreign_pages} pages of other processes"]


def _rcu_tid(pid: int) -> int:
    """The thread that vmdedup borrows: QEMU's second."""
    return int(os.listdir(f"/proc/{pid}/task")[1])


class Vmdedup:
    """The daemon, told to merge now; with `at_defaults` it is merely let run."""

    def __init__(
        self,
        name: str,
        guests: Guests,
        gauge: Gauge,
        store_dir: Path,
        *,
        backend: BackendKind,
        limit_s: float,
        is_steady: bool,
        at_defaults: bool = False,
    ) -> None:
        self.name = name
        self.backend = backend
        self.limit_s = limit_s
        self.is_steady = is_steady
        self._guests = guests
        self._gauge = gauge
        self._store_dir = store_dir
        self._at_defaults = at_defaults
        self._held_pages = 0
        self._tids: dict[int, int] = {}
        self._asked: threading.Thread | None = None
        self._refused: ServiceError | None = None
        self._passes: dict[int, int] = {}

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            self._runtime_dir = self._guests.directory / "daemon"
            self._log = self._guests.directory / "daemon.log"
            self._daemon = self._start()
            exits.callback(self._end)
            self._client = exits.enter_context(Client(self._runtime_dir / SOCKET_NAME))
            self._wait_attached()
            self._pids = [self._daemon.pid, *descendants(self._daemon.pid)]
            self._tids = {pid: _rcu_tid(pid) for pid in self._guests.pids}
            self._held_pages = self._gauge.held_pages_soon()
            exits.callback(self._stop)
            self._rest()
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        said = self._said() if isinstance(error, ServiceError) else []
        with suppress(ServiceError):
            self._exits.close()
        if said:
            raise BenchError(f"vmdedup run ended: {said[-1]}") from error

    def _said(self) -> list[str]:
        return self._log.read_text(errors="replace").strip().splitlines()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: it for name, it in os.environ.items() if "VMDEDUP_" not in name}
        environment["VMDEDUP_RUNTIME_DIR"] = str(self._runtime_dir)
        environment["VMDEDUP_STORE_DIR"] = str(self._store_dir)
        environment["VMDEDUP_STATE_DIR"] = str(self._guests.directory / "state")
        command = ["setpriv", "--pdeathsig", "TERM", "--", sys.executable, "-c"]
        command += ["from vmdedup.cli.main import main; main()", "run", "--controls", "run=0"]
        for guest in self._guests.each:
            command += ["--qmp", str(guest.qmp_path)]
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )

    def _wait_attached(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        wanted = len(self._guests.each)
        while True:
            reasons = ["it does not answer"]
            try:
                vms = self._client.vms().vms
            except ServiceError:
                vms = []
            if len([vm for vm in vms if vm.mergeable]) == wanted:
                return
            reasons = [f"{vm.name}: {vm.reason}" for vm in vms if not vm.mergeable] or reasons
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"vmdedup run: {'; '.join([*reasons, *self._said()[-1:]])}")
            time.sleep(_POLL_S)

    def _stop(self) -> None:
        """Unmerge, so that the guests go on as they were."""
        if self._asked is not None:
            self._asked.join(self.limit_s)
        if self._daemon.poll() is None:
            self._client.set(run=2)

    def _end(self) -> None:
        self._daemon.terminate()
        try:
            self._daemon.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
        shutil.rmtree(self._store_dir, ignore_errors=True)

    def _rest(self) -> None:
        """Have it run, know nothing of the guests, and leave them alone until it is to merge."""
        if not self._at_defaults:
            self._client.set(run=1)
            self._client.unmerge()

    def begin(self) -> None:
        self._passes = {}
        self._refused = None
        if self._at_defaults:
            self._client.set(run=1)
            return
        self._asked = threading.Thread(target=self._merge, daemon=True)
        self._asked.start()

    def _merge(self) -> None:
        try:
            self._client.merge(timeout_s=self.limit_s)
        except ServiceError as error:
            self._refused = error

    def settled(self) -> bool:
        if self._refused is not None:
            raise self._refused
        if not self._at_defaults:
            return self._asked is not None and not self._asked.is_alive()
        self._passes.setdefault(self._client.health().engine.passes, self.saved_pages_soon())
        last = list(self._passes.values())[-2:]
        return len(self._passes) > 2 and last[-1] - last[0] <= _STILL * last[-1]

    def saved_pages_soon(self) -> int:
        return self._held_pages - self._gauge.held_pages_soon()

    def cpu_s(self, *, frozen: bool) -> float:
        own = sum(process_cpu_s(pid) for pid in self._pids)
        if frozen:  # nothing else happens in a paused QEMU
            return own + sum(process_cpu_s(pid) for pid in self._tids)
        return own + sum(thread_cpu_s(pid, tid) for pid, tid in self._tids.items())

    def hurry(self) -> None:
        self._client.set(run=1, **FULL_SPEED)

    def ease(self) -> bool:
        defaults = Controls().model_dump(include=set(FULL_SPEED))
        mode = defaults.pop("advisor_mode")
        # The advisor refuses pages_to_scan while it is on.
        self._client.set(advisor_mode="none", **defaults)
        self._client.set(advisor_mode=mode)
        return True

    def passes(self) -> int:
        # Health is told every few seconds only.
        return self._client.report(fresh=True).host.full_scans or 0

    def unmerge(self) -> Unmerging:
        if self._asked is not None:
            self._asked.join(self.limit_s)
        began, before_s = time.monotonic(), self.cpu_s(frozen=True)
        self._client.set(run=2)
        took = Unmerging(time.monotonic() - began, self.cpu_s(frozen=True) - before_s)
        self._rest()
        return took

    def overhead_bytes(self, before: Kernel) -> dict[str, int]:
        engine = self._daemon.pid
        health = self._client.health()
        now = self._gauge.kernel()
        columns = sum(ram.pages for ram in self._gauge.rams)
        known = {engine, health.server_pid, health.engine.guardian_pid}
        others = [pid for pid in descendants(engine) if pid not in known]
        column_bytes = columns * (BYTES_PER_PAGE + AGE_BYTES_PER_PAGE)
        return {
            "engine": pss_bytes_of([engine]) - column_bytes,
            "columns": column_bytes,
            "api_server": pss_bytes_of([health.server_pid]),
            "guardian": pss_bytes_of([health.engine.guardian_pid or 0]),
            "workers": pss_bytes_of(others),
            "vmas": (now.vmas - before.vmas) * VMA_BYTES,
            "page_tables": now.page_table_bytes - before.page_table_bytes,
        }

    def report(self) -> SharingReport | None:
        return self._client.report(fresh=True)

    def complaints(self) -> list[str]:
        report = self._client.report()
        return [f"{vm.name}: {vm.reason}" for vm in report.vms if vm.reason is not None]
