"""Raw RAM images and RAM files, read as files.

Owns opening an image from disk and reading its allocated parts page by page in
bounded memory. Holes are skipped; a tail shorter than a page is one page padded with
zeroes. Reads only. Refuses anything that is not a regular file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from vmdedup.errors import VmdedupError
from vmdedup.linux.sparse_file import data_segments
from vmdedup.units import PAGE_BYTES, pages


class ImageError(VmdedupError):
    """A RAM image cannot be read. `path` is the image."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


@contextmanager
def open_image(path: str) -> Iterator[int]:
    """A read-only descriptor of a regular file; ImageError for anything else."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(path, f"cannot be opened: {reason}") from error
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(path, "is a directory, not a RAM image")
        if not stat.S_ISREG(mode):
            raise ImageError(path, "is not a regular file")
        yield fd
    finally:
        os.close(fd)


def read_image(
    path: str, fd: int, buffer: npt.NDArray[np.uint8]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """(first page, content) of the allocated parts in ascending order, each page once.

    The content lies in `buffer`, shape (n, PAGE_BYTES), and is valid until the next
    is asked for. Pages that are not named are holes. Raises ImageError.
    """
    size_bytes = os.fstat(fd).st_size
    try:
        for first, count in _pieces(fd, size_bytes, len(buffer)):
            piece = buffer[:count]
            flat = piece.reshape(-1)
            wanted = min(piece.nbytes, size_bytes - first * PAGE_BYTES)
            flat[wanted:] = 0
            read_fully(fd, first * PAGE_BYTES, flat[:wanted])
            yield first, piece
    except EOFError as error:
        raise ImageError(path, "became shorter while it was read") from error
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror}") from error


def _pieces(fd: int, size_bytes: int, most_pages: int) -> Iterator[tuple[int, int]]:
    """(first page, pages) of the allocated parts, none longer than `most_pages`.

    A filesystem's blocks may be smaller than a page, so two parts can meet in one.
    """
    following = 0
    for start, end in data_segments(fd, size_bytes):
        first, last = max(start // PAGE_BYTES, following), pages(end)
        for page in range(first, last, most_pages):
            yield page, min(most_pages, last - page)
        following = max(following, last)


def read_fully(fd: int, offset_bytes: int, into: npt.NDArray[np.uint8]) -> None:
    """Fill `into`, shape (n,), from a file; EOFError when it ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:].data], offset_bytes + done)
        if count == 0:
            raise EOFError(f"the file ends at {offset_bytes + done}")
        done += count
