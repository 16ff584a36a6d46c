"""Benchmark: what cold pages give back beside merging, and what the guests pay for it.

    .venv/bin/python -m tests.benchmark.cold [--mib 384] [--phase 60] [--minutes 10]
        [--algorithm lz4] [--json FILE]

Four running Debian guests go through five phases: left alone, KSM at full speed, vmdedup,
vmdedup with cold pages paged out to zram, and left alone again. What is given back is counted
by the frames that the guests held before and hold then; what the store, or zram, takes counts
as held. The guests' speed is that of their probes, the sum of ops a second of the probe's own
time, against the mean of both phases alone. `--minutes` is how long the phase with cold pages
goes on. Prints the table of docs/benchmarks.md; the guests must be unharmed at its end.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmark import ksm
from tests.benchmark.errors import BenchError
from tests.benchmark.gauge import Gauge, process_cpu_s
from tests.benchmark.guests import WORKLOADS, Guests, Probed, require_images, sweep
from tests.service.daemon import Directories, monitors, running
from vmdedup.linux.swap import read_swap
from vmdedup.units import MIB, PAGE_BYTES

_ZRAM = Path("/sys/block/zram0")
_DEVICE = "/dev/zram0"
_SETTLE_S = 30
_ASK_S = 10
_COLD = {"cold_after_s": 20, "cold_max_cpu": 20, "advisor_target_scan_time": 5}
"""Controls of the phase with cold pages: minutes have to do for hours."""


@dataclass(frozen=True)
class Phase:
    """One way, when it has done its work; speeds are of the time after that."""

    way: str
    given_back_mib: float
    saved_mib: float
    """Of that by merging, as the merger itself counts it."""
    ops_per_s: float
    """Of all probes, by the time in which they worked."""
    swapped_in_per_s: float
    cpu_percent: float
    """Of one CPU, for the merger."""


class Course:
    """The guests, and what is measured of them. `quiet_s` is how long a phase is measured."""

    def __init__(self, guests: Guests, gauge: Gauge, quiet_s: float) -> None:
        self._guests = guests
        self._gauge = gauge
        self._quiet_s = quiet_s
        self._held_bytes = self.held_bytes()

    def held_bytes(self) -> int:
        """Memory of the guests now, that of compressed pages included."""
        return self._gauge.held_pages() * PAGE_BYTES + read_swap().held_bytes

    def measured(
        self, way: str, saved_bytes: Callable[[], int], cpu_s: Callable[[], float]
    ) -> Phase:
        """What holds at the end of some quiet time."""
        before, cpu, swapped = self._guests.probed(), cpu_s(), _swapped_in()
        began = time.monotonic()
        time.sleep(self._quiet_s)
        elapsed_s = time.monotonic() - began
        return Phase(
            way,
            (self._held_bytes - self.held_bytes()) / MIB,
            saved_bytes() / MIB,
            sum(map(_speed, before, self._guests.probed())),
            (_swapped_in() - swapped) / elapsed_s,
            (cpu_s() - cpu) / elapsed_s * 100,
        )


def _speed(before: Probed | None, after: Probed | None) -> float:
    if before is None or after is None or before.busy_us is None or after.busy_us is None:
        raise BenchError("a guest's probe does not tell how long it worked")
    return (after.ops - before.ops) / max(1, after.busy_us - before.busy_us) * 1e6


def _swapped_in() -> int:
    """Pages that were swapped in on this host (/proc/vmstat)."""
    found = re.search(r"^pswpin (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@contextmanager
def zram(size_mib: int, algorithm: str) -> Iterator[None]:
    """Swap to a zram device for the block."""
    if (_ZRAM / "disksize").read_text().strip() != "0":
        raise BenchError("zram0 is in use: swapoff it, and echo 1 > /sys/block/zram0/reset")
    known = (_ZRAM / "comp_algorithm").read_text().replace("[", "").replace("]", "").split()
    if algorithm not in known:
        raise BenchError(f"zram cannot compress by {algorithm} here, only by {', '.join(known)}")
    with ExitStack() as exits:
        exits.callback((_ZRAM / "reset").write_text, "1")
        (_ZRAM / "comp_algorithm").write_text(algorithm)
        (_ZRAM / "disksize").write_text(f"{size_mib}M")
        subprocess.run(["mkswap", _DEVICE], check=True, capture_output=True)
        subprocess.run(["swapon", _DEVICE], check=True)
        exits.callback(subprocess.run, ["swapoff", _DEVICE], check=True)
        yield


def _tell(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def by_ksm(course: Course, guests: Guests) -> Phase:
    """What KSM gives back at full speed, zero pages included."""
    ksmd = ksm.ksmd_pid()
    with ksm.KsmSettings() as kernel:
        kernel.use({**ksm.FULL_SPEED, "use_zero_pages": "1"})
        kernel.run()
        time.sleep(_SETTLE_S)
        found = course.measured(
            "KSM at full speed",
            lambda: ksm.share_of(guests.pids).saved_pages * PAGE_BYTES,
            lambda: process_cpu_s(ksmd),
        )
        kernel.unmerge()
    return found


def by_vmdedup(
    course: Course, guests: Guests, directories: Directories, minutes: float
) -> list[Phase]:
    """What merging gives back, and then what cold pages do beside it."""
    with running(directories, *monitors(*guests.each)) as daemon:
        client = daemon.client
        time.sleep(_SETTLE_S)

        def saved_bytes() -> int:
            return client.report(fresh=True).host.saved_bytes

        client.merge(timeout_s=120)
        found = [course.measured("vmdedup", saved_bytes, daemon.cpu_s)]
        _tell(f"{found[-1]}")
        client.set(**_COLD)
        until = time.monotonic() + minutes * 60
        while time.monotonic() < until:
            time.sleep(_ASK_S)
            host = client.report(fresh=True).host
            _tell(
                f"cold_pages {host.cold_pages}, cold_bytes_saved {host.cold_bytes_saved / MIB:.1f}"
                f" MiB, refaults {host.cold_refaults_per_s:.1f}/s,"
                f" saved {host.saved_bytes / MIB:.1f} MiB"
            )
        found.append(course.measured("vmdedup with cold pages", saved_bytes, daemon.cpu_s))
        client.set(cold_after_s=0)
        client.unmerge()
    return found


def table(phases: list[Phase]) -> str:
    """The table of docs/benchmarks.md."""
    alone = (phases[0].ops_per_s + phases[-1].ops_per_s) / 2
    by_kernel = next(each for each in phases if each.way.startswith("KSM")).given_back_mib
    lines = [
        "| way | given back, MiB | of KSM's | of that by merging, MiB | guests' speed"
        " | pages swapped in a second | CPU of the merger |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in phases:
        lines.append(
            f"| {each.way} | {each.given_back_mib:.1f} | {each.given_back_mib / by_kernel:.2f}"
            f" | {each.saved_mib:.1f} | {100 * each.ops_per_s / alone:.1f}%"
            f" | {each.swapped_in_per_s:.1f} | {each.cpu_percent:.1f}% |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="What cold pages give back, and cost.")
    parser.add_argument("--mib", type=int, default=384)
    parser.add_argument("--phase", type=float, default=60, help="seconds that each is measured")
    parser.add_argument("--minutes", type=float, default=10, help="with cold pages")
    parser.add_argument("--algorithm", default="lz4")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sweep()
    require_images(WORKLOADS, _tell)
    with (
        zram(4 * arguments.mib, arguments.algorithm),
        Directories() as directories,
        Guests(WORKLOADS, "ram", arguments.mib, _tell) as guests,
    ):
        time.sleep(_SETTLE_S)
        course = Course(guests, Gauge(guests.each, directories.store), arguments.phase)
        phases = [course.measured("alone", lambda: 0, lambda: 0.0)]
        _tell(f"{phases[-1]}")
        phases.append(by_ksm(course, guests))
        _tell(f"{phases[-1]}")
        phases += by_vmdedup(course, guests, directories, arguments.minutes)
        _tell(f"{phases[-1]}")
        phases.append(course.measured("alone again", lambda: 0, lambda: 0.0))
        for vm in guests.each:
            assert vm.alive, vm.transcript()
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in phases], indent=2))
    print(table(phases))


if __name__ == "__main__":
    main()
