"""Guest RAM of a VM: its memory backends and where they lie in the process.

Owns the way from a backend's id to a checked range of host-virtual addresses. QEMU says
where a backend starts (`info ramblock` if it prints addresses, otherwise `info mtree`
and `gpa2hva`). /proc/PID/maps must agree mapping by mapping, even if earlier merges
have split the range into thousands. Refuses each backend that cannot be merged by its
nature, with the reason: merge=off, huge pages, read-only or locked memory, preallocated
memory, memory that is not plugged in, mappings that are neither QEMU's nor ours.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from vmdedup.attach import replies
from vmdedup.attach.memory_tree import GuestRange, parse_memory_tree
from vmdedup.attach.monitor import Monitor, one_line
from vmdedup.attach.ramfile import RamFile, check_mappings, filesystem_of, find_ram_file
from vmdedup.errors import AttachError, MonitorError
from vmdedup.linux.maps import Maps, read_maps
from vmdedup.linux.process import Process
from vmdedup.linux.smaps import has_unmergeable_lock, is_guest_ram
from vmdedup.units import PAGE_BYTES, Hva, pages

V = TypeVar("V")
Kind = Literal["file", "memfd", "ram", "shm"]

_GPA_ANSWER = re.compile(r"\((?P<name>.*)\) is 0x(?P<hva>[0-9a-f]{1,16})\s*$")
_LINE_CHARACTERS = 4096
"""Most characters of an answer that are searched: the time grows with their square."""
_HEX = re.compile(r"0x[0-9a-f]{1,16}$")
_MOST_PIECES = 4
"""Most pieces of a backend whose address is asked for; small ones are firmware windows."""
_BACKEND_KINDS: dict[str, Kind] = {
    "memory-backend-ram": "ram",
    "memory-backend-memfd": "memfd",
    "memory-backend-file": "file",
    "memory-backend-shm": "shm",
}
_MOST_TIMES_MEMORY = 4
"""Most memory of one VM as a multiple of the host's: our own memory grows with its pages."""
_PAGE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Region:
    """One mergeable memory backend: [start, start + size_bytes) in the QEMU process."""

    backend: str
    kind: Kind
    share: bool
    merge: bool
    dump: bool
    policy: str
    host_nodes: tuple[int, ...]
    size_bytes: int
    start: Hva
    ram_file: tuple[int, int] | None
    """(st_dev, st_ino) of the RAM file; `None` for private anonymous memory."""
    ram_offset_bytes: int
    """Offset of `start` in the RAM file."""
    ram_fd: int | None
    """QEMU's own descriptor of the RAM file; `None` if it keeps none."""
    filesystem: str
    """Filesystem of the RAM file: `memfd`, `tmpfs`, `ext4`…; empty for anonymous memory."""

    @property
    def end(self) -> Hva:
        """First address past the region."""
        return Hva(self.start + self.size_bytes)

    @property
    def pages(self) -> int:
        """Pages of the region."""
        return pages(self.size_bytes)


@dataclass(frozen=True)
class Backend:
    """A memory backend as QEMU lists it, before the check whether it can be merged."""

    id: str
    kind: str
    size_bytes: int
    share: bool
    merge: bool


@dataclass(frozen=True)
class RamBlock:
    """A row of `info ramblock`: page size, and if the header has them HVA and read-only."""

    page_bytes: int
    size_bytes: int
    start: Hva | None
    readonly: bool


_UNLESS_BY_HAND = ("merge=off", "prealloc=on")
"""Beginnings of the reasons that do not hold for backends registered by hand."""


def yields_to_registration(reason: str | None) -> bool:
    """Whether a backend refused for this reason is merged once it is registered by hand."""
    return reason is not None and reason.startswith(_UNLESS_BY_HAND)


class _UnmergeableError(Exception):
    """Why one backend cannot be merged; never leaves this module."""


def parse_ramblock(text: str) -> dict[str, RamBlock]:
    """Rows of `info ramblock` by block name; rows that do not parse are left out."""
    lines = text.splitlines()
    has_address = bool(lines) and lines[0].split()[-2:] == ["HVA", "RO"]
    blocks: dict[str, RamBlock] = {}
    for line in lines[1:]:
        fields = line.rsplit(None, 7 if has_address else 5)
        if len(fields) != (8 if has_address else 6):
            continue
        name, number, unit, *numbers = fields
        if unit not in _PAGE_UNITS or not number.isdigit() or len(number) > 10:
            continue
        if not all(_HEX.match(word) for word in numbers[: 4 if has_address else 3]):
            continue
        blocks[name.strip()] = RamBlock(
            page_bytes=int(number) * _PAGE_UNITS[unit],
            size_bytes=int(numbers[1], 16),
            start=Hva(int(numbers[3], 16)) if has_address else None,
            readonly=has_address and numbers[4] == "ro",
        )
    return blocks


@dataclass(frozen=True)
class MemoryListing:
    """What QEMU lists of memory: asked for once in a look at the VM, and handed on."""

    backends: Sequence[replies.Memdev]
    objects: Sequence[replies.QomProperty]
    """Every object that QEMU was given, memory or not."""

    @property
    def types(self) -> dict[str, str]:
        """Type of each object by its id; empty if it is not an object."""
        return {entry.name: entry.child_type or "" for entry in self.objects}


def list_memory(monitor: Monitor) -> MemoryListing:
    """Ask for the memory backends and all objects. Raises MonitorError."""
    backends = monitor.query("query-memdev", replies.Memdevs)
    objects = monitor.query("qom-list", replies.QomProperties, {"path": "/objects"})
    return MemoryListing(backends, objects)


def backends_of(listing: MemoryListing) -> list[Backend]:
    """Every memory backend of the VM that has an id, mergeable or not."""
    types = listing.types
    return [
        Backend(
            id=one_line(each.id, 120),
            kind=types.get(each.id, "").removeprefix("memory-backend-"),
            size_bytes=max(0, each.size),
            share=each.share,
            merge=each.merge,
        )
        for each in listing.backends
        if each.id is not None
    ]


def find_regions(
    monitor: Monitor,
    process: Process,
    by_hand: Collection[str] = (),
    *,
    listing: MemoryListing | None = None,
) -> tuple[list[Region], list[tuple[str, str]]]:
    """The VM's mergeable regions, ascending by address, and the refused backends with reasons.

    `by_hand`: ids of backends that count as mergeable though they have merge=off or prealloc=on.
    `listing`: what the VM has just listed, `None` to ask for it. Raises MonitorError if the
    monitor does not answer, VmGoneError if the VM ended. Reads only.
    """
    listing = listing or list_memory(monitor)
    finder = _Finder(monitor, process, by_hand, listing.types)
    regions: list[Region] = []
    refused: list[tuple[str, str]] = []
    for number, backend in enumerate(listing.backends):
        name = one_line(backend.id or f"backend {number}", 120)
        try:
            regions.append(finder.region(backend))
        except _UnmergeableError as reason:
            refused.append((name, str(reason)))
    regions.sort(key=lambda region: region.start)
    for low, high in itertools.pairwise(regions):
        if low.end > high.start:
            raise MonitorError(
                monitor.vm, "query-memdev", "two backends at the same address", pid=process.pid
            )
    return regions, sorted(refused)


class _Finder:
    """One look at one VM: the answers of QEMU and the kernel, read once."""

    def __init__(
        self,
        monitor: Monitor,
        process: Process,
        by_hand: Collection[str],
        types: Mapping[str, str],
    ) -> None:
        self.by_hand = by_hand
        self.left_bytes = _MOST_TIMES_MEMORY * os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES
        self.monitor = monitor
        self.process = process
        self.types = types
        self.blocks = parse_ramblock(monitor.hmp("info ramblock"))
        self.guest: dict[str, list[GuestRange]] = {}
        if any(block.start is None for block in self.blocks.values()):
            self.guest = parse_memory_tree(monitor.hmp("info mtree"))
        try:
            self.maps = read_maps(monitor.vm, process.pid)
        except PermissionError as error:
            reason = "its memory may not be looked at (run as root)"
            raise AttachError(monitor.vm, reason, pid=process.pid) from error
        self.locked = process.status().get("VmLck", "0").split()[0] != "0"

    def region(self, backend: replies.Memdev) -> Region:
        """The checked region of `backend`; _UnmergeableError says why there is none."""
        if backend.id is None:
            raise _UnmergeableError("it has no id by which its address could be found")
        block = self._refuse_by_nature(backend, backend.id)
        if backend.size > self.left_bytes:
            raise _UnmergeableError(f"the VM has over {_MOST_TIMES_MEMORY} times the host's memory")
        start = self._start(backend.id, backend.size, block)
        end = Hva(start + backend.size)
        if not self.maps.covers(start, end):
            raise _UnmergeableError(f"no gapless mapping at {start:#x}")
        part = self.maps.within(start, end)
        kind = _BACKEND_KINDS[self.types[backend.id]]
        file = self._ram_file(backend, kind, start, part)
        self._refuse_by_mapping(part, start, end, file, share=backend.share)
        self.left_bytes -= backend.size
        return Region(
            backend=backend.id,
            kind=kind,
            share=backend.share,
            merge=backend.merge,
            dump=backend.dump,
            policy=backend.policy,
            host_nodes=tuple(backend.host_nodes),
            size_bytes=backend.size,
            start=start,
            ram_file=file.identity if file else None,
            ram_offset_bytes=file.offset_bytes if file else 0,
            ram_fd=self.process.find_fd(*file.identity) if file else None,
            filesystem=filesystem_of(self.process.pid, file) if file else "",
        )

    def _refuse_by_nature(self, backend: replies.Memdev, name: str) -> RamBlock:
        if not backend.merge and name not in self.by_hand:
            raise _UnmergeableError("merge=off")
        if backend.size <= 0 or backend.size % PAGE_BYTES:
            raise _UnmergeableError("its size is not a whole number of pages")
        if self.types.get(name) not in _BACKEND_KINDS:
            kind = one_line(self.types.get(name, "") or "unknown", 80)
            raise _UnmergeableError(f"backend type {kind} is not supported")
        block = self._by_name(self.blocks, name) or self._of_a_device(name)
        if block is None:
            raise _UnmergeableError("QEMU lists no RAM block for it (not plugged into the guest)")
        if block.size_bytes != backend.size:
            raise _UnmergeableError("QEMU lists its RAM block with another size")
        if block.page_bytes != PAGE_BYTES:
            size = block.page_bytes >> 10
            raise _UnmergeableError(f"huge pages of {size} KiB (hugetlbfs cannot be merged)")
        if block.readonly or self._flag(name, "readonly") or self._flag(name, "rom"):
            raise _UnmergeableError("read-only memory (ROM)")
        if backend.prealloc and name not in self.by_hand:
            reason = "prealloc=on keeps all its memory present; set prealloc=off, or register it"
            raise _UnmergeableError(reason)
        return block

    def _flag(self, name: str, option: str) -> bool:
        """A backend's option that not every type and version has; absent means off."""
        arguments = {"path": f"/objects/{name}", "property": option}
        try:
            answer = self.monitor.execute("qom-get", arguments)
        except MonitorError as error:
            if error.error_class:
                return False
            raise
        return answer is True or answer == "on"

    def _mem_path(self, name: str) -> str:
        """Path of a file backend with links resolved; "" if QEMU names none."""
        arguments = {"path": f"/objects/{name}", "property": "mem-path"}
        path = self.monitor.query_if_known("qom-get", replies.TextReply, "", arguments)
        root = f"/proc/{self.process.pid}/root"
        real = os.path.realpath(root + path) if path.startswith("/") else path
        return real.removeprefix(root)

    def _by_name(self, table: dict[str, V], name: str) -> V | None:
        """A block's row: blocks are named by id, or on some machine types by canonical path."""
        return table.get(name, table.get(f"/objects/{name}"))

    def _of_a_device(self, name: str) -> RamBlock | None:
        """The block that a device on a bus, as virtio-mem, has named by its own path and the id."""
        found = [block for key, block in self.blocks.items() if key.endswith(f"/{name}")]
        return found[0] if len(found) == 1 else None

    def _start(self, name: str, size_bytes: int, block: RamBlock) -> Hva:
        """Host address of the backend's first byte."""
        if block.start is not None:
            start = block.start
        else:
            start = self._start_by_guest_address(name, size_bytes)
        if start % PAGE_BYTES or not 0 < start < (1 << 47) - size_bytes:
            raise _UnmergeableError(f"QEMU gives an impossible address {start:#x}")
        return start

    def _start_by_guest_address(self, name: str, size_bytes: int) -> Hva:
        ranges = self._by_name(self.guest, name)
        if not ranges:
            raise _UnmergeableError("not mapped into the guest's address space (not plugged in)")
        starts = set()
        for piece in sorted(ranges, key=lambda each: -each.size_bytes)[:_MOST_PIECES]:
            if piece.offset_bytes + piece.size_bytes > size_bytes:
                raise _UnmergeableError("another memory region has the same name")
            for inside in (0, piece.size_bytes - PAGE_BYTES):
                seen = self._seen_at(name, piece.first + inside)
                if seen is not None:
                    starts.add(seen - piece.offset_bytes - inside)
        if not starts:
            raise _UnmergeableError("hidden in the guest's address space by other memory")
        if len(starts) != 1:
            raise _UnmergeableError("its ranges do not lie in one block")
        return Hva(starts.pop())

    def _seen_at(self, name: str, address: int) -> int | None:
        """Host address of a guest address; `None` if another block is seen there."""
        answer = self.monitor.hmp(f"gpa2hva {address:#x}")
        match = _GPA_ANSWER.search(answer[:_LINE_CHARACTERS])
        if match is None or match["name"] not in (name, f"/objects/{name}"):
            return None
        return int(match["hva"], 16)

    def _ram_file(
        self, backend: replies.Memdev, kind: Kind, start: Hva, part: Maps
    ) -> RamFile | None:
        """The file behind the backend; `None` for private anonymous memory."""
        if kind == "ram" and not backend.share:
            return None
        prefix = "/memfd:" if kind == "memfd" else ""
        if kind == "file":
            prefix = self._mem_path(backend.id or "")
        try:
            return find_ram_file(
                self.process, part, start, backend.size, share=backend.share, path=prefix
            )
        except LookupError as error:
            raise _UnmergeableError(str(error)) from error

    def _refuse_by_mapping(
        self, part: Maps, start: Hva, end: Hva, file: RamFile | None, *, share: bool
    ) -> None:
        """Refuse a mapping inside that is neither ours nor QEMU's own at the right place."""
        try:
            merged = check_mappings(part, start, file, share=share)
        except LookupError as error:
            raise _UnmergeableError(str(error)) from error
        if merged:
            return
        # smaps is slow, and needed only before the first merge: memory that is locked, or is
        # not guest RAM, was never merged.
        vm = self.monitor.vm
        if file is None and not is_guest_ram(vm, self.process.pid, start, end):
            raise _UnmergeableError(f"the memory at {start:#x} is no guest RAM")
        last = int(part.end[-1])
        if self.locked and has_unmergeable_lock(vm, self.process.pid, start, last):
            raise _UnmergeableError("locked memory (-overcommit mem-lock=on); start without it")
