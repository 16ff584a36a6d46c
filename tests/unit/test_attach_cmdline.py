"""Command lines and HMP texts, as QEMU 7.2 and newer spell them."""

from __future__ import annotations

import pytest

from vmdedup.attach.cmdline import qmp_monitors, share_folders, split_options, vm_name
from vmdedup.attach.memory_tree import GuestRange, parse_memory_tree
from vmdedup.attach.monitor import one_line
from vmdedup.attach.ranges import parse_ramblock

pytestmark = pytest.mark.unit

OLD_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                      m0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000
                  huge 1    2 MiB  0x0000000005080000 0x0000000000200000 0x0000000000200000
"""
NEW_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total\
                HVA  RO
                      m0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\
 0x00007f12ebe00000  rw
                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000\
 0x00007f12ea000000  ro
"""
TREE = """\
address-space: I/O
  0000000000000000-000000000000ffff (prio 0, i/o): io
    0000000000000000-0000000000000007 (prio 0, ram): decoy

address-space: cpu-memory-0
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000000000000-00000000bfffffff (prio 0, i/o): alias ram-below-4g @pc.ram 0000000000000000-00000000bfffffff
    0000000000000000-ffffffffffffffff (prio -1, i/o): pci
      00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
    00000000000a0000-00000000000bffff (prio 1, i/o): alias smram-region @pci 00000000000a0000-00000000000bffff
    00000000000f0000-00000000000fffff (prio 1, rom): alias pam-rom @pc.ram 00000000000f0000-00000000000fffff [disabled]
    00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
    0000000100000000-000000013fffffff (prio 0, i/o): alias ram-above-4g @pc.ram 00000000c0000000-00000000ffffffff
    0000000140000000-000000023fffffff (prio 0, i/o): device-memory
      0000000140000000-0000000147ffffff (prio 0, ram): a name @home

memory-region: pc.ram
  0000000000000000-00000000ffffffff (prio 0, i/o): pc.ram
    0000000000000000-000000007fffffff (prio 0, ram): m0
    0000000080000000-00000000ffffffff (prio 0, ram): m1

memory-region: pci
  0000000000000000-ffffffffffffffff (prio -1, i/o): pci
    00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
"""  # noqa: E501
ONE_BACKEND = """\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000000000000-0000000003ffffff (prio 0, ram): alias ram-below-4g @m0 0000000000000000-0000000003ffffff

memory-region: m0
  0000000000000000-0000000003ffffff (prio 0, ram): m0
"""  # noqa: E501
ENDLESS = """\
address-space: memory
  0000000000000000-000000000000ffff (prio 0, i/o): alias a @a 0000000000000000-000000000000ffff
memory-region: a
  0000000000000000-000000000000ffff (prio 0, i/o): alias a @a 0000000000000000-000000000000ffff
"""


def test_options_undo_doubled_commas_and_read_flags() -> None:
    assert split_options("socket,id=x,path=/a,,b,server,wait=off") == {
        "": "socket",
        "id": "x",
        "path": "/a,b",
        "server": "on",
        "wait": "off",
    }


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["-qmp", "unix:/run/a.sock,server=on,wait=off"], "/run/a.sock"),
        (["--qmp", "unix:/run/a.sock,server,nowait"], "/run/a.sock"),
        (["-qmp-pretty", "unix:rel,,ative,server=on,wait=off"], "rel,ative"),
        (["-chardev", "socket,id=c,path=/c,server=on", "-mon", "chardev=c,mode=control"], "/c"),
        (["-mon", "c,mode=control", "-chardev", "socket,id=c,path=/c,server"], "/c"),
        (["-chardev", "socket,id=c,path=/c,server=on", "-qmp", "chardev:c"], "/c"),
    ],
)
def test_every_spelling_of_a_qmp_socket_is_found(arguments: list[str], path: str) -> None:
    (found,) = qmp_monitors(["qemu", *arguments, "-m", "64"])
    assert (found.path, found.reason) == (path, None)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-qmp", "tcp:localhost:4444,server=on"], "not a unix socket (tcp)"),
        (["-qmp", "stdio"], "not a unix socket (stdio)"),
        (["-qmp", "unix:/p"], "connects out"),
        (["-chardev", "socket,id=c,fd=3,server=on", "-mon", "c,mode=control"], "descriptor"),
        (["-chardev", "socket,id=c,path=p,abstract=on", "-mon", "c,mode=control"], "abstract"),
        (["-chardev", "pty,id=c", "-mon", "c,mode=control"], "not a unix socket (pty)"),
        (["-mon", "c,mode=control"], "no character device"),
    ],
)
def test_a_monitor_that_can_not_be_used_says_why(arguments: list[str], reason: str) -> None:
    (found,) = qmp_monitors(["qemu", *arguments])
    assert found.path is None
    assert found.reason is not None
    assert reason in found.reason


def test_human_monitors_are_no_qmp_monitors() -> None:
    arguments = ["-monitor", "unix:/h,server=on", "-chardev", "socket,id=c,path=/c,server=on"]
    assert qmp_monitors(["qemu", *arguments, "-mon", "chardev=c,mode=readline"]) == []


@pytest.mark.parametrize(
    ("argument", "name"),
    [("web", "web"), ("guest=web,debug-threads=on", "web"), ("web,process=x", "web")],
)
def test_the_name_is_read(argument: str, name: str) -> None:
    assert vm_name(["qemu", "-name", argument]) == name


def test_exported_folders_are_listed() -> None:
    """By the ids that devices name; only those of which the host's filesystem is the content."""
    arguments = ["-fsdev", "local,id=f,path=/srv", "-virtfs", "local,path=/a,,b,mount_tag=t"]
    arguments += ["-virtfs", "local,path=/c,mount_tag=u,id=v", "-fsdev", "synth,id=s,path=/x"]
    arguments += ["-fsdev", "fsdriver=local,id=g,path=/d", "-fsdev", "proxy,id=p,socket=/s"]
    assert share_folders(arguments) == {"f": "/srv", "t": "/a,b", "v": "/c", "g": "/d"}


def test_ramblock_without_addresses() -> None:
    blocks = parse_ramblock(OLD_BLOCKS)
    assert set(blocks) == {"m0", "/rom@etc/acpi/tables", "huge 1"}
    assert blocks["m0"].start is None
    assert blocks["m0"].size_bytes == 64 << 20
    assert blocks["huge 1"].page_bytes == 2 << 20


def test_ramblock_with_addresses() -> None:
    blocks = parse_ramblock(NEW_BLOCKS)
    assert blocks["m0"].start == 0x7F12EBE00000
    assert not blocks["m0"].readonly
    assert blocks["pc.bios"].readonly


@pytest.mark.parametrize("text", ["", "\n\n", "x y z", OLD_BLOCKS.replace("0x", "0y")])
def test_ramblock_nonsense_gives_no_block(text: str) -> None:
    assert parse_ramblock(text) == {}


def test_the_memory_tree_is_followed_through_its_windows() -> None:
    assert parse_memory_tree(TREE) == {
        "m0": [GuestRange(0, 0x80000000, 0), GuestRange(0xF0000, 0x10000, 0xF0000)],
        "m1": [
            GuestRange(0x80000000, 0x40000000, 0),
            GuestRange(0x100000000, 0x40000000, 0x40000000),
        ],
        "pc.rom": [GuestRange(0xC0000, 0x20000, 0)],
        "a name @home": [GuestRange(0x140000000, 0x8000000, 0)],
    }
    assert parse_memory_tree(ONE_BACKEND) == {"m0": [GuestRange(0, 0x4000000, 0)]}


@pytest.mark.parametrize("text", ["", "\n\n", ENDLESS, TREE.replace("prio", "x")])
def test_a_tree_without_memory_gives_none(text: str) -> None:
    assert parse_memory_tree(text) == {}


def test_text_from_outside_becomes_one_short_printable_line() -> None:
    assert one_line("a\n\x1b[31mb\u202e  c") == "a [31mb c"
    assert len(one_line("x" * 10_000)) == 300
