"""Benchmark: how fast guests read all over their memory, as huge pages are kept or split.

    .venv/bin/python -m tests.benchmark.huge_speed [--guest bare] [--accel kvm] [--mib 512]
        [--turns 3] [--seconds 5] [--without-ksm] [--json FILE]

Two guests with transparent huge pages read one word after another, each anywhere in their
memory, and nothing else (`roam`, images/README.md). A quarter of it is equal in both, an
eighth is zero, in pieces of half a MiB: so of some huge pages a quarter could be saved, of
others half. Each way merges two guests started anew until nothing more is found, and is gone
while they are measured: what counts is how their memory is mapped then. They are measured one
after the other, while the other stands still. Speed is reads a second of QEMU's own CPU time,
so that what else the host does takes none of it away. The ways take turns.

KSM merges whatever is registered on this host: leave it out (`--without-ksm`) where other VMs
run. Where the processor counts (perf, `cpu/` below /sys/bus/event_source/devices) `perf stat -e
dTLB-load-misses` tells more; a virtual machine mostly has no such counters.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.benchmark import ksm
from tests.benchmark.errors import BenchError
from tests.benchmark.gauge import Gauge
from tests.benchmark.guests import huge_pages_by_advice, own_store_dir, sweep
from tests.benchmark.proc_fields import read_kib
from tests.benchmark.turns import medians, write_json
from tests.harness.kernel import huge_bytes, inside, ram_areas
from tests.harness.monitor import qmp
from tests.harness.serial import POLL_S, GuestError
from tests.harness.vm import Backend, Vm
from vmdedup.controls import Controls
from vmdedup.deduplicator import Deduplicator
from vmdedup.errors import VmdedupError
from vmdedup.settings import Settings
from vmdedup.units import MIB, PAGE_BYTES

Kind = Literal["bare", "tiny"]
Accel = Literal["tcg", "kvm"]

_HUGE, _SMALL, _KSM = "unmerged, huge pages", "unmerged, 4 KiB pages", "KSM"
WAYS: dict[str, int | None] = {
    _HUGE: None,
    _SMALL: None,
    _KSM: None,
    "vmdedup, density 0": 0,
    "vmdedup, density 192": 192,
    "vmdedup, density 512": 512,
}
"""Each way, and its `huge_page_density` if vmdedup merges."""

_BESIDE_MIB: dict[Kind, int] = {"bare": 16, "tiny": 96}
"""Memory of a guest besides what it reads: its program, or a Linux, and a record of each page."""
_PIECE_PAGES = 128
_READS = re.compile(r"\breads=(\d+)")
_WARM_S = 1.0
_KSM_LIMIT_S = 120.0
_MERGE_LIMIT_S = 120.0


@dataclass(frozen=True)
class Speed:
    """One way with both guests, in one turn."""

    reads_per_cpu_s: float
    saved_mib: float
    huge_pages: int
    mappings: int
    page_tables_kib: int


def turn(way: str, guest: Kind, accel: Accel, mib: int, seconds: float) -> Speed:
    """Start two guests, merge them that way, and measure. Raises BenchError, GuestError."""
    with ExitStack() as exits:
        vms = [exits.enter_context(_guest(way, guest, accel, mib, seed)) for seed in (1, 2)]
        for vm in vms:
            vm.wait_ready()
        areas = [ram_areas(vm.pid, [vm.backends[0].mib])[0] for vm in vms]
        gauge = Gauge(vms, own_store_dir())
        held_pages = gauge.held_pages()
        density = WAYS[way]
        if way == _KSM:
            exits.enter_context(_merged_by_ksm(vms))
        elif density is not None:
            _merge_by_vmdedup(exits, vms, density)
        saved_pages = held_pages - gauge.held_pages()
        sums = [vm.sum() for vm in vms]
        speeds = [_speed(vm, other, seconds) for vm, other in (vms, vms[::-1])]
        if [vm.sum() for vm in vms] != sums:
            raise BenchError(f"{way}: a guest's memory has changed")
        each = list(zip(vms, areas, strict=True))
        return Speed(
            statistics.mean(speeds),
            saved_pages * PAGE_BYTES / MIB,
            sum(huge_bytes(vm.pid, area) for vm, area in each) // (2 * MIB),
            sum(len(inside(vm.pid, area)) for vm, area in each),
            sum(read_kib(Path(f"/proc/{vm.pid}/status"), "VmPTE") for vm in vms),
        )


def _guest(way: str, guest: Kind, accel: Accel, mib: int, seed: int) -> Vm:
    return Vm(
        guest,
        name=f"roam-{seed}",
        accel=accel,
        machine="pc,mem-merge=off",
        backend=Backend("ram", share=False, mib=mib + _BESIDE_MIB[guest]),
        parameters={
            "mib": mib,
            "seed": seed,
            "shared_mib": mib // 4,
            "repeat_mib": 0,
            "zero_mib": mib // 8,
            "run_pages": _PIECE_PAGES,
            "hold": 1,
            "check_per_s": 0,
            "roam": 1,
        },
        thp=way != _SMALL,
    )


def _merge_by_vmdedup(exits: ExitStack, vms: list[Vm], density: int) -> None:
    """Merge, and leave."""
    exits.callback(shutil.rmtree, own_store_dir(), ignore_errors=True)
    settings = Settings(
        runtime_dir=vms[0].directories.run / "engine",
        store_dir=own_store_dir(),
        controls=Controls(huge_page_density=density),
    )
    with Deduplicator(settings) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        report = dedup.run(until_converged=True, timeout_s=_MERGE_LIMIT_S)
    if not report.converged:
        raise BenchError(f"merging has not ended in {_MERGE_LIMIT_S:.0f} s")


@contextmanager
def _merged_by_ksm(vms: list[Vm]) -> Iterator[None]:
    """Merged by KSM while in the block, which has ended its work then.

    Its counters tell when that is. They lack the zero pages of the huge pages that it splits,
    which the kernel gives back as it splits them (mm/huge_memory.c: RMP_USE_SHARED_ZEROPAGE).
    """
    pids = [vm.pid for vm in vms]
    with ksm.KsmSettings() as kernel, ExitStack() as exits:
        kernel.use({**ksm.FULL_SPEED, "use_zero_pages": "1", "smart_scan": "0"})
        exits.callback(kernel.unmerge)
        kernel.run()
        limit = time.monotonic() + _KSM_LIMIT_S
        saved, scans = -1, ksm.counters().full_scans
        while True:
            time.sleep(_WARM_S)
            now, done = ksm.share_of(pids).saved_pages, ksm.counters().full_scans
            # A Linux guest writes a few pages of its own all the time.
            is_same = abs(now - saved) <= saved // 200
            if is_same and done >= scans + 2:
                break
            if time.monotonic() > limit:
                raise BenchError(f"KSM has not ended in {_KSM_LIMIT_S:.0f} s")
            if not is_same:
                saved, scans = now, done
        kernel.rest()
        yield


def _speed(vm: Vm, other: Vm, seconds: float) -> float:
    """Reads a second of CPU time of this guest, while the other stands still."""
    qmp(other.test_qmp_path, "stop")
    try:
        time.sleep(_WARM_S)
        reads, cpu_s = _next_count(vm)
        time.sleep(seconds)
        reads_after, cpu_after_s = _next_count(vm)
    finally:
        qmp(other.test_qmp_path, "cont")
    return (reads_after - reads) / (cpu_after_s - cpu_s)


def _next_count(vm: Vm) -> tuple[int, float]:
    """The guest's count of reads and QEMU's CPU seconds, as the guest has just told it."""
    before, limit = _count(vm), time.monotonic() + _KSM_LIMIT_S
    while (count := _count(vm)) == before:
        if not vm.alive or time.monotonic() > limit:
            raise GuestError(f"{vm.name} tells no reads\n{vm.transcript()}")
        time.sleep(POLL_S)
    return count, _cpu_s(vm.pid)


def _count(vm: Vm) -> int:
    return max((int(count) for count in _READS.findall(vm.serial.text()[-2000:])), default=0)


def _cpu_s(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def table(turns: dict[str, list[Speed]]) -> str:
    """The table of docs/benchmarks.md, by medians, with the range of speeds."""
    base = statistics.median(each.reads_per_cpu_s for each in turns[_HUGE])
    lines = [
        "| | speed | range | ns a read | saved, MiB | huge pages | mappings | page tables, KiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, found in turns.items():
        speeds = [each.reads_per_cpu_s for each in found]
        middle = statistics.median(speeds)
        rest = medians(found, ("saved_mib", "huge_pages", "mappings", "page_tables_kib"))
        lines.append(
            f"| {way} | {middle / base:.2f} | {min(speeds) / base:.2f} to {max(speeds) / base:.2f}"
            f" | {1e9 / middle:.0f} | " + " | ".join(f"{value:,.0f}" for value in rest) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark.huge_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--guest", choices=("bare", "tiny"), default="bare")
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="kvm")
    parser.add_argument("--mib", type=int, default=512, help="that each guest reads (512)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="that each guest is measured (5)")
    parser.add_argument("--without-ksm", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    sweep()
    ways = [way for way in WAYS if way != _KSM or not given.without_ksm]
    found: dict[str, list[Speed]] = {way: [] for way in ways}
    try:
        with huge_pages_by_advice():
            for number in range(given.turns):
                for way, speeds in found.items():
                    speeds.append(turn(way, given.guest, given.accel, given.mib, given.seconds))
                    print(f"turn {number + 1}: {way}: {speeds[-1]}", flush=True)
    except (OSError, VmdedupError, GuestError) as error:
        sys.exit(f"huge_speed: failed: {error}")
    if given.json is not None:
        write_json(given.json, found)
    print(table(found))


if __name__ == "__main__":
    main()
