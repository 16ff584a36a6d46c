"""Which mappings a backend may consist of, before and after merges have split it."""

from __future__ import annotations

import os

import pytest

from vmdedup.attach.ramfile import RamFile, check_mappings, find_ram_file
from vmdedup.linux.maps import Maps, parse_maps
from vmdedup.linux.process import Process

pytestmark = pytest.mark.unit

START = 0x7F0000000000
FILE = RamFile((0x1, 77), 0, "/memfd:ram (deleted)")


def maps(*rows: tuple[int, int, str, int, str]) -> Maps:
    """(first page, pages, permissions, offset in pages, `device inode path`)."""
    lines = (
        f"{START + first * 4096:x}-{START + (first + count) * 4096:x} {perms} "
        f"{offset * 4096:08x} {tail}"
        for first, count, perms, offset, tail in rows
    )
    return parse_maps("\n".join(lines).encode())


RAM = "00:01 77 /memfd:ram (deleted)"
STORE = "00:1b 9 /dev/shm/vmdedup/uid-0/default.store"
ZERO = "00:06 5 /dev/zero"
NONE = "00:00 0 "


@pytest.mark.parametrize("share", [True, False])
def test_a_split_backend_is_recognised_as_merged(share: bool) -> None:
    own = "rw-s" if share else "rw-p"
    part = maps(
        (0, 8, own, 0, RAM),
        (8, 2, "rw-p", 40, STORE),
        (10, 1, "rw-p", 10, ZERO),
        (11, 5, own, 11, RAM),
    )
    assert check_mappings(part, START, FILE, share=share)


def test_an_untouched_backend_is_not_merged() -> None:
    assert not check_mappings(maps((0, 16, "rw-s", 0, RAM)), START, FILE, share=True)
    assert not check_mappings(maps((0, 16, "rw-p", 0, NONE)), START, None, share=False)


def test_an_anonymous_backend_may_have_neighbours_in_its_mapping() -> None:
    part = maps((-4, 8, "rw-p", 0, NONE), (4, 2, "rw-p", 7, STORE), (6, 30, "rw-p", 0, NONE))
    assert check_mappings(part, START, None, share=False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((4, 12, "rw-s", 5, RAM), "unexpected offsets"),
        ((4, 12, "rw-p", 4, RAM), "share property"),
        ((4, 12, "r--s", 4, RAM), "read-only"),
        ((4, 12, "rw-s", 40, STORE), "unexpected mapping"),
        ((4, 12, "rw-p", 0, "00:01 78 /memfd:other (deleted)"), "unexpected mapping"),
        ((4, 12, "rw-p", 0, NONE), "unexpected mapping"),
        ((4, 12, "rw-p", 0, "00:00 0 [anon:vmdedup]"), "unexpected mapping"),
    ],
)
def test_a_foreign_mapping_inside_is_refused(
    row: tuple[int, int, str, int, str], reason: str
) -> None:
    with pytest.raises(LookupError, match=reason):
        check_mappings(maps((0, 4, "rw-s", 0, RAM), row), START, FILE, share=True)


def test_what_has_no_path_is_no_ram_file() -> None:
    """QEMU 11 maps rings of io_uring, shared and writable as RAM is."""
    ring = maps((0, 2, "rw-s", 0, "00:10 77 anon_inode:[io_uring]"))
    with Process("vm", os.getpid()) as process, pytest.raises(LookupError):
        find_ram_file(process, ring, START, 2 * 4096, share=True, path="")
