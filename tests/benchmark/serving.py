"""Benchmark: does serving the API lengthen gates, or only the CPU that its askers use?

    .venv/bin/python -m tests.benchmark.serving [--turns 8] [--json FILE]

One daemon merges the same guests again and again (unmerged and attached anew in between,
so that each merge has gates of its own). Three variants take turns, merge by merge:

    idle      nobody asks
    serving   two clients ask for /v1/report, one request after the other
    burning   nobody asks; two processes that only compute use as much CPU as clients and
              API server did in the turn before, as measured then

`serving` less `idle` is what a busy host pays; of that, `burning` less `idle` is for
processors that are taken, and the rest is serving's own doing. Prints medians over turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmark.turns import medians, write_json
from tests.harness.vm import Backend, Vm
from tests.service.daemon import Daemon, Directories, monitors, running

CLIENTS = 2
BACKENDS = (
    Backend("memfd", True, mib=32),
    Backend("ram", False, mib=32),
    Backend("memfd", True, mib=32),
)
GUEST = {"mib": 16, "shared_mib": 8, "repeat_mib": 2, "zero_mib": 2, "run_pages": 4}
RUNNING = {"rewrite_per_s": 50, "check_per_s": 4096}
VARIANTS = ("idle", "serving", "burning")
_SETTLE_S = 0.5

_CLIENT = """
import sys
from vmdedup.client import Client
with Client(sys.argv[1]) as client:
    while True:
        client.report()
"""
_BURNER = """
import sys, time
share = float(sys.argv[1])
while True:
    began = time.thread_time()
    while time.thread_time() - began < 0.002 * share: pass
    time.sleep(0.002 * (1 - share))
"""


@dataclass(frozen=True)
class Turn:
    """One merge: its gates in milliseconds, and the CPUs that the others used meanwhile."""

    gates: int
    p50_ms: float
    p95_ms: float
    max_ms: float
    merge_s: float
    other_cpus: float


def cpu_s(pids: list[int]) -> float:
    """CPU time these processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def others(variant: str, socket: Path, cpus: float) -> Iterator[list[int]]:
    """The processes of a variant besides the daemon's, by pid; ended with the block."""
    program = {
        "idle": [],
        "serving": [_CLIENT, str(socket)],
        "burning": [_BURNER, str(min(1.0, cpus / CLIENTS))],
    }[variant]
    with ExitStack() as exits:
        pids = []
        for _ in range(CLIENTS if program else 0):
            started = subprocess.Popen([sys.executable, "-c", *program])
            exits.callback(started.wait)
            exits.callback(started.kill)
            pids.append(started.pid)
        yield pids


def turn(daemon: Daemon, vms: list[Vm], variant: str, cpus: float) -> Turn:
    """Merge everything once, with `variant` beside it."""
    client = daemon.client
    client.set(run=2)
    for vm in vms:
        client.detach(vm.name)
        client.attach(vm.qmp_path)
    server = client.health().server_pid
    with others(variant, client.socket, cpus) as pids:
        time.sleep(_SETTLE_S)
        counted = [*pids, server]
        cpu_before, began = cpu_s(counted), time.monotonic()
        client.set(run=1)
        report = client.merge(timeout_s=60)
        merge_s = time.monotonic() - began
        other_cpus = (cpu_s(counted) - cpu_before) / merge_s
    gate = report.host.gate_ms
    assert report.converged, report.vms
    assert gate.p50 is not None, report.vms
    assert gate.p95 is not None
    assert gate.max is not None
    return Turn(gate.count, gate.p50, gate.p95, gate.max, merge_s, other_cpus)


def measure(turns: int) -> dict[str, list[Turn]]:
    """All turns by variant, alternating."""
    found: dict[str, list[Turn]] = {variant: [] for variant in VARIANTS}
    with ExitStack() as exits:
        directories = exits.enter_context(Directories())
        vms = []
        for seed, backend in enumerate(BACKENDS, 1):
            parameters = {"seed": seed, **GUEST, **RUNNING}
            vms.append(Vm("bare", name=f"vm{seed}", backend=backend, parameters=parameters))
            exits.callback(vms[-1].close)
        for vm in vms:
            vm.wait_ready()
        daemon = exits.enter_context(running(directories, *monitors(*vms)))
        daemon.client.merge(timeout_s=60)
        cpus = 0.0
        for _ in range(turns):
            for variant in VARIANTS:
                found[variant].append(turn(daemon, vms, variant, cpus))
                if variant == "serving":
                    cpus = found[variant][-1].other_cpus
        assert [vm.errors for vm in vms] == [0] * len(vms)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="What serving the API does to gates.")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.turns)
    print("medians   gates   p50   p95   max ms | merge s | CPUs of the others")
    for variant, turns in found.items():
        names = ("gates", "p50_ms", "p95_ms", "max_ms", "merge_s", "other_cpus")
        gates, p50, p95, longest, merge_s, cpus = medians(turns, names)
        print(
            f"{variant:9} {gates:5.0f} {p50:5.2f} {p95:5.2f} {longest:6.2f}    | {merge_s:7.2f}"
            f" | {cpus:.2f}"
        )
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
