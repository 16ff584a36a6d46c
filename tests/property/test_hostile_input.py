"""What comes from outside, made by machine: no input may do more than be refused.

Two ways: Hypothesis builds inputs of the right shape with wrong values; and real texts
of /proc and of QEMU are mutilated, many thousands in a second. `VMDEDUP_FUZZ_SCALE=N`
tries N times as many; each test prints how many it tried.
"""

# ruff: noqa: E501  (texts of QEMU are as wide as they are)

from __future__ import annotations

import json
import os
import random
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from vmdedup.attach import replies
from vmdedup.attach.cmdline import qmp_monitors, share_folders, split_options, vm_name
from vmdedup.attach.memory_tree import parse_memory_tree
from vmdedup.attach.monitor import one_line
from vmdedup.attach.ranges import parse_ramblock
from vmdedup.errors import UsageError
from vmdedup.linux.maps import parse_maps
from vmdedup.linux.pagemap import FILE, PFNZERO, PRESENT, SWAPPED, categories_of
from vmdedup.linux.smaps import parse_smaps
from vmdedup.settings import Settings

pytestmark = pytest.mark.property

SCALE = float(os.environ.get("VMDEDUP_FUZZ_SCALE", "1"))
BUILT = settings(max_examples=max(10, int(60 * SCALE)))
MUTILATED = int(600 * SCALE)
SLOW_S = 2.0
"""Far beyond what any input of these sizes takes; the quadratic ones took minutes."""

MAPS = b"""\
55d0c7a00000-55d0c7d00000 r-xp 00000000 08:01 131090                     /usr/bin/qemu-system-x86_64
7f0000000000-7f0004000000 rw-s 00000000 00:01 77                         /memfd:ram (deleted)
7f0004000000-7f0004002000 rw-p 00028000 00:1b 9                          /vmdedup/uid%3A0.store
7f0008000000-7f0008200000 rw-p 00000000 00:00 0
7ffd3c9f0000-7ffd3ca11000 rw-p 00000000 00:00 0                          [stack]
"""
SMAPS = MAPS.replace(b"\n", b"\nSize: 64 kB\nVmFlags: rd wr mr mw me dc hg mg \n")
RAMBLOCK = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
/rom@etc/acpi/tables        4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000
"""
RAMBLOCK_WITH_ADDRESS = """\
              Block Name    PSize              Offset               Used              Total         HVA  RO
                    ram0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f0000000000  rw
"""
TREE = """\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000000000000-0000000003ffffff (prio 0, ram): alias ram-below-4g @ram0 0000000000000000-0000000003ffffff
    00000000000c0000-00000000000dffff (prio 1, rom): pc.rom

memory-region: ram0
  0000000000000000-0000000003ffffff (prio 0, ram): ram0
"""
COMMAND_LINE = (
    "qemu-system-x86_64\0-name\0guest=a,,b\0-qmp\0unix:/run/a,server=on,wait=off\0-chardev\0"
    "socket,id=c,path=/run/b,server=on\0-mon\0chardev=c,mode=control\0-fsdev\0local,id=f,path=/s"
)
SETTINGS = """\
gate_runs = 64
drain_trusted = [[7, 2], [10, 99]]
qmp = ["/run/*.qmp"]
[[domains]]
name = "ci-*"
uid = 107
cgroup = "/machine.slice/*"
domain = "ci"
[controls]
run = 1
"""
REPLIES: dict[str, tuple[TypeAdapter[Any], str]] = {
    "memdev": (
        replies.Memdevs,
        '[{"id": "ram0", "size": 67108864, "merge": true, "dump": true, "prealloc": false,'
        ' "share": true, "host-nodes": [0], "policy": "bind"}]',
    ),
    "qom": (replies.QomProperties, '[{"name": "ram0", "type": "child<memory-backend-ram>"}]'),
    "cpus": (replies.CpusFast, '[{"thread-id": 77}]'),
    "iothreads": (replies.IoThreads, '[{"id": "io0", "thread-id": 5}]'),
    "fd": (replies.AddedFdReply, '{"fdset-id": 1, "fd": 12}'),
    "status": (replies.StatusReply, '{"status": "running", "running": true}'),
    "name": (replies.NameReply, '{"name": "web"}'),
    "version": (replies.VersionReply, '{"qemu": {"major": 7, "minor": 2, "micro": 1}}'),
    "stats": (replies.Stats, '[{"stats": [{"name": "nested_run", "value": 0}]}]'),
    "error": (replies.ErrorReply, '{"class": "GenericError", "desc": "no"}'),
    "hmp": (replies.HmpReply, '"ram0 (ram0) is 0x7f0000000000"'),
    "blocks": (replies.BlockNodes, '[{"node-name": "n", "drv": "raw"}]'),
}

WORDS = [b"-", b" ", b"0", b"f" * 17, b"9" * 30, b"\xff\xfe", b"\n", b"(", b") is 0x", b" @", b"%",
         b"\0", b",,", b"=", b"rwxp", b"-1", b"1e999", b"null", b"{", b"[", b"\\ud800", b'"',
         b"(deleted)", b"/dev/zero", b"\r", b"\xe2\x80\xa8", b"18446744073709551616"]  # fmt: skip


def mutilated(text: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` variants of a real text: pieces cut, doubled, moved, replaced, flipped."""
    chance = random.Random(seed)
    for _ in range(count):
        piece = bytearray(text)
        for _ in range(chance.choice((1, 1, 2, 4, 12))):
            low = chance.randrange(len(piece) + 1)
            high = min(len(piece), low + chance.choice((0, 1, 4, 40)))
            match chance.randrange(6):
                case 0:
                    del piece[low:high]
                case 1:
                    piece[low:low] = piece[low:high] * chance.choice((1, 2, 50))
                case 2:
                    piece[low:high] = chance.choice(WORDS) * chance.choice((1, 1, 2, 200))
                case 3:
                    piece[low:low] = chance.randbytes(chance.choice((1, 3, 9)))
                case 4 if piece:
                    piece[min(low, len(piece) - 1)] ^= 1 << chance.randrange(8)
                case _:
                    piece = piece[low:] + piece[:low]
        yield bytes(piece[:20_000])


def try_all(name: str, text: bytes, target: Callable[[bytes], None]) -> None:
    """Give all variants to `target`; none may raise or take long."""
    began = slowest = time.monotonic()
    slowest = 0.0
    for number, piece in enumerate(mutilated(text, len(text), MUTILATED)):
        before = time.monotonic()
        try:
            target(piece)
        except Exception as error:
            pytest.fail(f"{name} {number}: {error!r} of {piece!r}")
        slowest = max(slowest, time.monotonic() - before)
    print(f"{name}: {MUTILATED} inputs in {time.monotonic() - began:.1f} s, slowest {slowest:.4f}")
    assert slowest < SLOW_S


def require_one_line(text: str) -> None:
    assert "\n" not in text


def read_maps_text(piece: bytes) -> None:
    maps = parse_maps(piece)
    assert len(maps) == len(maps.path) == len(maps.permissions) <= piece.count(b"\n") + 1
    part = maps.within(0x7F0000000000, 0x7F0004002000)
    assert part.covers(0, 1 << 47) in (True, False)
    maps.of_file(1, 77)


def read_smaps_text(piece: bytes) -> None:
    for vma in parse_smaps(piece.splitlines(keepends=True)):
        assert 0 <= vma.start < 1 << 64
        assert 0 <= vma.end < 1 << 64


def read_monitor_text(piece: bytes) -> None:
    text = piece.decode(errors="replace")
    for block in parse_ramblock(text).values():
        assert 0 <= block.size_bytes < 1 << 64
    for ranges in parse_memory_tree(text).values():
        assert all(0 <= each.first < 1 << 64 and each.size_bytes > 0 for each in ranges)
    line = one_line(text)
    assert line.isprintable() or line == ""
    assert len(line) <= 300


def read_command_line(piece: bytes) -> None:
    arguments = [os.fsdecode(word) for word in piece.split(b"\0")]
    for option in qmp_monitors(arguments):
        assert (option.path is None) != (option.reason is None)
    vm_name(arguments)
    share_folders(arguments)
    for word in arguments:
        split_options(word)


def read_reply(adapter: TypeAdapter[Any]) -> Callable[[bytes], None]:
    def read(piece: bytes) -> None:
        try:
            value = json.loads(piece)
            adapter.validate_python(value)
        except (ValueError, RecursionError):  # what Monitor turns into a MonitorError
            return

    return read


def test_mutilated_maps() -> None:
    try_all("maps", MAPS, read_maps_text)


def test_mutilated_smaps() -> None:
    try_all("smaps", SMAPS, read_smaps_text)


@pytest.mark.parametrize("text", [RAMBLOCK, RAMBLOCK_WITH_ADDRESS, TREE])
def test_mutilated_monitor_texts(text: str) -> None:
    try_all("monitor text", text.encode(), read_monitor_text)


def test_mutilated_command_lines() -> None:
    try_all("command line", COMMAND_LINE.encode(), read_command_line)


@pytest.mark.parametrize("name", REPLIES)
def test_mutilated_replies(name: str) -> None:
    adapter, text = REPLIES[name]
    adapter.validate_json(text)
    try_all(f"reply {name}", text.encode(), read_reply(adapter))


def test_mutilated_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"VMDEDUP_{name.upper()}", raising=False)
    file = tmp_path / "settings.toml"

    def load(piece: bytes) -> None:
        file.write_bytes(piece)
        try:
            Settings.load(file)
        except UsageError as error:
            require_one_line(str(error))

    load(SETTINGS.encode())
    try_all("settings", SETTINGS.encode(), load)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "id",
                    "size",
                    "merge",
                    "dump",
                    "prealloc",
                    "share",
                    "host-nodes",
                    "thread-id",
                    "name",
                    "type",
                    "qemu",
                    "major",
                    "minor",
                    "status",
                    "running",
                    "fdset-id",
                    "fd",
                    "stats",
                    "value",
                    "class",
                    "desc",
                    "drv",
                    "node-name",
                    "policy",
                    "QMP",
                ]
            ),
            inner,
            max_size=9,
        )
    ),
    max_leaves=30,
)


@BUILT
@given(st.sampled_from(sorted(REPLIES)), JSON)
def test_a_reply_of_any_shape_is_bounded_or_refused(name: str, value: object) -> None:
    adapter, _ = REPLIES[name]
    try:
        accepted = adapter.validate_python(value)
    except ValidationError:
        return
    for number in numbers_of(adapter.dump_python(accepted)):
        assert -1 <= number < 1 << 64


def numbers_of(value: object) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from numbers_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_of(inner)


@BUILT
@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=40))
def test_any_pagemap_entry_has_categories(entries: list[int]) -> None:
    """Against the bits one by one (Documentation/admin-guide/mm/pagemap.rst)."""
    found = categories_of(np.array(entries, dtype=np.uint64))
    for entry, bits in zip(entries, found.tolist(), strict=True):
        present, swapped = entry >> 63 & 1, entry >> 62 & 1
        marker = swapped and entry & 0x1F == 31
        assert bool(bits & PRESENT) == bool(present)
        assert bool(bits & SWAPPED) == bool(swapped and not marker)
        assert bool(bits & FILE) == bool(present and entry >> 61 & 1)
        assert not bits & PFNZERO or present


SETTING_VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "uid", "cgroup", "domain", "run"]), inner)
    ),
    max_leaves=8,
)


@BUILT
@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "x"]), SETTING_VALUES, max_size=4))
def test_settings_of_any_shape_are_taken_whole_or_refused_in_a_line(values: dict[str, Any]) -> None:
    try:
        made = Settings.load(None, **values)
    except UsageError as error:
        require_one_line(str(error))
        return
    assert made.gate_runs <= 256
    assert all(rule.domain and "/" not in rule.domain for rule in made.domains)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 60_000,
        "() is 0x" * 20_000,
        " " * 60_000,
        "memory-region: x\n" * 30_000,
        "  " + "0" * 16 + "-" + "0" * 16 + " (prio 0, ram): alias " + " @" * 30_000,
        "address-space: memory\n"
        + f"  {'0' * 16}-{'f' * 16} (prio 0, ram): alias a @b {'0' * 16}-{'f' * 16}\n" * 60
        + "memory-region: b\n"
        + f"  {'0' * 16}-{'f' * 16} (prio 0, ram): alias a @b {'0' * 16}-{'f' * 16}\n" * 60,
    ],
    ids=["brackets", "answers", "spaces", "headers", "aliases", "windows onto windows"],
)
def test_texts_that_are_made_to_take_long(text: str) -> None:
    began = time.monotonic()
    read_monitor_text(text.encode())
    assert time.monotonic() - began < 10 * SLOW_S
    assert tomllib.loads("") == {}
