"""Benchmark: what each second way of doing the same thing gains, on the same guests.

    .venv/bin/python -m tests.benchmark.ways [--turns 7] [--backend ram] [--running] [--json FILE]

Each turn merges four Debian guests once in every variant, and unmerges them again: `all`
uses everything, each other variant masks one way, so that its fallback does the work. The
variants take turns, so that what the host does meanwhile meets all of them. CPU time is the
engine's and the QEMUs', since some of the work is done inside QEMU. Prints medians, and each
variant's ratio to `all`: less than 1.1 means that the way does not earn its lines.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.benchmark.guests import WORKLOADS, BackendKind, Guests
from tests.benchmark.serving import cpu_s
from tests.benchmark.turns import medians, write_json
from vmdedup import Deduplicator, Settings
from vmdedup.units import MIB

VARIANTS: dict[str, tuple[str, ...]] = {
    "all": (),
    "no in-place": ("in-place",),
    "no compiled gates": ("compiled-gates",),
    "no stub": ("stub",),
}


@dataclass(frozen=True)
class Turn:
    """One merge and one unmerge of all guests, in seconds."""

    merge_s: float
    merge_cpu_s: float
    unmerge_s: float
    unmerge_cpu_s: float
    gates: float
    gate_p50_ms: float
    gate_p99_ms: float
    saved_mib: float


def turn(guests: Guests, settings: Settings) -> Turn:
    """Merge the guests as somebody who waits for it would, and unmerge them."""
    with Deduplicator(settings) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in guests.each])
        marks = [_now(guests)]
        report = dedup.run(passes=2)
        marks.append(_now(guests))
        left = dedup.unmerge()
        marks.append(_now(guests))
    assert left.store_removed, left.vms
    (merge, merge_cpu), (unmerge, unmerge_cpu) = (
        (late[0] - soon[0], late[1] - soon[1]) for soon, late in pairwise(marks)
    )
    gate = report.host.gate_ms
    gates = (gate.count, gate.p50 or 0.0, gate.p99 or 0.0)
    return Turn(merge, merge_cpu, unmerge, unmerge_cpu, *gates, report.host.saved_bytes / MIB)


def _now(guests: Guests) -> tuple[float, float]:
    """The time, and the CPU seconds of this process and of all QEMUs."""
    return time.monotonic(), time.process_time() + cpu_s(guests.pids)


def measure(
    turns: int, backend: BackendKind, mib: int, *, is_frozen: bool
) -> dict[str, list[Turn]]:
    """All turns by variant, alternating; one before them warms up and is not counted."""
    found: dict[str, list[Turn]] = {variant: [] for variant in VARIANTS}
    with ExitStack() as exits:
        runtime = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="ways-")))
        store = exits.enter_context(
            tempfile.TemporaryDirectory(prefix="vmdedup-ways-", dir="/dev/shm")
        )
        guests = exits.enter_context(
            Guests(WORKLOADS, backend, mib, lambda line: print(line, flush=True))
        )
        time.sleep(_SETTLE_S)
        if is_frozen:
            exits.enter_context(guests.frozen())

        def settings(mask: tuple[str, ...]) -> Settings:
            places = {"runtime_dir": runtime, "store_dir": Path(store) / "stores"}
            return Settings.model_validate({**places, "mask": mask})

        turn(guests, settings(()))
        for _ in range(turns):
            for variant, mask in VARIANTS.items():
                found[variant].append(turn(guests, settings(mask)))
    return found


_SETTLE_S = 10


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="What each second way gains.")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--mib", type=int, default=384)
    parser.add_argument("--backend", choices=("ram", "memfd"), default="ram")
    parser.add_argument("--running", action="store_true", help="do not freeze the guests")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    how = (arguments.turns, arguments.backend, arguments.mib)
    found = measure(*how, is_frozen=not arguments.running)
    names = list(Turn.__dataclass_fields__)
    middle = {variant: medians(turns, names) for variant, turns in found.items()}
    print(f"{'':18}" + "".join(f"{name:>22}" for name in names))
    for variant, row in middle.items():
        ratios = [value / (base or 1) for value, base in zip(row, middle["all"], strict=True)]
        cells = (f"{value:.3f} ({ratio:.2f})" for value, ratio in zip(row, ratios, strict=True))
        print(f"{variant:18}" + "".join(f"{cell:>22}" for cell in cells))
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
