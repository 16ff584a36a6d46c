"""What the kernel says about a VM's memory, read by the tests themselves.

Independent of the package: another parser of maps, smaps and pagemap, another
digest, and sets instead of columns. Reads only, and only pages that are
there, since reading an absent shared page would allocate it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
ZERO_CONTENT = blake2b(bytes(PAGE_BYTES), digest_size=16).digest()

_libc = ctypes.CDLL(None)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+) *(.*)")
_PRESENT, _SWAPPED, _FILE = 1 << 63, 1 << 62, 1 << 61
_PFN = (1 << 55) - 1
_MARKER_TYPE = 31
_KPF_COMPOUND_TAIL = 16
_KPF_ZERO_PAGE = 24
_BLOCK_FRAMES = 512
"""No folio of guest RAM reaches over a boundary of so many frames."""


class Vma(NamedTuple):
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def pages(self) -> int:
        return (self.end - self.start) // PAGE_BYTES

    @property
    def is_store(self) -> bool:
        return self.path.endswith(".store")

    @property
    def is_ours(self) -> bool:
        """Whether vmdedup made it, for whatever purpose."""
        return _is_ours(self.path)


def _is_ours(path: str) -> bool:
    return path == "/dev/zero" or "vmdedup" in path


class Area(NamedTuple):
    """Host addresses of one memory backend."""

    start: int
    end: int
    is_shared: bool

    @property
    def pages(self) -> int:
        return (self.end - self.start) // PAGE_BYTES


def mappings(pid: int) -> list[Vma]:
    """/proc/PID/maps as it is now."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        match = _HEAD.match(line)
        assert match is not None, line
        start, end, permissions, offset, device, inode, path = match.groups()
        row = (int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode), path)
        found.append(Vma(*row))
    return found


def ram_areas(pid: int, sizes_mib: Sequence[int]) -> list[Area]:
    """Where backends of these sizes lie; right only before anything was remapped."""
    areas = []
    for size_mib in sizes_mib:
        (found,) = (m for m in mappings(pid) if m.end - m.start == size_mib << 20)
        areas.append(Area(found.start, found.end, found.permissions.endswith("s")))
    return areas


def inside(pid: int, area: Area) -> list[Vma]:
    """The mappings that make up an area now."""
    return [m for m in mappings(pid) if area.start <= m.start < area.end]


def our_pages(pid: int, area: Area) -> int:
    """Pages of an area that vmdedup has mapped."""
    return sum(m.pages for m in inside(pid, area) if m.is_ours)


def vm_flags(pid: int, area: Area, *, ours: bool | None = None) -> set[frozenset[str]]:
    """The different VmFlags in an area: of what vmdedup has mapped, of what it has not, of all."""
    found = _smaps_values(pid, area, "VmFlags", ours=ours)
    return {frozenset(value.split()) for value in found}


def anonymous_bytes(pid: int, area: Area) -> int:
    """`Anonymous:` of smaps: memory that is the VM's alone."""
    return sum(int(value.split()[0]) << 10 for value in _smaps_values(pid, area, "Anonymous"))


def ram_file_bytes(pid: int, area: Area) -> int | None:
    """What the RAM file of an area occupies; None where the VM has no descriptor of it."""
    inodes = {m.inode for m in inside(pid, area) if not m.is_ours}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if (found := fd.stat()).st_ino in inodes and stat.S_ISREG(found.st_mode):
            return found.st_blocks * 512
    return None


def cached_behind_merges(pid: int, area: Area) -> int:
    """Pages of an area's RAM file in memory though a merged page, or a broken one, is there."""
    is_merged = np.zeros(area.pages, dtype=np.bool_)
    for mapping in inside(pid, area):
        first = (mapping.start - area.start) // PAGE_BYTES
        is_merged[first : first + mapping.pages] = mapping.is_ours
    inodes = {m.inode for m in inside(pid, area) if not m.is_ours}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if fd.stat().st_ino in inodes:
            with fd.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                answer = np.zeros(area.pages, dtype=np.uint8)
                seen = np.frombuffer(view, dtype=np.uint8)
                _libc.mincore(seen.ctypes.data, len(view), answer.ctypes.data)
                del seen
            return int(np.count_nonzero(is_merged & (answer & 1 != 0)))
    raise FileNotFoundError("it has no descriptor of its RAM file")


def huge_bytes(pid: int, area: Area) -> int:
    """`AnonHugePages:` of smaps."""
    return sum(int(value.split()[0]) << 10 for value in _smaps_values(pid, area, "AnonHugePages"))


def stranded_pages(pid: int, area: Area) -> int:
    """Pages that large folios of an area keep from the host though no longer mapped there.

    By /proc/kpageflags: a folio, of whatever size, of which only a part is mapped was not split.
    """
    table = PageTable(pid, area)
    blocks: dict[int, list[int]] = {}
    for frame in table.frame[table.anonymous & table.present].tolist():
        blocks.setdefault(frame // _BLOCK_FRAMES, []).append(frame % _BLOCK_FRAMES)
    stranded = 0
    with Path("/proc/kpageflags").open("rb", buffering=0) as file:
        for block, mine in blocks.items():
            raw = os.pread(file.fileno(), _BLOCK_FRAMES * 8, block * _BLOCK_FRAMES * 8)
            flags = np.frombuffer(raw, dtype=np.uint64)
            folio = np.cumsum((flags >> np.uint64(_KPF_COMPOUND_TAIL)) & np.uint64(1) == 0)
            mapped = Counter(folio[mine].tolist())
            sizes = np.bincount(folio)
            stranded += sum(int(sizes[number]) - count for number, count in mapped.items())
    return stranded


def _smaps_values(pid: int, area: Area, name: str, *, ours: bool | None = None) -> Iterator[str]:
    is_inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := _HEAD.match(line):
            is_wanted = ours is None or ours == _is_ours(match[7])
            is_inside = area.start <= int(match[1], 16) < area.end and is_wanted
        elif is_inside and line.startswith(f"{name}:"):
            yield line.partition(":")[2].strip()


class PageTable:
    """The pagemap entries of one area, as they were when this was made."""

    def __init__(self, pid: int, area: Area) -> None:
        with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as file:
            raw = os.pread(file.fileno(), area.pages * 8, area.start // PAGE_BYTES * 8)
        self._entries = np.frombuffer(raw, dtype=np.uint64)
        assert len(self._entries) == area.pages

    def _bit(self, bit: int) -> npt.NDArray[np.bool_]:
        return np.asarray((self._entries & np.uint64(bit)) != 0)

    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        return self._bit(_PRESENT)

    @cached_property
    def anonymous(self) -> npt.NDArray[np.bool_]:
        """Present, no file's page and not the zero page; or really swapped out."""
        marker = (self._entries & np.uint64(0x1F)) == _MARKER_TYPE
        mine = self.present & ~self._bit(_FILE) & ~self.on_zero_page
        return np.asarray(mine | (self._bit(_SWAPPED) & ~marker))

    @cached_property
    def on_zero_page(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.present & np.isin(self.frame, list(_zero_frames(self.frame))))

    @cached_property
    def frame(self) -> npt.NDArray[np.uint64]:
        """Page frame numbers; meaningful where present."""
        return self._entries & np.uint64(_PFN)


_zero_frame: set[int] = set()


def _zero_frames(frames: npt.NDArray[np.uint64]) -> set[int]:
    """The kernel's zero page, once it was met, by /proc/kpageflags."""
    if not _zero_frame:
        common = Counter(frames.tolist()).most_common(3)
        with Path("/proc/kpageflags").open("rb", buffering=0) as file:
            for frame, _ in common:
                flags = int.from_bytes(os.pread(file.fileno(), 8, frame * 8), "little")
                if flags >> _KPF_ZERO_PAGE & 1:
                    _zero_frame.add(frame)
    return _zero_frame


def contents(pid: int, area: Area, which: npt.NDArray[np.bool_]) -> list[bytes]:
    """Digests of the pages of an area that are in `which`, in order."""
    edges = np.flatnonzero(np.diff(which.astype(np.int8), prepend=0, append=0))
    digests = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for first, last in edges.reshape(-1, 2).tolist():
            length = (last - first) * PAGE_BYTES
            raw = os.pread(memory.fileno(), length, area.start + first * PAGE_BYTES)
            assert len(raw) == length
            digests += [
                blake2b(raw[at : at + PAGE_BYTES], digest_size=16).digest()
                for at in range(0, length, PAGE_BYTES)
            ]
    return digests


def read_memory(pid: int, addresses: Sequence[int]) -> list[bytes]:
    """The pages at these addresses."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        return [os.pread(memory.fileno(), PAGE_BYTES, address) for address in addresses]


def write_memory(pid: int, pages: Mapping[int, bytes]) -> None:
    """Write pages of a VM of ours, in place of its guest. Not while a page is protected."""
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for address, content in pages.items():
            assert os.pwrite(memory.fileno(), content, address) == len(content)


@dataclass(frozen=True)
class Snapshot:
    """The pages a VM holds, and what is in them."""

    areas: list[Area]
    held: list[npt.NDArray[np.bool_]]
    contents: list[bytes]


def snapshot(pid: int, areas: list[Area]) -> Snapshot:
    """The content of every page that the VM has: its own ones (of private memory those
    that are anonymous), and those that it shares by now.
    """
    held = []
    for area in areas:
        table = PageTable(pid, area)
        mine = (table.present if area.is_shared else table.anonymous).copy()
        for mapping in inside(pid, area):
            if mapping.is_ours:
                first = (mapping.start - area.start) // PAGE_BYTES
                mine[first : first + mapping.pages] = True
        held.append(mine)
    return Snapshot(areas, held, contents_of(pid, areas, held))


def contents_of(pid: int, areas: list[Area], held: list[npt.NDArray[np.bool_]]) -> list[bytes]:
    """Contents of the given pages now."""
    return [
        content
        for area, which in zip(areas, held, strict=True)
        for content in contents(pid, area, which)
    ]


def most_saved_pages(snapshots: Sequence[Snapshot]) -> int:
    """The exact bound: pages held less distinct contents that are not zero."""
    pages = sum(len(each.contents) for each in snapshots)
    distinct = {content for each in snapshots for content in each.contents} - {ZERO_CONTENT}
    return pages - len(distinct)


class Sharing:
    """Who shares what, from maps and page tables alone; key: VM's name."""

    def __init__(self, vms: dict[str, tuple[int, list[Area]]]) -> None:
        self.sites: dict[str, Counter[tuple[int, int]]] = {}
        """Per VM, how often it maps each (inode, slot) of a store without having broken it."""
        self.zero_pages: dict[str, int] = {}
        self.broken_pages: dict[str, int] = {}
        self._contents: dict[tuple[int, int], bytes] = {}
        """What is in each store page."""
        self.store_frames: set[int] = set()
        """Distinct frames behind the sites that are in a page table."""
        for name, (pid, areas) in vms.items():
            self.sites[name] = Counter()
            self.zero_pages[name] = self.broken_pages[name] = 0
            for area in areas:
                self._add(name, pid, area)

    def _add(self, name: str, pid: int, area: Area) -> None:
        table = PageTable(pid, area)
        for mapping in inside(pid, area):
            first = (mapping.start - area.start) // PAGE_BYTES
            rows = slice(first, first + mapping.pages)
            mine = table.anonymous[rows]
            if mapping.is_store:
                self._add_sites(name, pid, mapping, np.flatnonzero(~mine).tolist())
                self.store_frames.update(table.frame[rows][table.present[rows] & ~mine].tolist())
            elif mapping.path == "/dev/zero":
                self.zero_pages[name] += int(np.count_nonzero(~mine))
            else:
                continue
            self.broken_pages[name] += int(np.count_nonzero(mine))

    def _add_sites(self, name: str, pid: int, mapping: Vma, pages: list[int]) -> None:
        sites = [(mapping.inode, mapping.offset // PAGE_BYTES + page) for page in pages]
        self.sites[name].update(sites)
        new = {
            site: mapping.start + page * PAGE_BYTES
            for site, page in zip(sites, pages, strict=True)
            if site not in self._contents
        }
        self._contents.update(zip(new, read_memory(pid, list(new.values())), strict=True))

    @property
    def all_sites(self) -> Counter[tuple[int, int]]:
        return sum(self.sites.values(), Counter())

    @property
    def pages_shared(self) -> int:
        return len(self.all_sites)

    @property
    def pages_sharing(self) -> int:
        return self.all_sites.total() - self.pages_shared

    @property
    def saved_pages(self) -> int:
        return self.pages_sharing + sum(self.zero_pages.values())

    def fair_share_bytes(self, name: str) -> float:
        """Each of k sites of a page saves 1 - 1/k of it, a zero page all of it."""
        everyone = self.all_sites
        shared = sum(here * (1 - 1 / everyone[site]) for site, here in self.sites[name].items())
        return (shared + self.zero_pages[name]) * PAGE_BYTES

    def common(self, one: str, other: str) -> int:
        """Distinct contents of a store that both map (several of its pages may hold the same)."""
        mine, its = (
            {(site[0], self._contents[site]) for site in self.sites[vm]} for vm in (one, other)
        )
        return len(mine & its)


def free_bytes() -> int:
    """MemFree, once it held still within 2 MiB for a moment (or after 2 s all the same)."""
    deadline = time.monotonic() + 2
    last = -1
    while True:
        now = int(re.search(r"MemFree: +(\d+)", Path("/proc/meminfo").read_text())[1]) << 10  # type: ignore[index]
        if abs(now - last) < 2 << 20 or time.monotonic() > deadline:
            return now
        last = now
        time.sleep(0.1)


def becomes_true(condition: Callable[[], bool], within_s: float = 10) -> bool:
    """Whether `condition` holds at some moment from now on."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
