"""What VMAs buy and what they cost.

Owns two measurements. `curve`: how much a plan for running guests saves with so many
VMAs a VM; a dry run, nothing is changed. `costs`: kernel memory of a mapping and the
time of a page fault in a process with ever more of them, up to a vm.max_map_count
that is raised for the time of it and put back whatever happens; in a process of its
own, which maps every other page of a memfd as merged RAM would.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from ctypes import CDLL, c_int, c_long, c_size_t, c_void_p, get_errno, memset
from pathlib import Path

import numpy as np
from pydantic import Field

from tests.benchmark.errors import BenchError
from tests.benchmark.restoring import Restoring
from tests.harness.images import REPOSITORY
from vmdedup.models import Model
from vmdedup.settings import Settings
from vmdedup.units import PAGE_BYTES

BUDGETS = (512, 1024, 2048, 4096, 8192, 60_000)
COUNTS = (1_000, 16_000, 65_000, 130_000, 260_000)

_SYSCTL = Path("/proc/sys/vm")
_MAX_MAP_COUNT = "max_map_count"
_SPARE_VMAS = 2_000
_FAULTS = 8_192
_PROT_READ_WRITE = 3
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x02, 0x10, 0x20
_SLABS = ("vm_area_struct", "maple_node")


class BudgetPoint(Model):
    """A plan under one budget."""

    vma_budget: int = Field(description="a VM's, for all of its process")
    vmas: int = Field(description="that guest RAM would take, over all VMs")
    saved_bytes: int
    deferred_pages: int


class VmaCost(Model):
    """A process with so many mappings."""

    vmas: int
    kernel_bytes_per_vma: float | None = Field(description="slab memory; null where not shown")
    page_table_bytes: int
    fault_ns: float = Field(description="first write to a fresh page, elsewhere in the process")
    cow_fault_ns: float = Field(description="first write to a mapped page, in random order")


class VmaCosts(Model):
    """All counts."""

    default_max_map_count: int
    costs: list[VmaCost]


def curve(qmp: Sequence[str], settings: Settings) -> list[BudgetPoint]:
    """Plans for these VMs under growing budgets. Raises VmdedupError."""
    from vmdedup.deduplicator import Deduplicator

    points = []
    for budget in BUDGETS:
        chosen = settings.model_copy(
            update={"controls": settings.controls.model_copy(update={"vma_budget": budget})}
        )
        with Deduplicator(chosen) as dedup:
            dedup.attach(list(qmp), merging=False)
            plan = dedup.plan()
        points.append(
            BudgetPoint(
                vma_budget=budget,
                vmas=sum(vm.vmas_after for vm in plan.vms),
                saved_bytes=plan.saved_bytes,
                deferred_pages=sum(vm.deferred_pages for vm in plan.vms),
            )
        )
    return points


def costs(tell: Callable[[str], None]) -> VmaCosts:
    """Measure every count. Raises BenchError.

    SAFETY: vm.max_map_count is raised for all processes of the host meanwhile, which
    forbids nobody anything; a kill right here has it put back (`restoring`).
    """
    file = _SYSCTL / _MAX_MAP_COUNT
    before = file.read_text().strip()
    most = max(COUNTS) + _SPARE_VMAS
    with Restoring(_SYSCTL, lambda: [f"{_MAX_MAP_COUNT}={file.read_text().strip()}"]):
        if int(before) < most:
            try:
                file.write_text(str(most))
            except OSError as error:
                raise BenchError(f"{file}: {error.strerror} (run as root)") from error
        done = []
        for count in COUNTS:
            tell(f"{count:,} VMAs")
            command = [sys.executable, "-m", __name__, str(count)]
            ran = subprocess.run(
                command, check=False, capture_output=True, text=True, cwd=REPOSITORY
            )
            if ran.returncode != 0:
                said = ran.stderr.strip().splitlines()[-1:] or [f"exit code {ran.returncode}"]
                raise BenchError(f"{count:,} VMAs: {said[0]}")
            done.append(VmaCost.model_validate_json(ran.stdout))
    return VmaCosts(default_max_map_count=int(before), costs=done)


def measure(vmas: int) -> VmaCost:
    """One count, in this process."""
    libc = CDLL(None, use_errno=True)
    libc.mmap.restype = c_void_p
    libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]

    def map_memory(address: int | None, size: int, flags: int, fd: int, offset: int) -> int:
        found = libc.mmap(address, size, _PROT_READ_WRITE, flags, fd, offset)
        if found in (None, c_void_p(-1).value):
            raise OSError(get_errno(), f"mmap: {os.strerror(get_errno())}")
        return int(found)

    pages = vmas // 2  # each splits the memory around it: two mappings a page
    private = _MAP_PRIVATE | _MAP_ANONYMOUS
    slab_bytes_before, table_bytes = _slab_bytes(), _page_table_bytes()
    store = os.memfd_create("vmdedup-bench")
    for first in range(0, pages, 256):
        os.pwrite(store, b"\1" * PAGE_BYTES * min(256, pages - first), first * PAGE_BYTES)
    ram = map_memory(None, 2 * pages * PAGE_BYTES, private, -1, 0)
    for page in range(pages):
        address, offset = ram + 2 * page * PAGE_BYTES, page * PAGE_BYTES
        map_memory(address, PAGE_BYTES, _MAP_PRIVATE | _MAP_FIXED, store, offset)
    slab_bytes = _slab_bytes()
    shown = slab_bytes is not None and slab_bytes_before is not None
    added = (slab_bytes or 0) - (slab_bytes_before or 0)
    fresh = map_memory(None, _FAULTS * PAGE_BYTES, private, -1, 0)
    fault_ns = _write_ns([fresh + page * PAGE_BYTES for page in range(_FAULTS)])
    chosen = np.random.default_rng(1).permutation(pages)[:_FAULTS]
    cow_fault_ns = _write_ns([ram + 2 * page * PAGE_BYTES for page in chosen.tolist()])
    return VmaCost(
        vmas=2 * pages,
        kernel_bytes_per_vma=added / (2 * pages) if shown else None,
        page_table_bytes=_page_table_bytes() - table_bytes,
        fault_ns=fault_ns,
        cow_fault_ns=cow_fault_ns,
    )


def _write_ns(addresses: Sequence[int]) -> float:
    """Nanoseconds of a first write; what the loop takes is measured and taken off."""
    took = []
    for _ in range(2):
        began = time.thread_time_ns()
        for address in addresses:
            memset(address, 2, 1)
        took.append(time.thread_time_ns() - began)
    return (took[0] - took[1]) / len(addresses)


def _slab_bytes() -> int | None:
    """Kernel memory in VMAs and their trees, over all processes."""
    try:
        text = Path("/proc/slabinfo").read_text()
    except OSError:
        return None
    found = [re.search(rf"^{name}\s+(\d+)\s+\d+\s+(\d+)", text, re.MULTILINE) for name in _SLABS]
    return sum(int(match[1]) * int(match[2]) for match in found if match) or None


def _page_table_bytes() -> int:
    match = re.search(r"^VmPTE:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1])).model_dump()))
