"""Benchmark: what it would bring to place merged memory in huge pages.

    .venv/bin/python -m tests.benchmark.placement [--mib 512] [--turns 5] [--json FILE]

Maps the same amount of memory in each way that merged pages are mapped, or could be, into this
process, and reads one word after another anywhere in it (chase.c). Prints what a read takes,
the page tables, and the memory that one byte takes which is then written to each huge page.
Needs gcc, and a kernel that gives huge pages where they are asked for.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmark.errors import BenchError
from tests.benchmark.proc_fields import read_kib
from tests.benchmark.turns import medians, write_json
from vmdedup.linux import mman
from vmdedup.units import HUGE_PAGE_BYTES, MIB, PAGE_BYTES

_SOURCE = Path(__file__).with_name("chase.c")
_READS = 20_000_000
_FILLING = 0x5A
_MADV_POPULATE_READ = 22
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True)
class Placed:
    """One way of mapping memory."""

    ns_a_read: float
    huge_mib: int
    """Memory mapped as huge pages; the huge zero page does not count."""
    page_tables_kib: int
    written_kib: float
    """Memory that one byte takes which is written to a huge page, or to 2 MiB of others."""


class Memory:
    """Address space for all ways, one after the other, at a multiple of 2 MiB."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE
        room = _mmap(0, size_bytes + HUGE_PAGE_BYTES, flags, -1)
        self.address = -(-room // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES

    def map(self, flags: int, fd: int, *advices: int) -> None:
        """Map all of it anew, and advise. Raises OSError."""
        _mmap(self.address, self.size_bytes, flags | mman.MAP_FIXED, fd)
        for advice in advices:
            if _libc.madvise(self.address, self.size_bytes, advice):
                raise OSError(ctypes.get_errno(), f"madvise {advice}")

    def fill(self) -> None:
        """Write to all of it."""
        ctypes.memset(self.address, _FILLING, self.size_bytes)


def _mmap(address: int, size_bytes: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size_bytes, mman.PROT_READ_WRITE, flags, fd, 0)
    if found == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    return int(found)


def _anonymous(memory: Memory, advice: int) -> None:
    memory.map(mman.MAP_PRIVATE | mman.MAP_ANONYMOUS, -1, advice)
    memory.fill()


def _zeroes(memory: Memory) -> None:
    """As merged zero pages are mapped."""
    fd = os.open("/dev/zero", os.O_RDWR)
    memory.map(mman.MAP_PRIVATE | mman.MAP_STACK, fd, mman.MADV_NOHUGEPAGE, _MADV_POPULATE_READ)
    os.close(fd)


def _huge_zeroes(memory: Memory) -> None:
    flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
    memory.map(flags, -1, mman.MADV_HUGEPAGE, _MADV_POPULATE_READ)


def _store(memory: Memory, *advices: int) -> None:
    """As published pages are mapped: a tmpfs file, privately."""
    fd = os.memfd_create("placement")
    os.ftruncate(fd, memory.size_bytes)
    memory.map(mman.MAP_SHARED, fd)
    memory.fill()
    memory.map(mman.MAP_PRIVATE, fd, *advices)
    os.close(fd)


WAYS: dict[str, Callable[[Memory], None]] = {
    "own memory, huge pages": lambda memory: _anonymous(memory, mman.MADV_HUGEPAGE),
    "own memory": lambda memory: _anonymous(memory, mman.MADV_NOHUGEPAGE),
    "store": lambda memory: _store(memory, mman.MADV_NOHUGEPAGE, _MADV_POPULATE_READ),
    "store, huge pages": lambda memory: _store(memory, mman.MADV_HUGEPAGE, mman.MADV_COLLAPSE),
    "zeroes": _zeroes,
    "zeroes, huge zero page": _huge_zeroes,
}


@contextmanager
def chaser() -> Iterator[Callable[[int, int, int], int]]:
    """chase.c, compiled: (address, pages, reads). Raises CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix="placement-") as directory:
        library = Path(directory) / "chase.so"
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True)
        chase = ctypes.CDLL(str(library)).chase
        chase.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
        chase.restype = ctypes.c_uint64
        yield chase


def measure(memory: Memory, way: str, chase: Callable[[int, int, int], int]) -> Placed:
    """Map it in this way, and measure."""
    before_kib = _status_kib("VmPTE")
    WAYS[way](memory)
    tables_kib = _status_kib("VmPTE") - before_kib
    huge_kib = sum(_smaps_kib(name) for name in ("AnonHugePages", "ShmemPmdMapped"))
    began_s = time.thread_time()
    chase(memory.address, memory.size_bytes // PAGE_BYTES, _READS)
    took_s = time.thread_time() - began_s
    anonymous_kib = _smaps_kib("Anonymous")
    blocks = range(memory.address, memory.address + memory.size_bytes, HUGE_PAGE_BYTES)
    for address in blocks:
        ctypes.memset(address, 1, 1)
    written_kib = (_smaps_kib("Anonymous") - anonymous_kib) / len(blocks)
    # Back to nothing, as it was before.
    memory.map(mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE, -1)
    return Placed(took_s / _READS * 1e9, huge_kib // 1024, tables_kib, written_kib)


def _smaps_kib(name: str) -> int:
    return read_kib(Path("/proc/self/smaps_rollup"), name)


def _status_kib(name: str) -> int:
    return read_kib(Path("/proc/self/status"), name)


def table(turns: dict[str, list[Placed]]) -> str:
    """The table of docs/benchmarks.md, by medians."""
    lines = [
        "| | ns a read | in huge pages, MiB | page tables, KiB | a written byte takes, KiB |",
        "|---|---|---|---|---|",
    ]
    for way, found in turns.items():
        ns, *rest = medians(found, Placed.__dataclass_fields__)
        lines.append(
            f"| {way} | {ns:.1f} | " + " | ".join(f"{value:,.0f}" for value in rest) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark.placement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=512, help="memory of each way (512)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    found: dict[str, list[Placed]] = {way: [] for way in WAYS}
    try:
        memory = Memory(given.mib * MIB)
        with chaser() as chase:
            for _ in range(given.turns):
                for way, placed in found.items():
                    placed.append(measure(memory, way, chase))
    except (OSError, subprocess.CalledProcessError, BenchError) as error:
        sys.exit(f"placement: failed: {error}")
    if given.json is not None:
        write_json(given.json, found)
    print(table(found))


if __name__ == "__main__":
    main()
