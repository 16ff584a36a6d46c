"""The core alone, on synthetic digests: how it grows with the number of pages.

Owns made-up VMs whose digests follow from VM and page number, so that nothing but
the core's own columns takes memory. The mix: 60 percent zero pages, 20 percent equal in
all VMs, 10 percent repeated within a VM, 10 percent unique, in runs of 32 pages; 2
percent change from pass to pass, in runs of 8. Each size runs in a process of its own,
so that its peak is its own. Promises to call the core as the engine does; reading and
remapping are not part of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tests.benchmark.errors import BenchError
from tests.harness.images import REPOSITORY
from vmdedup.core import scan
from vmdedup.core.agenda import Agenda
from vmdedup.core.news import News
from vmdedup.core.nominate import VmView, nominate
from vmdedup.core.plan import vma_count
from vmdedup.core.rmap import FIRST_SLOT, OWN, PageColumns
from vmdedup.core.sharers import Sharers
from vmdedup.core.smart_scan import ScanAges
from vmdedup.core.stable_tree import StableTree
from vmdedup.models import Model
from vmdedup.units import PAGE_BYTES

SIZES = (1 << 20, 1 << 22, 1 << 24, 1 << 26)
CHANGING = (0.0, 0.002, 0.02)
"""Shares of the pages written between two passes."""

_VMS = 16
_LOOK_PAGES = 1 << 13
"""Whose digests the engine notes at once."""
_RUN_PAGES = 32
_CHANGED_RUN_PAGES = 8
_NO_BUDGET = 1 << 31
_MOST_SHARING = 256
"""max_page_sharing's default."""
_STARTS = np.zeros(1, dtype=np.int64)
_NOTHING = np.empty(0, dtype=np.int64)
_ZERO_DIGEST = 0x9B1D_0E3A_5C7F_2468
_TEBIBYTE_PAGES = (1 << 40) // PAGE_BYTES
_FIRST, _SECOND, _THIRD = 6, 8, 9
"""Of ten: below the first zero, then equal in all VMs, then repeated, then unique."""

U64 = NDArray[np.uint64]
Pages = NDArray[np.int64]


class SteadyPass(Model):
    """A pass after some pages were written, and the next, in which they have held still."""

    changed_pages: int
    ms: float
    ns_per_changed_page: float | None


class Size(Model):
    """The core on so many pages."""

    pages: int
    vms: int
    first_pass_ns_per_page: float = Field(description="two looks, trees, plan, a quiet pass")
    columns_bytes_per_page: float
    peak_bytes_per_page: float
    merged_pages: int
    new_store_pages: int
    vmas: int = Field(description="that the whole plan takes, over all VMs")
    steady: list[SteadyPass]


class Tebibyte(Model):
    """A host of 1 TiB by extrapolation from the largest size."""

    first_pass_s: float
    steady_pass_s: float = Field(description="2% changing")
    peak_bytes: int
    vmas: int
    vmas_per_vm_of_16_gib: int


class Growth(Model):
    """All sizes, and how they compare."""

    sizes: list[Size]
    time_ratio: float = Field(description="per page, the largest size to the smallest")
    tebibyte: Tebibyte


class _Vm:
    """What is kept of one VM, all in one region."""

    def __init__(self, number: int, pages: int) -> None:
        self.number = number
        self.columns = PageColumns(pages)
        self.ages = ScanAges(pages)
        self.agenda = Agenda(self.columns, self.ages)
        self.vmas = 1


class _Host:
    """All VMs, in one trust domain."""

    def __init__(self, pages: int) -> None:
        self.vms = [_Vm(number, pages // _VMS) for number in range(_VMS)]
        columns = [vm.columns for vm in self.vms]
        self.tree = StableTree()
        self.news = News(columns)
        self.sharers = Sharers(columns)


def simulate(sizes: Sequence[int], tell: Callable[[str], None]) -> Growth:
    """Run every size in a process of its own. Raises BenchError."""
    done = []
    for pages in sizes:
        tell(f"{pages:,} pages ({pages * PAGE_BYTES >> 30} GiB)")
        command = [sys.executable, "-m", __name__, str(pages)]
        ran = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY)
        if ran.returncode != 0:
            said = ran.stderr.strip().splitlines()[-1:] or [f"exit code {ran.returncode}"]
            raise BenchError(f"simulating {pages:,} pages: {said[0]}")
        done.append(Size.model_validate_json(ran.stdout))
    first, last = done[0], done[-1]
    times = _TEBIBYTE_PAGES / last.pages
    return Growth(
        sizes=done,
        time_ratio=last.first_pass_ns_per_page / first.first_pass_ns_per_page,
        tebibyte=Tebibyte(
            first_pass_s=last.first_pass_ns_per_page * _TEBIBYTE_PAGES / 1e9,
            steady_pass_s=last.steady[-1].ms * times / 1000,
            peak_bytes=int(last.peak_bytes_per_page * _TEBIBYTE_PAGES),
            vmas=int(last.vmas * times),
            vmas_per_vm_of_16_gib=int(last.vmas * times / (1 << 40) * (16 << 30)),
        ),
    )


def run_size(pages: int) -> Size:
    """One size, in this process."""
    base_bytes = _peak_bytes()
    host = _Host(pages)
    began = time.process_time()
    made_s = 0.0
    for _ in range(2):
        for vm in host.vms:
            made_s += _look(vm, np.arange(len(vm.columns)), written=None, generation=0)
    _merge_all(host)
    made_s += _round(host, [_NOTHING] * _VMS, 0)
    first_s = time.process_time() - began - made_s
    vmas = sum(vm.vmas for vm in host.vms)
    merged = sum(int(np.count_nonzero(vm.columns.shared())) for vm in host.vms)
    store_pages = len(host.tree)
    steady = [_steady(host, share, turn) for turn, share in enumerate(CHANGING)]
    columns = sum(vm.columns.memory_bytes + vm.ages.memory_bytes for vm in host.vms)
    return Size(
        pages=pages,
        vms=_VMS,
        first_pass_ns_per_page=first_s * 1e9 / pages,
        columns_bytes_per_page=columns / pages,
        peak_bytes_per_page=(_peak_bytes() - base_bytes) / pages,
        merged_pages=merged,
        new_store_pages=store_pages,
        vmas=vmas,
        steady=steady,
    )


def _steady(host: _Host, share: float, turn: int) -> SteadyPass:
    """One pass after `share` of the pages was written, and one in which that held still."""
    written = [_written(len(vm.columns), share, turn) for vm in host.vms]
    began = time.process_time()
    made_s = _round(host, written, turn + 1)
    made_s += _round(host, [_NOTHING] * _VMS, turn + 1)
    passed_s = time.process_time() - began - made_s
    changed = sum(len(page) for page in written)
    return SteadyPass(
        changed_pages=changed,
        ms=passed_s * 1000,
        ns_per_changed_page=passed_s * 1e9 / changed if changed else None,
    )


def _round(host: _Host, written: Sequence[Pages], generation: int) -> float:
    """Look at what was written, merge what is new; the seconds that making digests took."""
    made_s = 0.0
    for vm, new in zip(host.vms, written, strict=True):
        scan.mark_broken(vm.columns, new, np.ones(len(new), dtype=np.bool_))
        page = vm.agenda.with_open(new)
        made_s += _look(vm, page, written=new, generation=generation)
    host.news.settle(
        [vm.agenda.take_settled() for vm in host.vms],
        host.tree,
        zero_digest=_ZERO_DIGEST,
        use_zero_pages=True,
        share=True,
    )
    if host.news.pages:
        _merge(host, host.news.take())
    return made_s


def _look(vm: _Vm, page: Pages, *, written: Pages | None, generation: int) -> float:
    """One look at those of the pages that are due; the seconds that making digests took."""
    made_s = 0.0
    due = vm.agenda.due(
        page,
        readable=~vm.columns.shared(page),
        own=vm.columns.slot[page] == OWN,
        written=written,
        missed=np.zeros_like(page),
        smart=True,
    )
    for first in range(0, len(due), _LOOK_PAGES):
        piece = due[first : first + _LOOK_PAGES]
        began = time.process_time()
        digest = _digests(vm.number, piece, generation)
        made_s += time.process_time() - began
        before = vm.columns.flags[piece]
        scan.observe(vm.columns, piece, digest)
        vm.agenda.observed(piece, before)
    return made_s


def _merge_all(host: _Host) -> None:
    """The first time: among all candidates."""
    for vm in host.vms:
        vm.agenda.forget_settled()
    _merge(host, [None] * _VMS)


def _merge(host: _Host, among: Sequence[Pages | None]) -> None:
    """Trees and plan; every page that the plan takes is taken for remapped."""
    next_slot = FIRST_SLOT + len(host.tree)
    nomination = nominate(
        [
            VmView(vm.columns, _STARTS, _NO_BUDGET, vm.vmas, page)
            for vm, page in zip(host.vms, among, strict=True)
        ],
        host.tree,
        zero_digest=_ZERO_DIGEST,
        use_zero_pages=True,
        share=True,
        next_slot=next_slot,
        most_sharing=_MOST_SHARING,
        sharers=host.sharers,
    )
    host.news.nominated(nomination)
    new = nomination.new
    host.tree.insert(new.digest, next_slot + np.arange(len(new), dtype=np.int32))
    for vm, planned in zip(host.vms, nomination.vms, strict=True):
        if len(planned.taken):
            page, slot = planned.taken.page_slots()
            host.sharers.add(slot)
            vm.columns.merge(page, slot)
            vm.vmas = vma_count(vm.columns.slot, _STARTS)
    host.news.merged(nomination)


def _written(pages: int, share: float, turn: int) -> Pages:
    """The pages written in a turn: runs of a few, all over."""
    run = np.arange(pages // _CHANGED_RUN_PAGES, dtype=np.uint64)
    chosen = run[(_mix(run + np.uint64(turn << 40)) >> np.uint64(11)) < np.uint64(share * 2**53)]
    first = chosen.astype(np.int64) * _CHANGED_RUN_PAGES
    return (first[:, None] + np.arange(_CHANGED_RUN_PAGES)).reshape(-1)


def _digests(vm: int, page: Pages, generation: int) -> U64:
    """Digests of a VM's pages; those of a later generation are like no other page's."""
    number = page.astype(np.uint64)
    run = number // np.uint64(_RUN_PAGES)
    kind = _mix(run + np.uint64(0x5EED << 32)) % np.uint64(10)
    own = np.uint64((vm + 1) << 40)
    repeated = own + np.uint64(1 << 39) + number % np.uint64(1 << 12)
    content = np.where(kind < _SECOND, number, np.where(kind < _THIRD, repeated, own + number))
    if generation:
        return _mix(own + number + np.uint64(generation << 50))
    return np.where(kind < _FIRST, np.uint64(_ZERO_DIGEST), _mix(content))


def _mix(value: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _peak_bytes() -> int:
    # Not ru_maxrss: that begins at the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise BenchError("/proc/self/status has no VmHWM, so peak memory cannot be measured")
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(run_size(int(sys.argv[1])).model_dump()))
