"""Files of ext2, ext3 and ext4 by name inside disk images, made by mke2fs."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.skips import require
from vmdedup.known import cache, contents, extfs
from vmdedup.known.contents import digested
from vmdedup.known.extfs import Extent
from vmdedup.known.pages import ZERO, KnownPages, page_digests

pytestmark = pytest.mark.unit

PAGE = 4096
MIB = 1 << 20


def run(*command: str | Path) -> str:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        require(f"{command[0]} is not installed")
    return done.stdout


def make_filesystem(path: Path, files: Path, *, kind: str, block_bytes: int) -> None:
    options = ["-q", "-F", "-t", kind, "-b", str(block_bytes), "-d", str(files)]
    run("mke2fs", *options, path, "24M")


def content(seed: int, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with files of many sizes, a sparse one, links and odd names."""
    top = tmp_path / "files"
    (top / "usr/lib/deep/er").mkdir(parents=True)
    (top / "usr/lib/libc").write_bytes(content(1, 1 << 20))
    os.link(top / "usr/lib/libc", top / "zzz-hard")
    (top / "usr/link").symlink_to("lib/libc")
    (top / "usr/lib/deep/er/odd size").write_bytes(content(2, 5 * PAGE + 1234))
    (top / "usr/lib/größe\n2").write_bytes(content(3, PAGE))
    (top / "with\x1b[31mcolour").write_bytes(content(4, PAGE))
    (top / "empty").touch()
    with (top / "sparse").open("wb") as file:
        file.write(content(5, PAGE))
        file.seek(40 * MIB)
        file.write(content(6, 700))
    return top


def names_of(known: KnownPages, data: bytes) -> set[str]:
    """The parts of a content's pages; each page must be known."""
    digest = page_digests(data)
    digest = digest[digest != ZERO]
    at = np.minimum(np.searchsorted(known.digest, digest), len(known.digest) - 1)
    assert (known.digest[at] == digest).all()
    return {known.parts[part] for part in known.part[at].tolist()}


KINDS = [("ext2", 1024), ("ext2", 4096), ("ext3", 1024), ("ext4", 1024), ("ext4", 2048),
         ("ext4", 4096)]  # fmt: skip


@pytest.mark.parametrize(("kind", "block_bytes"), KINDS)
def test_files_have_their_names(
    files: Path, tmp_path: Path, kind: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_PIECE_BYTES", 64 * PAGE)
    disk = tmp_path / "disk"
    make_filesystem(disk, files, kind=kind, block_bytes=block_bytes)
    known = digested(str(disk))
    assert known.kind == "disk image"
    assert names_of(known, content(1, 1 << 20)) <= {"usr/lib/libc", "zzz-hard"}
    assert names_of(known, content(2, 5 * PAGE + 1234)) == {"usr/lib/deep/er/odd size"}
    assert names_of(known, content(4, PAGE)) == {"with?[31mcolour"}
    assert names_of(known, content(5, PAGE)) == {"sparse"}
    assert names_of(known, content(6, 700)) == {"sparse"}
    # A name over two lines is no name: its content is somewhere in the image.
    assert names_of(known, content(3, PAGE)) == {""}
    assert not any("link" in part or "empty" in part for part in known.parts)


def test_blocks_that_were_never_written_are_no_content(files: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    make_filesystem(disk, files, kind="ext4", block_bytes=4096)
    for command in (f"write {files / 'usr/lib/libc'} grown", "fallocate grown 256 300"):
        run("debugfs", "-w", "-R", command, disk)
    run("debugfs", "-w", "-R", "set_inode_field grown size 2000000", disk)
    assert "[u]" in run("debugfs", "-R", "stat grown", disk)
    known = digested(str(disk))
    assert "grown" in known.parts
    assert names_of(known, content(1, 1 << 20)) <= {"usr/lib/libc", "zzz-hard", "grown"}


def mbr(partitions: Sequence[tuple[int, int]]) -> bytes:
    """A partition table of (begin, length) in bytes."""
    table = b"".join(
        struct.pack("<B3xB3xII", 0, 0x83, begin // 512, length // 512)
        for begin, length in partitions
    )
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def partitioned(disk: Path, filesystems: Sequence[Path]) -> None:
    data, begins = bytearray(), []
    at = MIB + 512
    for each in filesystems:
        content_ = each.read_bytes()
        begins.append((at, len(content_)))
        at += len(content_)
        data += content_
    disk.write_bytes(mbr(begins).ljust(MIB + 512, b"\0") + data)


def test_partitions_and_qcow2(files: Path, tmp_path: Path) -> None:
    root, boot, other = (tmp_path / name for name in ("root", "boot", "other"))
    disk, qcow2 = tmp_path / "disk", tmp_path / "disk.qcow2"
    make_filesystem(root, files, kind="ext4", block_bytes=4096)
    other.write_bytes(content(8, MIB))
    partitioned(disk, [other, root])
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, qcow2)
    plain, packed = digested(str(disk)), digested(str(qcow2))
    assert names_of(plain, content(2, 5 * PAGE + 1234)) == {"usr/lib/deep/er/odd size"}
    assert packed.parts == plain.parts
    assert names_of(packed, content(2, 5 * PAGE + 1234)) == {"usr/lib/deep/er/odd size"}

    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "vmlinuz").write_bytes(content(9, 10 * PAGE))
    make_filesystem(boot, folder, kind="ext2", block_bytes=1024)
    partitioned(disk, [boot, root])
    both = digested(str(disk))
    assert names_of(both, content(9, 10 * PAGE)) == {"partition 1/vmlinuz"}
    assert names_of(both, content(2, 5 * PAGE + 1234)) == {"partition 2/usr/lib/deep/er/odd size"}


def test_a_table_that_lies_costs_only_names(files: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    make_filesystem(disk, files, kind="ext4", block_bytes=4096)
    data = disk.read_bytes()
    for table in (
        mbr([(0xFFFFFFFF * 512, 512), (1024, 1 << 40)]),
        mbr([(0, len(data))]),
        os.urandom(510) + b"\x55\xaa",
    ):
        disk.write_bytes(table + bytes(512) + data)
        names_of(digested(str(disk)), content(1, 1 << 20))


def test_without_debugfs_contents_have_no_names(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    make_filesystem(disk, files, kind="ext4", block_bytes=4096)
    monkeypatch.setattr(extfs, "PROGRAM", "no-such-program")
    known = digested(str(disk))
    assert names_of(known, content(1, 1 << 20)) == {""}


def test_a_block_device_is_read_like_a_file(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    disk = tmp_path / "disk"
    make_filesystem(disk, files, kind="ext4", block_bytes=4096)
    try:
        device = run("losetup", "--find", "--show", "--read-only", disk).strip()
    except subprocess.CalledProcessError as error:
        require(f"no loop device: {error.stderr}")
    try:
        known = cache.known_pages_of(device)
    finally:
        run("losetup", "--detach", device)
    assert names_of(known, content(2, 5 * PAGE + 1234)) == {"usr/lib/deep/er/odd size"}
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("seed", range(12))
def test_a_filesystem_that_lies_costs_only_names(files: Path, tmp_path: Path, seed: int) -> None:
    """Damage at random, in the superblock, group descriptors, inodes, folders, extents."""
    disk = tmp_path / "disk"
    make_filesystem(disk, files, kind="ext4" if seed % 2 else "ext2", block_bytes=1024)
    dice = random.Random(seed)
    data = bytearray(disk.read_bytes())
    used = [at for at in range(1024, len(data), 1024) if any(data[at : at + 1024])]
    for at in dice.sample(used[:300], 40):
        data[at + dice.randrange(1024)] = dice.randrange(256)
    for at in dice.sample(range(1024, 2048), 3):
        if at not in (1080, 1081):
            data[at] = dice.randrange(256)
    disk.write_bytes(data)
    known = digested(str(disk))
    # Whatever has a name, every block is known, as without names.
    assert names_of(known, bytes(data[: 2 * MIB]))
    assert len(known.part) == len(known.digest)


@pytest.mark.parametrize("blocks_high", [0, 64, 0x1000, 0xFFFFFFFF])
def test_a_superblock_that_claims_many_blocks_costs_little_memory(
    tmp_path: Path, blocks_high: int
) -> None:
    """debugfs has 64 bytes for each of the groups: up to 2 GiB here were in memory."""
    disk = tmp_path / "disk"
    features = "^metadata_csum,64bit,^resize_inode"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", features, disk, "24M")
    data = bytearray(disk.read_bytes())
    data[1024 + 4 : 1024 + 8] = struct.pack("<I", 0xFFFFF000)
    data[1024 + 0x150 : 1024 + 0x154] = struct.pack("<I", blocks_high)
    disk.write_bytes(data)
    # A process of its own: the kernel tells the peak of all children that there ever were.
    program = (
        "import resource, sys; from vmdedup.known.contents import digested; digested(sys.argv[1]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    peak_kib = int(run(sys.executable, "-c", program, disk))
    assert peak_kib << 10 <= extfs._MEMORY_LIMIT_BYTES


def test_debugfs_may_wait_for_long_while_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit is on what it does, so that no name depends on how slow a disk is."""
    top, disk = tmp_path / "files", tmp_path / "disk"
    top.mkdir()
    for number in range(1500):
        (top / f"file{number}").write_bytes(b"x")
    run("mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024", "-N", "3000", "-d", top, disk, "24M")
    monkeypatch.setattr(extfs, "_BOUNDED", ("prlimit", "--cpu=2"))
    with disk.open("rb") as file:
        found = extfs.files(file.fileno(), disk.stat().st_size)
        names = {next(found)[0]}
        time.sleep(3)
        names |= {name for name, _ in found}
    assert len(names) == 1500


def test_a_program_without_end_is_ended(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, endless = tmp_path / "disk", tmp_path / "endless"
    make_filesystem(disk, files, kind="ext4", block_bytes=4096)
    endless.write_text("#!/bin/sh\nwhile :; do :; done\n")
    endless.chmod(0o700)
    monkeypatch.setattr(extfs, "PROGRAM", str(endless))
    monkeypatch.setattr(extfs, "_BOUNDED", ("prlimit", "--cpu=1"))
    assert names_of(digested(str(disk)), content(1, 1 << 20)) == {""}


def test_scattered_blocks_cost_what_they_hold_not_what_is_between(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(content(1, 64 * PAGE))
    step = contents._PIECE_BYTES - PAGE
    extents = [Extent(number * step + 100, number * PAGE, 1024) for number in range(64)]
    with image.open("rb") as file:
        pieces = list(contents._pieces(file.fileno(), extents))
    assert sum(map(len, pieces)) <= 64 * PAGE
    pages = page_digests(b"".join(pieces)).tolist()
    data = image.read_bytes()
    for number, extent in enumerate(extents):
        in_page = bytes(extent.file_offset % PAGE) + data[number * PAGE :][:1024]
        assert pages[number] == page_digests(in_page)[0]


@given(st.lists(st.tuples(st.integers(0, 5 * PAGE), st.integers(1, 5 * PAGE)), max_size=12))
def test_pieces_are_the_pages_of_the_file(stretches: list[tuple[int, int]]) -> None:
    """Against the file written out: each page with an extent, in order, holes as zeroes."""
    data = content(7, 64 * PAGE)
    extents: list[Extent] = []
    pages: set[int] = set()
    at = 0
    for gap, length in stretches:
        begin = at + gap
        extents.append(Extent(begin, begin % (32 * PAGE), length))
        at = begin + length
        pages.update(range(begin // PAGE, -(-at // PAGE)))
    whole = bytearray(-(-at // PAGE) * PAGE)
    for begin, image, length in extents:
        whole[begin : begin + length] = data[image : image + length]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        patch.setattr(contents, "_PIECE_BYTES", 4 * PAGE)
        file.write(data)
        file.flush()
        pieces = list(contents._pieces(file.fileno(), extents))
    assert all(len(piece) % PAGE == 0 for piece in pieces[:-1])
    found = b"".join(pieces)
    expected = b"".join(whole[page * PAGE :][:PAGE] for page in sorted(pages))
    assert found.ljust(len(expected), b"\0") == expected
