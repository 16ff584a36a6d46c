"""The targets of a process's descriptors: the links in /proc/PID/fd.

Owns the reading of all links at once (`syscall_batch`), and the finding of userfaultfds among
them. Read one by one, each link would release Python's lock and wait for it again. Promises
no single moment: a descriptor closed meanwhile is left out. Reads only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from vmdedup.linux.proc_file import read_record
from vmdedup.linux.syscall_batch import call_columns, run_calls
from vmdedup.linux.syscalls import NR

USERFAULTFD = "anon_inode:[userfaultfd]"
_NO_FEATURES = "API:\taa:0:"
"""Line in the fdinfo of a userfaultfd before UFFDIO_API (fs/userfaultfd.c:
userfaultfd_show_fdinfo)."""

_USUAL_BYTES = 256
"""Room for one link; a longer link is read once more."""


def descriptor_links(pid: int) -> dict[int, str]:
    """Descriptor number to target. Raises OSError when the process cannot be seen (any more)."""
    folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        names = os.listdir(folder)
        texts = b"".join(name.encode() + b"\0" for name in names)
        lengths = np.array([len(name) + 1 for name in names], dtype=np.int64)
        text = np.frombuffer(texts, dtype=np.uint8)
        links = np.empty((len(names), _USUAL_BYTES), dtype=np.uint8)
        sizes = run_calls(
            call_columns(
                NR.READLINKAT,
                folder,
                text.ctypes.data + np.cumsum(lengths) - lengths,
                links.ctypes.data + np.arange(len(names)) * _USUAL_BYTES,
                _USUAL_BYTES,
            )
        )
        found = {}
        for name, link, size in zip(names, links, sizes.tolist(), strict=True):
            if 0 <= size < _USUAL_BYTES:
                found[int(name)] = os.fsdecode(link[:size].tobytes())
            elif size == _USUAL_BYTES:
                with suppress(FileNotFoundError):
                    found[int(name)] = os.readlink(name, dir_fd=folder)
        return found
    finally:
        os.close(folder)


def userfaultfds(pid: int, links: Mapping[int, str]) -> dict[int, bool]:
    """The userfaultfds among these descriptors, and whether each was set up.

    A userfaultfd without UFFDIO_API protects nothing. Raises OSError when the process ended.
    """
    found = {}
    for fd in [fd for fd, link in links.items() if link == USERFAULTFD]:
        with suppress(FileNotFoundError):
            found[fd] = _NO_FEATURES not in read_record(f"/proc/{pid}/fdinfo/{fd}")
    return found
