"""Benchmark of the live merge on four tiny guests; prints a table, and JSON with --json.

    .venv/bin/python -m tests.benchmark.live_merge [--vms 4] [--mib 24] [--json FILE]

Figures, each measured here and now:
- saved pages against the exact bound, computed from the guests' frozen RAM: pages
  present less distinct non-zero contents;
- digesting of present memory, GiB/s, median of five looks;
- gates and drains by how long a gate should last, guests running;
- the engine's PSS while it merges, as a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tests.harness.vm import Backend, Vm
from vmdedup import Deduplicator, Settings
from vmdedup.attach.discover import attach_all
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.core.digest import zero_digest
from vmdedup.linux.smaps import process_pss_bytes
from vmdedup.units import MIB, PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

GATE_TARGETS_MS = (0.25, 0.5, 1.0, 2.0, 4.0)
SEED = 1
BACKENDS = (
    Backend("memfd", share=True),
    Backend("ram", share=False),
    Backend("file", share=True),
    Backend("memfd", share=False),
)


def attached_of(exits: ExitStack, vms: list[Vm], settings: Settings) -> list[AttachedVm]:
    loop = exits.enter_context(MonitorLoop())
    found = attach_all([str(vm.qmp_path) for vm in vms], loop)
    attached_vms = [AttachedVm(attachment, settings, refuse=False) for attachment in found.attached]
    for attached_vm in attached_vms:
        exits.callback(attached_vm.close)
    return attached_vms


def exact_bound(vms: list[Vm], settings: Settings) -> dict[str, int]:
    """Present, distinct and savable pages of frozen guests, by reading everything."""
    digests = []
    with ExitStack() as exits:
        for vm in attached_of(exits, vms, settings):
            every_page = np.arange(vm.space.pages)
            page = np.flatnonzero(vm.scan.readable(vm.scan.refresh(), every_page))
            digests.append(vm.scan.digests(page, SEED))
    everything = np.concatenate(digests)
    nonzero = everything[everything != np.uint64(zero_digest(SEED))]
    distinct = len(np.unique(nonzero))
    return {
        "present_pages": len(everything),
        "distinct_pages": distinct,
        "savable_pages": len(everything) - distinct,
    }


def digest_gib_per_s(vms: list[Vm], settings: Settings) -> float:
    rates = []
    with ExitStack() as exits:
        for vm in attached_of(exits, vms, settings):
            vm.scan.refresh()
            for _ in range(5):
                page = vm.scan.pages_to_look(smart=False, follow=False, everywhere=True)
                began = time.monotonic()
                vm.scan.look(page, SEED)
                rates.append(len(page) * PAGE_BYTES / 2**30 / (time.monotonic() - began))
    return statistics.median(rates)


def merged_pages(vms: list[Vm], settings: Settings) -> tuple[int, float]:
    """Pages saved on frozen guests and the seconds it took; unmerged again afterwards."""
    with Deduplicator(settings) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        began = time.monotonic()
        report = dedup.run(until_converged=True)
        seconds = time.monotonic() - began
        dedup.unmerge()
    return report.host.saved_bytes // PAGE_BYTES, seconds


def gates(vms: list[Vm], settings: Settings, target_ms: float) -> dict[str, Any]:
    chosen = settings.model_copy(update={"gate_target_ms": target_ms})
    with Deduplicator(chosen) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        report = dedup.run(until_converged=True)
        dedup.unmerge()
    host = report.host
    return {
        "gate_target_ms": target_ms,
        "gate_ms": host.gate_ms.model_dump(),
        "drain_ms": host.drain_ms.model_dump(),
        "stopped_ms": host.stopped_ms,
    }


def engine_pss(vms: list[Vm], settings: Settings) -> dict[str, float]:
    """PSS of a `vmdedup run` process after its third pass, and its columns' share."""
    command = [str(Path(sys.executable).with_name("vmdedup")), "run"]
    command += [word for vm in vms for word in ("--qmp", str(vm.qmp_path))]
    environment = {
        "PATH": "/usr/bin:/bin",
        "VMDEDUP_RUNTIME_DIR": str(settings.runtime_dir),
        "VMDEDUP_STORE_DIR": str(settings.store_dir),
        "VMDEDUP_STATE_DIR": str(settings.runtime_dir / "state"),
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as engine:
        try:
            most = 0
            for _ in range(16):
                time.sleep(0.5)
                most = max(most, process_pss_bytes(engine.pid))
        finally:
            engine.terminate()
            engine.wait()
    pages = sum(backend.mib for vm in vms for backend in vm.backends) * MIB // PAGE_BYTES
    with Deduplicator(settings) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        dedup.unmerge()
    return {
        "engine_pss_mib": round(most / MIB, 1),
        "allowed_mib": round(64 + 24 * pages / MIB, 1),
    }


def measure(count: int, mib: int) -> dict[str, Any]:
    with ExitStack() as exits:
        runtime = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        store = exits.enter_context(
            tempfile.TemporaryDirectory(prefix="vmdedup-benchmark-", dir="/dev/shm")
        )
        settings = Settings(runtime_dir=runtime, store_dir=Path(store) / "stores")
        vms = [
            exits.enter_context(
                Vm(
                    name=f"guest{number}",
                    backend=BACKENDS[number % len(BACKENDS)],
                    parameters={"mib": mib},
                )
            )
            for number in range(count)
        ]
        for vm in vms:
            vm.wait_ready()
        for vm in vms:
            vm.hold()
        bound = exact_bound(vms, settings)
        speed = digest_gib_per_s(vms, settings)
        saved, seconds = merged_pages(vms, settings)
        for vm in vms:
            vm.go()
        batches = [gates(vms, settings, target_ms) for target_ms in GATE_TARGETS_MS]
        memory = engine_pss(vms, settings)
        return {
            **bound,
            "saved_pages": saved,
            "saved_vs_bound": round(saved / bound["savable_pages"], 4),
            "converged_s": round(seconds, 2),
            "digest_gib_per_s": round(speed, 2),
            "batches": batches,
            **memory,
            "guest_errors": sum(vm.errors for vm in vms),
        }


def show(result: dict[str, Any]) -> None:
    print(
        f"saved {result['saved_pages']:,} of {result['savable_pages']:,} savable pages"
        f" ({result['saved_vs_bound']:.2%}) in {result['converged_s']} s;"
        f" digest {result['digest_gib_per_s']} GiB/s;"
        f" engine PSS {result['engine_pss_mib']} MiB (allowed {result['allowed_mib']});"
        f" guest errors {result['guest_errors']}"
    )
    print("target ms | gates   p50   p95   p99   max ms | drains  p50   max ms | stopped ms")
    for batch in result["batches"]:
        gate, drain = batch["gate_ms"], batch["drain_ms"]
        print(
            f"{batch['gate_target_ms']:9} |"
            f" {gate['count']:5} {gate['p50']:5.2f} {gate['p95']:5.2f}"
            f" {gate['p99']:5.2f} {gate['max']:5.2f}    |"
            f" {drain['count']:5} {drain['p50']:5.2f} {drain['max']:5.2f}    |"
            f" {batch['stopped_ms']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vms", type=int, default=4)
    parser.add_argument("--mib", type=int, default=24, help="worker memory of each guest")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    result = measure(arguments.vms, arguments.mib)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
