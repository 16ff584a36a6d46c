"""Whether calls that a killed engine has launched inside a process may still run.

A launched batch runs when its thread gets a processor. A VM that is stopped, frozen or
starved may run it long after the engine died. Until then the store pages that it will map
look unused. Owns the answer, from outside and without touching the process: by the header of
the scratch table and by the addresses at which its thread waits. Promises to say yes whenever
it is not certain; a later check is then certain. Reads only.
"""

from __future__ import annotations

import os
from functools import partial

import numpy as np

from vmdedup.errors import StuckError
from vmdedup.inject.scratch_files import SCRATCH_LINK, Scratch, table_of
from vmdedup.inject.table import W_DONE, W_OWN_OFFSET, W_RSP, W_TID, launched_header, left_owned
from vmdedup.inject.threads import resting_place
from vmdedup.inject.x86_64 import RED_ZONE_BYTES
from vmdedup.linux import bounded
from vmdedup.linux.maps import Vma, parse_maps
from vmdedup.linux.process import read_process_id
from vmdedup.linux.syscall_batch import call_columns
from vmdedup.linux.syscalls import NR
from vmdedup.linux.unsynced_stat import file_behind

_NEEDLE = f"{SCRATCH_LINK}vmdedup-".encode()


def is_scratch_named(maps_text: bytes) -> bool:
    """Whether the text of a maps file names scratch memory of any vmdedup."""
    return _NEEDLE in maps_text


def may_run_leftover_batch(pid: int, maps_text: bytes, file: tuple[int, int]) -> bool:
    """Whether a batch of an engine that has ended may still run inside `pid`, and map `file`.

    `maps_text`: content of /proc/PID/maps; `file`: (st_dev, st_ino). After a `False`, the
    process's maps show everything that such a batch has mapped of the file.
    """
    left: dict[int, list[Vma]] = {}
    named = b"\n".join(line for line in maps_text.splitlines() if _NEEDLE in line)
    maps = parse_maps(named + b"\n" if named else b"")
    ourselves = read_process_id(os.getpid())
    for index in range(len(maps)):
        vma = maps.row(index)
        scratch = Scratch.parse(vma.path)
        if scratch is not None and scratch.maker != ourselves and not scratch.maker_runs():
            left.setdefault(scratch.nonce, []).append(vma)
    try:
        return any(_may_run(pid, vmas, file) for vmas in left.values())
    except StuckError:
        return True


def _may_run(pid: int, vmas: list[Vma], file: tuple[int, int]) -> bool:
    """As `may_run_leftover_batch`, for the scratch memory of one session."""
    table = table_of(vmas)
    if table is None:
        return False
    read = partial(_read, pid)
    header = launched_header(read, table.start)
    if header is None or header[W_DONE]:  # the last of the calls has returned
        return False
    # A session maps files by descriptors of its own; earlier versions had no such descriptors.
    if header[W_OWN_OFFSET]:
        owned = left_owned(read, table.start)
        if not any(file_behind(pid, fd) == file for fd in owned):
            return False
    tid = int(header[W_TID])
    place = resting_place(pid, tid)
    if place is None:
        return os.path.exists(f"/proc/{pid}/task/{tid}")  # it is running now
    if any(vma.start <= at < vma.end for vma in vmas for at in place):
        return True
    # Below a signal handler its stack pointer is lower than it was at the launch.
    return place.stack_pointer < int(header[W_RSP]) - RED_ZONE_BYTES


def _read(pid: int, address: int, size_bytes: int) -> bytes:
    """Memory of the process; b"" if not all of it is mapped. Raises StuckError."""
    content = np.empty(size_bytes, dtype=np.uint8)
    here = np.array([[content.ctypes.data, size_bytes]], dtype=np.uint64)
    there = np.array([[address, size_bytes]], dtype=np.uint64)
    row = call_columns(NR.PROCESS_VM_READV, pid, here.ctypes.data, 1, there.ctypes.data, 1, 0)
    if size_bytes and bounded.run(f"pid {pid}", pid, row, here, there, content)[0] == size_bytes:
        return content.tobytes()
    return b""
