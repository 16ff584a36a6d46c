"""One look at the daemon, and what changed since the last.

Owns the arithmetic of the live view: rates from two samples, rows in an order.
Promises no rate across a restart of the engine, whose counters begin again, nor
for a VM that has only just come. Reads /proc for CPU time; a process that is not
visible from here has none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmdedup.client import Client
from vmdedup.ipc.protocol import ControlValues, Health
from vmdedup.models import SharingReport, VmReport

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


@dataclass(frozen=True)
class Rates:
    """Changes per second between two samples; `None` if there is nothing to compare."""

    breaks: float | None = None
    scanned: float | None = None
    gates: float | None = None
    cpu_percent: float | None = None


@dataclass(frozen=True)
class Row:
    """One VM."""

    vm: VmReport
    breaks: float | None
    gates: float | None


@dataclass(frozen=True)
class View:
    """The content of the screen: a sample and its rates."""

    sample: Sample
    rates: Rates
    rows: tuple[Row, ...]


def view(now: Sample, before: Sample | None) -> View:
    """`now`, with rates if `before` is of the same engine."""
    same = (
        before is not None
        and before.health.engine.started_unix_s == now.health.engine.started_unix_s
        and now.monotonic_s > before.monotonic_s
    )
    if before is None or not same:
        return View(now, Rates(), tuple(Row(vm, None, None) for vm in now.report.vms))
    span_s = now.monotonic_s - before.monotonic_s
    host, past = now.report.host, before.report.host
    known = {vm.pid: vm for vm in before.report.vms}

    def row(vm: VmReport) -> Row:
        then = known.get(vm.pid)
        if then is None:
            return Row(vm, None, None)
        return Row(
            vm,
            _rate(vm.cow_breaks, then.cow_breaks, span_s),
            _rate(vm.gates, then.gates, span_s),
        )

    rows = tuple(row(vm) for vm in now.report.vms)
    gates = [each.gates for each in rows if each.gates is not None]
    cpu = _rate(now.cpu_s, before.cpu_s, span_s)
    return View(
        now,
        Rates(
            breaks=_rate(host.cow_breaks, past.cow_breaks, span_s),
            scanned=_rate(host.pages_scanned, past.pages_scanned, span_s),
            gates=sum(gates) if gates else None,
            cpu_percent=None if cpu is None else 100 * cpu,
        ),
        rows,
    )


def _rate(now: float | None, before: float | None, span_s: float) -> float | None:
    if now is None or before is None or now < before:
        return None
    return (now - before) / span_s


ORDERS: dict[str, Callable[[Row], tuple[float | str, ...]]] = {
    "saved": lambda row: (-row.vm.saved_bytes, row.vm.name),
    "name": lambda row: (row.vm.name,),
    "breaks": lambda row: (-(row.breaks or 0.0), -row.vm.cow_broken_pages, row.vm.name),
    "held": lambda row: (-row.vm.present_bytes, row.vm.name),
    "waiting": lambda row: (-(row.vm.deferred_pages or 0), row.vm.name),
    "vmas": lambda row: (-row.vm.vmas, row.vm.name),
}
"""Sort orders by name; the largest first, names from A."""


def ordered(rows: tuple[Row, ...], order: str, *, reverse: bool = False) -> list[Row]:
    """The rows in one of `ORDERS`."""
    return sorted(rows, key=ORDERS[order], reverse=reverse)
