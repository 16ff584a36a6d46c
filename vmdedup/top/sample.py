"""One look at the daemon, and what changed since the last.

Owns the arithmetic of the live view: rates from two samples.
Promises no rate across a restart of the engine, whose counters begin again, nor
for a VM that has only just come. Reads /proc for CPU time; a process that is not
visible from here has none.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from vmdedup.client import Client
from vmdedup.ipc.protocol import ControlValues, Health
from vmdedup.models import SharingReport, VmReport
from vmdedup.top.view import COLUMNS, Rates, Row, View, rate

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """The daemon at one time."""

    monotonic_s: float
    report: SharingReport
    health: Health
    controls: ControlValues
    cpu_s: float | None
    """CPU time of engine, guardian and API server together, seconds; `None` if unknown."""


def take(client: Client) -> Sample:
    """Look now. Raises ServiceError."""
    report = client.report(fresh=True)
    health = client.health()
    pids = (health.engine.engine_pid, health.engine.guardian_pid, health.server_pid)
    return Sample(
        monotonic_s=time.monotonic(),
        report=report,
        health=health,
        controls=client.controls(),
        cpu_s=_cpu_s([pid for pid in pids if pid is not None]),
    )


def _cpu_s(pids: list[int]) -> float | None:
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def view(now: Sample, before: Sample | None) -> View:
    """`now`, with rates if `before` is of the same engine."""
    report, host = now.report, now.report.host
    engine = now.health.engine
    if before is not None and before.health.engine.started_unix_s != engine.started_unix_s:
        before = None
    past = before.report.host if before else None
    known = {vm.pid: vm for vm in before.report.vms} if before else {}
    span_s = now.monotonic_s - before.monotonic_s if before else 0.0
    rows = tuple(_row(vm, known.get(vm.pid), span_s) for vm in report.vms)
    gates = [row.gates for row in rows if row.gates is not None]
    cpu = rate(now.cpu_s, before.cpu_s if before else None, span_s)
    state = {"0": "stopped (run=0)", "2": "unmerged (run=2)"}.get(
        str(now.controls.values.get("run")), "running"
    )
    used = "-" if cpu is None else f"{100 * cpu:.1f}%"
    return View(
        when=f"{state}, pid {engine.engine_pid}, CPU {used}",
        rows=rows,
        saved_bytes=host.saved_bytes,
        held_bytes=sum(vm.present_bytes for vm in report.vms),
        overhead_bytes=host.overhead_bytes,
        gate_p99_ms=host.gate_ms.p99,
        full_scans=host.full_scans,
        rates=Rates(
            breaks=rate(host.cow_breaks, past.cow_breaks, span_s) if past else None,
            scanned=rate(host.pages_scanned, past.pages_scanned, span_s) if past else None,
            gates=sum(gates) if gates else None,
        ),
    )


def _row(vm: VmReport, before: VmReport | None, span_s: float) -> Row:
    return Row(
        name=vm.name,
        status=vm.status,
        held_bytes=vm.present_bytes,
        saved_bytes=vm.saved_bytes,
        merged_pages=vm.merged_pages,
        zero_pages=vm.zero_pages,
        broken_pages=vm.cow_broken_pages,
        breaks=rate(vm.cow_breaks, before.cow_breaks, span_s) if before else None,
        gates=rate(vm.gates, before.gates, span_s) if before else None,
        waiting_pages=vm.deferred_pages,
        vmas=vm.vmas,
    )


class LiveSource:
    """The daemon at `socket`, or at the URL of another host."""

    columns = tuple(COLUMNS)
    shortest_s = 0.5
    has_steps = False

    def __init__(self, socket: Path | str) -> None:
        self.title = str(socket)
        self._socket = socket
        self._before: Sample | None = None

    def look(self, steps: int = 1) -> View:
        """The daemon now, however many `steps`. Raises ServiceError."""
        before, self._before = self._before, None
        with Client(self._socket) as client:
            now = take(client)
        self._before = now
        return view(now, before)
