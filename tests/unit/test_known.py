"""Known files as guests have them in memory: kernels, archives, images, folders, and the cache."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.harness.skips import require
from vmdedup.accounting.content_sources import (
    MOST_FOLDERS,
    MOST_PARTS,
    OTHER_PARTS,
    Label,
    _shown,
)
from vmdedup.core.attribution import attribute, label_pages
from vmdedup.daemon.content_count import SourcesCount
from vmdedup.errors import UsageError
from vmdedup.known import cache, contents, kernel
from vmdedup.known.archives import members
from vmdedup.known.contents import digested
from vmdedup.known.kernel import unpacked
from vmdedup.known.pages import ZERO, KnownPages, page_digests

pytestmark = pytest.mark.unit

PAGE = 4096


def page(letter: str) -> bytes:
    return letter.encode() * PAGE


def parts_of(known: KnownPages, content: bytes) -> set[str]:
    """The parts that a content's pages are attributed to; each page must be known."""
    digest = page_digests(content)
    at = np.searchsorted(known.digest, digest)
    assert (known.digest[at] == digest).all()
    return {known.parts[part] for part in known.part[at].tolist()}


def cpio(
    files: dict[str, bytes], *, mode: int = 0o100644, folders: Sequence[str] = ("folder",)
) -> bytes:
    """An archive in the format newc."""
    out = b""
    everything = [(name, 0o040755, b"") for name in folders]
    everything += [(name, mode, content) for name, content in files.items()]
    for name, bits, content in [*everything, ("TRAILER!!!", 0, b"")]:
        numbers = [1, bits, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        out += b"070701" + b"".join(b"%08X" % number for number in numbers)
        for piece in (name.encode() + b"\0", content):
            out += piece
            out += b"\0" * (-len(out) % 4)
    return out


def elf(segments: list[tuple[int, bytes]]) -> bytes:
    """A 64-bit ELF file that loads these contents at these addresses."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    at = 64 + 56 * len(segments)
    table, body = b"", b""
    for address, content in segments:
        offset = at + len(body)
        table += struct.pack("<IIQQQQQQ", 1, 5, offset, 0, address, len(content), len(content), 1)
        body += content
    return head + table + body


def bzimage(payload: bytes) -> bytes:
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    struct.pack_into("<II", setup, 0x248, 100, len(payload))
    return bytes(setup) + b"\x90" * 100 + payload + b"\0" * 50


def test_the_last_page_is_filled_up_with_zeroes() -> None:
    digest = page_digests(page("a") + b"end")
    assert digest.tolist() == page_digests(page("a") + b"end" + bytes(PAGE - 3)).tolist()
    assert page_digests(bytes(100)).tolist() == [int(ZERO)]
    assert len(page_digests(b"")) == 0


def test_members_of_several_archives_packed_and_not() -> None:
    early = cpio({"early": b"microcode"})
    main = cpio({"bin/tool": page("t") + b"tail", "empty": b"", "etc": b"x"})
    data = early + bytes(512) + gzip.compress(main)
    found = [(name, bytes(content)) for name, content in members(data)]
    assert found == [("early", b"microcode"), ("bin/tool", page("t") + b"tail"), ("etc", b"x")]


@pytest.mark.parametrize(
    "data",
    [b"070701junk", cpio({"a": b"b"})[:-60], gzip.compress(b"text")],
    ids=["junk", "cut", "packed text"],
)
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"cpio"):
        list(members(data))


def test_an_archive_cannot_lead_back_into_itself() -> None:
    """A size below zero, which int() takes, was an endless loop."""
    data = bytearray(cpio({"a": b"b"}, folders=()))
    data[54:62] = b"-0000070"
    with pytest.raises(ValueError, match="header is broken"):
        list(members(bytes(data)))


def test_archives_are_unpacked_once_and_read_once() -> None:
    end = cpio({}, folders=())
    inside = end
    for _ in range(5):
        inside = end + gzip.compress(inside)
    with pytest.raises(ValueError, match="no cpio archive inside"):
        list(members(gzip.compress(inside)))
    # 25 MB that are read once: for each archive what follows was copied.
    assert list(members((end + bytes(4)) * 200_000)) == []


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bytes], ids=["gzip", "xz", "plain"])
def test_what_follows_a_packed_stream_is_left_out(pack: object) -> None:
    assert callable(pack)
    behind = b"" if pack is bytes else b"\x01\x02\x03\x04"
    assert unpacked(pack(page("k")) + behind) == page("k")


@pytest.mark.parametrize("program", ["zstd", "lz4"])
def test_programs_unpack_what_python_cannot(program: str) -> None:
    try:
        done = subprocess.run([program, "-c"], input=page("k"), capture_output=True, check=True)
    except FileNotFoundError:
        require(f"{program} is not installed")
    assert unpacked(done.stdout + b"\x01\x02\x03\x04") == page("k")


@pytest.mark.parametrize("data", [b"\x1f\x8bjunk", b"\xfd7zXZ\0junk", b"BZhjunk"])
def test_broken_streams_are_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        unpacked(data)


@pytest.mark.parametrize("program", ["gzip", "xz", "zstd", "lz4"])
def test_a_little_that_unpacks_to_much_is_refused(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_MOST_BYTES", 64 << 20)
    bomb = memoryview(bytes(65 << 20))
    try:
        packed = subprocess.run([program, "-c"], input=bomb, capture_output=True, check=True)
    except FileNotFoundError:
        require(f"{program} is not installed")
    assert len(packed.stdout) < 1 << 20
    with pytest.raises(ValueError, match=r"to over 1 GiB|limit"):
        unpacked(packed.stdout)


def test_segments_cannot_be_larger_than_their_file(tmp_path: Path) -> None:
    """A hundred that all are the whole file."""
    data = bytearray(elf([(0, page("a"))] * 100))
    for number in range(100):
        struct.pack_into("<QQQQ", data, 64 + 56 * number + 8, 0, 0, 0, len(data))
    (tmp_path / "elf").write_bytes(data)
    known = digested(str(tmp_path / "elf"))
    assert known.parts == ("file",)
    assert parts_of(known, bytes(data)) == {"file"}


HEADS = {
    "bzImage": bytes(0x202) + b"HdrS\xff\xff",
    "ELF": b"\x7fELF\x02",
    "gzip": b"\x1f\x8b",
    "cpio": b"070701" + b"0" * 104,
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_large_disk_is_never_read_whole(tmp_path: Path, head: bytes) -> None:
    """A guest can write these bytes into its raw disk."""
    disk = tmp_path / "disk"
    disk.write_bytes(head.ljust(PAGE, b"\0") + page("a"))
    os.truncate(disk, 1 << 40)
    known = digested(str(disk))
    assert known.kind == "disk image"
    assert parts_of(known, page("a")) == {""}


def mutilated(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.randrange(1, 6)):
        at = dice.randrange(len(out))
        match dice.randrange(4):
            case 0:
                out[at] = dice.randrange(256)
            case 1:
                out[at : at + 8] = dice.choice([b"\xff" * 8, bytes(8), b"-0000070", b"7fffffff"])
            case 2:
                del out[at : at + dice.randrange(40)]
            case _:
                out = out[: at + 1]
    return bytes(out)


@pytest.mark.parametrize("kind", ["kernel", "initrd", "ELF file"])
def test_what_is_mutilated_is_digested_or_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    vmlinux = elf([(0x1000000, page("t")), (0x2000800, b"data")])
    initrd = cpio({"early": b"code"}) + bytes(100) + gzip.compress(cpio({"bin/tool": page("t")}), 0)
    whole = {"kernel": bzimage(gzip.compress(vmlinux, 0)), "initrd": initrd, "ELF file": vmlinux}
    file = tmp_path / "file"
    dice = random.Random(kind)
    for _ in range(400):
        file.write_bytes(mutilated(whole[kind], dice))
        try:
            assert digested(str(file)).kind in {kind, "disk image"}
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_a_kernel_as_loaded_and_as_packed(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz"
    payload = gzip.compress(elf([(0x1000000, page("t") + b"more"), (0x2000800, b"data")]))
    image.write_bytes(bzimage(payload))
    known = digested(str(image))
    assert known.kind == "kernel"
    assert parts_of(known, page("t") + b"more") == {"kernel, as loaded"}
    assert parts_of(known, bytes(0x800) + b"data") == {"kernel, as loaded"}
    assert parts_of(known, image.read_bytes()[1024:]) == {"kernel, packed"}
    image.write_bytes(bzimage(b"\x1f\x8bbroken"))
    with pytest.raises(UsageError, match=r"vmlinuz: its kernel cannot be unpacked"):
        digested(str(image))


def test_an_initrd_by_its_members(tmp_path: Path) -> None:
    image = tmp_path / "initrd"
    image.write_bytes(gzip.compress(cpio({"bin/tool": page("t"), "lib": page("l") + b"x"})))
    known = digested(str(image))
    assert known.kind == "initrd"
    assert parts_of(known, page("t")) == {"bin/tool"}
    assert parts_of(known, page("l") + b"x") == {"lib"}


def test_disks_raw_and_qcow2_have_the_same_pages(tmp_path: Path) -> None:
    raw, qcow2 = tmp_path / "disk", tmp_path / "disk.qcow2"
    with raw.open("wb") as file:
        file.write(page("a"))
        file.seek(1 << 20)
        file.write(page("b") + b"end")
    try:
        command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2)]
        subprocess.run(command, check=True)
    except FileNotFoundError:
        require("qemu-img is not installed")
    plain, packed = digested(str(raw)), digested(str(qcow2))
    assert (plain.kind, packed.kind) == ("disk image", "disk image")
    assert {*page_digests(page("a") + page("b") + b"end").tolist()} <= {*plain.digest.tolist()}
    assert (plain.digest == packed.digest).all()
    qcow2.write_bytes(b"QFI\xfb" + b"\xff" * 500)
    with pytest.raises(UsageError, match=r"disk\.qcow2: "):
        digested(str(qcow2))


@pytest.mark.parametrize("backing", ["nbd://127.0.0.1:1/x", 'json:{"driver":"raw"}'])
def test_an_image_that_sends_us_elsewhere_is_refused(tmp_path: Path, backing: str) -> None:
    """A guest may have written this header into its raw disk."""
    name = backing.encode()
    image = tmp_path / "disk"
    head = struct.pack(">4sIQIIQ", b"QFI\xfb", 3, 512, len(name), 16, 1 << 20)
    image.write_bytes(head.ljust(512, b"\0") + name)
    with pytest.raises(UsageError, match=r"its backing is no file"):
        digested(str(image))


def overlay(path: Path, backing: Path | str, form: str = "raw", size: str = "1M") -> Path:
    create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", str(backing), "-F", form]
    try:
        subprocess.run([*create, str(path), size], check=True)
    except FileNotFoundError:
        require("qemu-img is not installed")
    return path


def test_backing_files_are_read_and_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tmp_path / "base"
    base.write_bytes(page("a"))
    middle = overlay(tmp_path / "middle", "base")
    top = str(overlay(tmp_path / 'a "top", of two', middle, "qcow2"))
    assert parts_of(cache.known_pages_of(top), page("a")) == {""}
    base.write_bytes(page("b") * 2)
    known = cache.known_pages_of(top)
    assert parts_of(known, page("b")) == {""}
    assert page_digests(page("a"))[0] not in known.digest
    # A raw base whose guest has written a header into it stays raw.
    base.write_bytes(middle.read_bytes())
    assert parts_of(cache.known_pages_of(top), middle.read_bytes()[:PAGE]) == {""}


def test_each_layer_has_to_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest can name any file of the host in its disk, and its owner may ask what is in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(page("s"))
    (folder / "link").symlink_to(secret)
    (folder / "base").write_bytes(page("b"))
    count = partial(SourcesCount, folders=[str(folder)])
    good = overlay(overlay(folder / "m", "base").with_name("top"), folder / "m", "qcow2")
    assert count(known=[str(good)]).result([]).known[0].pages
    for backing in (secret, folder / "link", "../secret"):
        middle = overlay(folder / "middle", backing)
        for image in (middle, overlay(folder / "top2", middle, "qcow2")):
            cache.known_pages_of(str(image))  # root may, and it is kept
            with pytest.raises(UsageError, match="is below no folder of the setting known_folders"):
                count(known=[str(image)]).result([])


def test_layers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    def refused(image: Path, told: str) -> None:
        with pytest.raises(UsageError, match=told) as error:
            digested(str(image))
        assert "\n" not in str(error.value)

    base = tmp_path / "base"
    refused(overlay(tmp_path / "x", "x", "qcow2"), "over 64 backing files")
    refused(overlay(tmp_path / "x", base), "No such file")
    refused(overlay(tmp_path / "x", "/dev/zero"), "/dev/zero is no file")
    base.write_bytes(bytes(PAGE))
    refused(overlay(tmp_path / "x", base, "vmdk"), "neither qcow2 nor raw")
    refused(overlay(tmp_path / "x", base, "qcow2"), "neither qcow2 nor raw")
    external = ["-o", f"data_file={base},data_file_raw=on", str(tmp_path / "y"), "4k"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *external], check=True)
    refused(tmp_path / "y", "is in another file")
    whole = overlay(tmp_path / "x", base).read_bytes()
    dice = random.Random(1)
    for _ in range(60):
        (tmp_path / "x").write_bytes(mutilated(whole[:600], dice) + whole[600:])
        with suppress(UsageError):
            digested(str(tmp_path / "x"))


def test_a_file_may_begin_at_any_kib_of_a_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    content = b"".join(bytes([number]) * 1024 for number in range(1, 200))
    image.write_bytes(content)
    known = digested(str(image))
    for first in (0, 1, 2, 3, 101):
        assert parts_of(known, content[first * 1024 :][: 4 * PAGE]) == {""}
    across = contents._PIECE_BYTES - 1024
    with image.open("r+b") as file:
        file.seek(across)
        file.write(content)
    assert parts_of(digested(str(image)), content[: 4 * PAGE]) == {""}


def test_a_cds_files_begin_at_any_sector(tmp_path: Path) -> None:
    image = tmp_path / "cd.iso"
    head = bytearray(0x9000)
    head[0x8001:0x8006] = b"CD001"
    image.write_bytes(bytes(head) + bytes(2048) + page("f") + page("g"))
    known = digested(str(image))
    assert known.kind == "CD image"
    assert parts_of(known, page("f") + page("g")) == {""}


def test_a_folder_by_its_files_without_links(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/libc").write_bytes(page("c"))
    (tmp_path / "usr/link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    known = digested(str(tmp_path))
    assert known.kind == "folder"
    assert known.parts == ("usr/lib/libc",)
    assert parts_of(known, page("c")) == {"usr/lib/libc"}


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^known file .*/nothing: No such file"):
        cache.known_pages_of(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"^known file /a+: File name too long"):
        cache.known_pages_of("/" + "a" * 4000)


def test_a_file_that_is_removed_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = tmp_path / "files"
    files.mkdir()
    (files / "stays").write_bytes(page("s"))
    walked = contents.files_of

    def with_one_more(source: Path) -> Iterator[Path]:
        yield from walked(source)
        yield source / "removed"

    monkeypatch.setattr(cache, "files_of", with_one_more)
    assert cache.known_pages_of(str(files)).parts == ("stays",)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for source in (pipe, Path("/dev/zero")):
        with pytest.raises(UsageError, match=r": neither a file nor a folder$"):
            cache.known_pages_of(str(source))


def test_a_file_is_digested_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    disk = tmp_path / "disk"
    disk.write_bytes(page("a") + page("b"))
    first = cache.known_pages_of(str(disk))
    (kept,) = (tmp_path / "cache/vmdedup/known").iterdir()
    again = cache.known_pages_of(str(disk))
    assert (again.digest == first.digest).all()
    assert (again.kind, again.parts) == (first.kind, first.parts)
    kept.write_bytes(kept.read_bytes()[:100])  # a full disk, say
    assert (cache.known_pages_of(str(disk)).digest == first.digest).all()
    disk.write_bytes(page("c"))
    os.utime(disk, ns=(1, 1))
    for folder in (tmp_path / "cache", Path("/proc/nowhere")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        now = cache.known_pages_of(str(disk)).digest.tolist()
        assert page_digests(page("c"))[0] in now
        assert page_digests(page("a"))[0] not in now


def test_attribution_counts_each_page_once() -> None:
    def pages(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return np.array(numbers, dtype=np.uint64)

    vms, label = [pages(1, 1, 2, 5, 9), pages(2, 3, 9), pages()], np.array([0, 1, 1], np.int32)
    assert label_pages(vms, pages(1, 2, 3), label, 2).tolist() == [2, 3]
    found = attribute(vms, pages(1, 2, 3), label, 2, most_pairs=2)
    assert found.shared.tolist() == [[2, 1, 1], [0, 1, 1], [0, 0, 0]]
    assert found.unique.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert found.pairs[0, 1].tolist() == [0, 1, 1]
    assert found.pairs[0, 2].tolist() == [0, 0, 0]
    assert [*attribute(vms, pages(1, 2, 3), label, 2, most_pairs=1).pairs] == [(0, 1)]


def test_small_files_count_as_their_folder() -> None:
    large = [Label("/disk", f"usr/bin/{number}") for number in range(MOST_PARTS)]
    small = [
        Label("/disk", "usr/lib/python3/json/__init__.py"),
        Label("/disk", "usr/lib/python3/os.py"),
        Label("/disk", "init"),
        Label("/initrd", "usr/lib/python3/os.py"),
    ]
    many = [Label("/disk", f"srv/{number}/file") for number in range(MOST_FOLDERS)]
    labels = [*small, *large, *many]
    pages = np.array([5, 6, 7, 1, *[100] * len(large), *[2] * len(many)])
    names, column = _shown(labels, pages)
    shown = [names[at] for at in column.tolist()]
    folder, other = Label("/disk", "usr/lib/python3/"), Label("/disk", OTHER_PARTS)
    assert shown[:4] == [folder, folder, other, Label("/initrd", OTHER_PARTS)]
    assert shown[4 : 4 + MOST_PARTS] == large
    assert len(names) <= MOST_PARTS + MOST_FOLDERS + 2
    assert sorted(set(shown)) == sorted(names)
