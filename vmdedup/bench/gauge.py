"""Memory and processor time of guests and of who merges them, by the kernel's word.

Owns the measuring that is the same for all contenders. Promises to count pages by
the frames behind them, and never to ask a contender what it has saved. Reads only.

What a fleet *holds* is counted in frames: of private RAM the distinct frames of its
page tables, of a RAM file what the file occupies and what QEMU has instead of it;
and everything in vmdedup's stores. The kernel's zero page is no frame of anybody.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from vmdedup.bench.guests import BenchError, Guest
from vmdedup.linux.maps import read_maps
from vmdedup.linux.pagemap import ENTRY_FILE, ENTRY_PRESENT, Pagemap, zero_page_frame
from vmdedup.linux.sparse_file import data_segments
from vmdedup.units import BLOCK_BYTES, MIB, PAGE_BYTES

_PFN = np.uint64((1 << 55) - 1)
_SAMPLE_S = 0.01
_STATUS = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


def process_cpu_s(pid: int) -> float:
    """Processor time of a process, its ended threads included; 0 when it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3): CPUCLOCK_SCHED
    except OSError:
        return 0.0


def thread_cpu_s(pid: int, tid: int) -> float:
    """Processor time of one thread; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0


def descendants(pid: int) -> list[int]:
    """Processes that come from `pid`, without itself."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


@dataclass(frozen=True)
class Ram:
    """A guest's RAM: where it lies in QEMU, and its file where it has one."""

    name: str
    pid: int
    start: int
    pages: int
    file: Path | None


def find_ram(guest: Guest) -> Ram:
    """The RAM of a guest of ours; right only before anything was remapped. BenchError."""
    size = guest.spec.mib * MIB
    name, pid = guest.spec.name, guest.pid
    maps = read_maps(name, pid)
    rows = np.flatnonzero(maps.end - maps.start == np.uint64(size))
    if len(rows) != 1:
        raise BenchError(f"guest {name}: its RAM was not found among QEMU's mappings")
    vma = maps.row(int(rows[0]))
    file = None
    if guest.spec.backend == "memfd":
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            found = fd.stat()
            if stat.S_ISREG(found.st_mode) and found.st_ino == vma.inode:
                file = fd
        if file is None:
            raise BenchError(f"guest {name}: QEMU has no descriptor of its RAM file")
    return Ram(name, pid, vma.start, size // PAGE_BYTES, file)


@dataclass(frozen=True)
class Kernel:
    """Memory that the kernel uses for the guests' mappings."""

    page_table_bytes: int
    vmas: int


@dataclass(frozen=True)
class Population:
    """Which pages of each guest are there: a mask over its RAM."""

    pages: list[npt.NDArray[np.bool_]]


class Gauge:
    """Measures one fleet; `store_dir` is where vmdedup's stores would be."""

    def __init__(self, guests: Sequence[Guest], store_dir: Path) -> None:
        self.rams = [find_ram(guest) for guest in guests]
        self._store_dir = store_dir

    def held_pages(self) -> int:
        """Frames that the fleet holds, counted one by one."""
        frames = [self._anonymous_frames(ram) for ram in self.rams]
        return len(np.unique(np.concatenate(frames))) + self._file_pages()

    def held_pages_soon(self) -> int:
        """`held_pages` but for a constant, in a fraction of a millisecond.

        By the kernel's running totals. Right for whoever frees what he merges; pages
        that KSM merges stay in these totals.
        """
        anonymous = sum(_status(ram.pid)["RssAnon"] for ram in self.rams)
        return anonymous // PAGE_BYTES + self._file_pages()

    def pss_bytes(self) -> int:
        """Proportional set size of all QEMUs outside the stores, and all of the stores."""
        mapped = sum(_pss_outside(ram.pid, str(self._store_dir)) for ram in self.rams)
        return mapped + self._store_pages() * PAGE_BYTES

    def kernel(self) -> Kernel:
        """What the kernel needs for the guests' address spaces."""
        tables = sum(_status(ram.pid)["VmPTE"] for ram in self.rams)
        vmas = 0
        for ram in self.rams:
            with open(f"/proc/{ram.pid}/maps", "rb") as file:
                vmas += file.read().count(b"\n")
        return Kernel(tables, vmas)

    def populated(self) -> Population:
        """Which pages the frozen guests have, to have them again later."""
        return Population([_populated(ram) for ram in self.rams])

    def populate(self, population: Population) -> None:
        """Give the frozen, unmerged guests what they had: a zero page where one is missing.

        Unmerging leaves zero pages absent; the next contender should meet them too.
        SAFETY: a missing page of RAM reads as zero, and one zero byte is written to it, so
        no guest sees a difference; a kill right here leaves some pages absent.
        """
        for ram, wanted in zip(self.rams, population.pages, strict=True):
            missing = np.flatnonzero(wanted & ~_populated(ram))
            _write_zeros(ram, missing)

    def _anonymous_frames(self, ram: Ram) -> npt.NDArray[np.uint64]:
        with Pagemap(ram.name, ram.pid) as pagemap:
            entries = pagemap.entries(ram.start, ram.pages)
        mine = entries[((entries & ENTRY_PRESENT) != 0) & ((entries & ENTRY_FILE) == 0)] & _PFN
        return np.unique(mine[mine != np.uint64(zero_page_frame())])

    def _file_pages(self) -> int:
        files = [ram.file for ram in self.rams if ram.file is not None]
        blocks = sum(file.stat().st_blocks for file in files)
        return blocks * BLOCK_BYTES // PAGE_BYTES + self._store_pages()

    def _store_pages(self) -> int:
        if not self._store_dir.exists():
            return 0
        stores = [path for path in self._store_dir.iterdir() if path.suffix == ".store"]
        return sum(path.stat().st_blocks for path in stores) * BLOCK_BYTES // PAGE_BYTES


def _populated(ram: Ram) -> npt.NDArray[np.bool_]:
    if ram.file is None:
        with Pagemap(ram.name, ram.pid) as pagemap:
            entries = pagemap.entries(ram.start, ram.pages)
        present = (entries & ENTRY_PRESENT) != 0
        return np.asarray(present & ((entries & _PFN) != np.uint64(zero_page_frame())))
    mask = np.zeros(ram.pages, dtype=np.bool_)
    fd = os.open(ram.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in data_segments(fd, ram.pages * PAGE_BYTES):
            mask[start // PAGE_BYTES : end // PAGE_BYTES] = True
    finally:
        os.close(fd)
    return mask


def _write_zeros(ram: Ram, page: npt.NDArray[np.int64]) -> None:
    # Through QEMU's mapping, also where there is a RAM file: a page that is only in the
    # file is not in QEMU's page tables.
    fd = os.open(f"/proc/{ram.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        for index in page.tolist():
            os.pwrite(fd, b"\0", ram.start + index * PAGE_BYTES)
    finally:
        os.close(fd)


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes. BenchError when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError as error:
        raise BenchError(f"a guest ended (pid {pid})") from error
    return {name: int(kib) * 1024 for name, kib in _STATUS.findall(text)}


def _pss_outside(pid: int, directory: str) -> int:
    total, counts = 0, True
    head = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if head.match(line):
                counts = directory not in line
            elif counts and line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def pss_bytes_of(pids: Collection[int]) -> int:
    """Proportional set size of these processes; those that are gone count nothing."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(pss) for pss in re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)) * 1024
    return total


@dataclass(frozen=True)
class Sample:
    """One moment of a merge, counted from its begin."""

    wall_s: float
    cpu_s: float
    saved_pages: int


class Recorder:
    """Samples a merge until `close`; a context manager. One thread."""

    def __init__(self, saved_pages: Callable[[], int], cpu_s: Callable[[], float]) -> None:
        self.samples: list[Sample] = []
        self._saved_pages = saved_pages
        self._cpu_s = cpu_s
        self._end = threading.Event()
        self._failure: Exception | None = None
        self._began_s = time.monotonic()
        self._cpu_before_s = cpu_s()
        self._take()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    @property
    def elapsed_s(self) -> float:
        """Since the begin."""
        return time.monotonic() - self._began_s

    @property
    def saved_pages(self) -> int:
        """At the latest sample."""
        return self.samples[-1].saved_pages

    def gained_since(self, wall_s: float) -> int:
        """Pages saved more than at that moment."""
        before = [sample for sample in self.samples if sample.wall_s <= wall_s]
        return self.saved_pages - (before[-1] if before else self.samples[0]).saved_pages

    def _take(self) -> None:
        saved = self._saved_pages()
        cpu_s = self._cpu_s() - self._cpu_before_s
        self.samples.append(Sample(time.monotonic() - self._began_s, cpu_s, saved))

    def _record(self) -> None:
        try:
            while not self._end.wait(_SAMPLE_S):
                self._take()
        except Exception as error:  # handed to the thread that closes
            self._failure = error


def moment(samples: Sequence[Sample], pages: float) -> Sample | None:
    """The first sample with so many pages saved, None if it never came to that."""
    return next((sample for sample in samples if sample.saved_pages >= pages), None)
