"""/proc/PID/maps in columns against a parser that takes it line by line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.linux.maps import Maps, Vma, parse_maps

pytestmark = pytest.mark.property

_HEX = "0123456789abcdef"


def line_by_line(text: bytes) -> list[Vma]:
    found = []
    for line in text.split(b"\n"):
        try:
            addresses, permissions, offset, device, rest = line.decode().split(" ", 4)
            start, end = addresses.split("-")
            major, minor = device.split(":")
            inode, _, path = rest.partition(" ")
            numbers = [start, end, offset, major, minor]
            if not all(each and set(each) <= set(_HEX) for each in numbers):
                continue
            number = os.makedev(int(major, 16), int(minor, 16))
            place = int(start, 16), int(end, 16), permissions, int(offset, 16)
            found.append(Vma(*place, number, int(inode), path.lstrip(" ")))
        except ValueError:
            continue
    return found


def rows(maps: Maps) -> list[Vma]:
    return [maps.row(index) for index in range(len(maps))]


address = st.one_of(st.integers(0, 2**64 - 1), st.integers(0x5500_0000_0000, 0x7FFF_FFFF_F000))
lines = st.builds(
    lambda start, end, permissions, offset, minor, inode, gap, path: (
        f"{start:x}-{end:x} {permissions} {offset:08x} 00:{minor:02x} {inode}{gap}{path}"
    ),
    address,
    address,
    st.sampled_from(["rw-p", "r-xp", "---p", "rw-s"]),
    st.integers(0, 2**44),
    st.integers(0, 255),
    st.integers(0, 10**18),
    st.sampled_from([" ", " " * 26]),
    st.sampled_from(
        ["", "/dev/zero", "/a b - c (deleted)", "[heap]", "/dev/shm/vmdedup/0 1.store"]
    ),
)
others = st.sampled_from(["", "x", "7f-80", "7g-80 rw-p 0 00:00 0 ", "1-2 rw-p 0 0 0", "- - - - -"])


@given(st.lists(st.one_of(lines, lines, others), max_size=40))
def test_any_lines(text: list[str]) -> None:
    content = "\n".join(text).encode()
    assert rows(parse_maps(content)) == line_by_line(content)


def test_our_own() -> None:
    content = Path("/proc/self/maps").read_bytes()
    assert rows(parse_maps(content)) == line_by_line(content)
    assert len(rows(parse_maps(content))) == content.count(b"\n")
