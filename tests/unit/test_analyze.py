"""Counting RAM images, against a naive count of their bytes."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vmdedup.accounting.analyze import AnalysisProgress, ImageSource, analyze
from vmdedup.guest.ram_image import ImageError, open_image, read_image
from vmdedup.linux.sparse_file import resident
from vmdedup.models import ContentAnalysis, VmContents

pytestmark = pytest.mark.unit

PAGE = 4096
ZERO = bytes(PAGE)


def naive(path: Path) -> Counter[bytes]:
    content = path.read_bytes()
    content += bytes(-len(content) % PAGE)
    return Counter(content[at : at + PAGE] for at in range(0, len(content), PAGE))


def write_sparse(path: Path, seed: int, *, pages: int, tail_bytes: int) -> Path:
    """Pages of few contents in random places, holes between, an odd end."""
    draw = random.Random(seed)
    contents = [draw.randbytes(PAGE) for _ in range(40)]
    with path.open("wb") as file:
        for page in range(pages):
            kind = draw.random()
            if kind < 0.3:
                continue
            file.seek(page * PAGE)
            # The last byte alone makes these differ from zero and from each other.
            late = bytes(PAGE - 1) + bytes([1 + page % 3])
            file.write(ZERO if kind < 0.4 else late if kind < 0.5 else draw.choice(contents))
        file.truncate(pages * PAGE + tail_bytes)
        if tail_bytes:
            file.seek(pages * PAGE)
            file.write(b"\x07" * tail_bytes)
    return path


def test_counts_and_matrix_are_the_naive_ones(tmp_path: Path) -> None:
    paths = [
        write_sparse(tmp_path / "a", 1, pages=700, tail_bytes=0),
        write_sparse(tmp_path / "b", 1, pages=900, tail_bytes=1),
        write_sparse(tmp_path / "c", 2, pages=300, tail_bytes=PAGE - 1),
    ]
    counts = analyze([ImageSource(str(path)) for path in paths])
    held = [naive(path) for path in paths]
    everything = sum(held, Counter[bytes]())
    assert [vm.name for vm in counts.vms] == [str(path) for path in paths]
    rows: list[VmContents | ContentAnalysis] = [*counts.vms, counts]
    for found, pages in zip(rows, (*held, everything), strict=True):
        assert found.total_pages == pages.total()
        assert found.zero_pages == pages[ZERO]
        assert found.nonzero_pages == pages.total() - pages[ZERO]
        assert found.distinct_pages == len(pages.keys() - {ZERO})
        assert found.duplicate_pages == found.nonzero_pages - found.distinct_pages
    for i, mine in enumerate(held):
        for j, other in enumerate(held):
            both = len((mine.keys() & other.keys()) - {ZERO})
            assert counts.matrix[i][j] == (counts.vms[i].duplicate_pages if i == j else both)


@pytest.mark.parametrize("size_bytes", [0, 1, PAGE - 1, PAGE, PAGE + 1])
def test_a_tail_is_one_padded_page(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * size_bytes)
    padded = tmp_path / "padded"
    padded.write_bytes(b"x" * size_bytes + bytes(-size_bytes % PAGE))
    counts = analyze([ImageSource(str(path)), ImageSource(str(padded))])
    assert counts.vms[0].total_pages == -(-size_bytes // PAGE)
    assert counts.matrix[0][1] == counts.vms[0].distinct_pages == counts.distinct_pages


def test_the_same_image_twice_counts_twice(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "a", 3, pages=50, tail_bytes=0)
    once = analyze([ImageSource(str(path))])
    twice = analyze([ImageSource(str(path)), ImageSource(str(path))])
    assert twice.total_pages == 2 * once.total_pages
    assert twice.distinct_pages == once.distinct_pages == twice.matrix[0][1]


def test_an_image_that_can_not_be_read_to_its_end(tmp_path: Path) -> None:
    """It names itself; what was read before is not taken for all of it."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4 * PAGE)
    buffer = np.empty((1, PAGE), dtype=np.uint8)
    with open_image(str(path)) as fd:
        pieces = read_image(str(path), fd, buffer)
        assert next(pieces)[0] == 0
        os.truncate(path, PAGE + 1)
        with pytest.raises(ImageError, match="image: became shorter while it was read"):
            list(pieces)
    with path.open("wb") as file:
        file.write(b"x" * PAGE)
        file.flush()
        with pytest.raises(ImageError, match="image: cannot be read: Bad file descriptor"):
            list(read_image(str(path), file.fileno(), buffer))


def make_directory(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_nothing(path: Path) -> None:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_directory, "is a directory"),
        (make_fifo, "is not a regular file"),
        (make_nothing, "No such file"),
    ],
)
def test_what_is_no_image(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / "image"
    make(path)
    with pytest.raises(ImageError, match=reason) as caught:
        analyze([ImageSource(str(path))])
    assert caught.value.path == str(path)


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "a", 4, pages=1000, tail_bytes=5)
    seen: list[AnalysisProgress] = []
    analyze([ImageSource(str(path))], progress=seen.append)
    done = [each.done_pages for each in seen]
    assert done == sorted(done)
    assert seen[-1] == AnalysisProgress(str(path), 1001, 1001)


def test_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    """Half a gibibyte of data under a limit that the data alone would break."""
    path = tmp_path / "image"
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for number in range(512):
            file.write(number.to_bytes(8, "little") + block[8:])
        file.truncate(4 << 30)
    code = (
        "import sys; from vmdedup.accounting.analyze import ImageSource, analyze;"
        "print(analyze([ImageSource(sys.argv[1])]).distinct_pages)"
    )
    limit = 400 << 20
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert int(done.stdout) == 512 + 255


def test_resident_tells_holes_from_data(tmp_path: Path) -> None:
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, 64 * PAGE)
        os.pwrite(fd, b"x", 17 * PAGE)
        os.pwrite(fd, bytes(2 * PAGE), 40 * PAGE)
        assert np.flatnonzero(resident(fd, 0, 64)).tolist() == [17, 40, 41]
        assert np.flatnonzero(resident(fd, 17 * PAGE, 30)).tolist() == [0, 23, 24]
    finally:
        os.close(fd)
