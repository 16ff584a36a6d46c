"""Small files of the kernel, read whole.

Owns one function. Python's `open` makes seven system calls for one line, each of which
releases Python's lock and waits for it again. Reads only.
"""

from __future__ import annotations

import os

_MOST_BYTES = 16 << 10


def read_record(path: str | os.PathLike[str], *, errors: str = "replace") -> str:
    """A file that the kernel shows as one record (fs/seq_file.c: single_open), up to 16 KiB.

    One read returns such a record whole. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _MOST_BYTES).decode(errors=errors)
    finally:
        os.close(fd)
