"""QEMU's memory tree: where in the guest's address space each RAM block may be seen.

Owns the reading of `info mtree`. Pure: text in, ranges out. The tree says where a block
is placed, not whether another of higher priority hides it there. `gpa2hva` names the block
that is really seen at an address, so ask it about each range.

`info mtree -f`, which lists what is seen, is deliberately not used. For each flat view QEMU
7.2 takes one reference per address space and drops only one (softmmu/memory.c:
mtree_info_flatview): memory that is unplugged later is then never freed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = re.compile(r"^(address-space|memory-region): (?P<name>.+?)\s*$")
_LINE = re.compile(
    r"^\s*(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?P<kind>[a-z/-]+)\): "
    r"(?:alias .*? @(?P<target>.+) (?P<low>[0-9a-f]{16})-[0-9a-f]{16}|(?P<name>.+?))"
    r"(?: \[disabled\])?$"
)
_RAM = ("ram", "rom", "nv-ram")
_MOST_DEPTH = 8
_MOST_LINE = 1024
_MOST_HEADERS = 64
_MOST_NODES = 1 << 16
"""Most nodes visited: windows onto windows multiply in a text made to take long."""


@dataclass(frozen=True)
class GuestRange:
    """A piece of guest-physical memory and the backend bytes behind it."""

    first: int
    size_bytes: int
    offset_bytes: int


@dataclass(frozen=True)
class _Node:
    """A line of the tree: RAM of that name, or a window onto another region."""

    name: str
    is_alias: bool
    first: int
    size_bytes: int
    offset_bytes: int


def parse_memory_tree(text: str) -> dict[str, list[GuestRange]]:
    """RAM ranges of the system address space by the name of their memory region.

    Ranges of one name may overlap; lines that do not parse are left out.
    """
    sections = _sections(text)
    found: dict[str, list[GuestRange]] = {}
    budget = iter(range(_MOST_NODES))
    every = _resolve(sections, "address-space: memory", 0, 1 << 64, _MOST_DEPTH, budget)
    for name, piece in every:
        found.setdefault(name, []).append(piece)
    return found


def _sections(text: str) -> dict[str, list[_Node]]:
    """Each section's RAM and windows, addresses counted from the section's first line."""
    sections: dict[str, list[_Node]] = {}
    headers: list[str] = []
    base: int | None = None
    for line in text.splitlines():
        if len(line) > _MOST_LINE:
            continue
        if _HEADER.match(line):
            headers = [*headers[-_MOST_HEADERS:], line.strip()] if base is None else [line.strip()]
            base = None
            continue
        match = _LINE.match(line)
        if match is None or not headers:
            continue
        first, last = int(match["first"], 16), int(match["last"], 16)
        base = first if base is None else base
        node = _Node(
            name=match["target"] or match["name"],
            is_alias=match["target"] is not None,
            first=first - base,
            size_bytes=last - first + 1,
            offset_bytes=int(match["low"] or "0", 16),
        )
        if node.is_alias or match["kind"] in _RAM:
            for header in headers:
                sections.setdefault(header, []).append(node)
    return sections


def _resolve(
    sections: dict[str, list[_Node]],
    section: str,
    low: int,
    high: int,
    depth: int,
    budget: Iterator[int],
) -> list[tuple[str, GuestRange]]:
    """The RAM of a section inside [low, high), with windows resolved to what they show."""
    pieces = []
    for node in sections.get(section, []) if depth else []:
        if next(budget, None) is None:
            break
        begin, end = max(node.first, low), min(node.first + node.size_bytes, high)
        if begin >= end:
            continue
        offset = node.offset_bytes + begin - node.first
        if not node.is_alias:
            pieces.append((node.name, GuestRange(begin, end - begin, offset)))
            continue
        target = f"memory-region: {node.name}"
        last = offset + end - begin
        for name, inner in _resolve(sections, target, offset, last, depth - 1, budget):
            moved = begin + inner.first - offset
            pieces.append((name, GuestRange(moved, inner.size_bytes, inner.offset_bytes)))
    return pieces
