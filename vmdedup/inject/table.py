"""The table: calls in, results out, in memory that both processes map.

Owns the scratch area inside the target: its layout, our own mapping of it, and reading
what a killed predecessor left in it. The area is one page of stub (sealed against writing)
and right behind it the table: header, one row of eight words for each call, room for frames.
`scratch_files` has their names.
"""

from __future__ import annotations

import ctypes
import mmap
import secrets
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from vmdedup.errors import BorderError
from vmdedup.inject.stub import SAVED_REGISTERS
from vmdedup.inject.x86_64 import WORD, Registers
from vmdedup.linux.maps import Maps
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

MAGIC = int.from_bytes(b"vmdedup1", "little")
# Header, in words; tests/process/stub.S has the same offsets in bytes.
W_MAGIC, W_NONCE, W_BUSY, W_DONE, W_CANCEL, W_END, W_TID, W_RSP, W_SAVED = range(9)
W_SPARE = W_SAVED + len(SAVED_REGISTERS)
"""Receives results that nobody reads."""
W_LAST = W_SPARE + 1
"""Address in the target just after the batch's last row."""
W_KEEP = W_LAST + 1
"""Whether the stub waits for another batch afterwards; it clears this if no guard comes."""
W_SOCKET = W_KEEP + 1
"""Descriptor in the target from which the batch receives its guard, or NO_FD."""
W_MESSAGE = W_SOCKET + 1
"""`struct msghdr` to receive the guard, followed by its iovec, one byte, and the control
message."""
_MESSAGE_WORDS, _IOVEC_WORDS = 7, 2
W_GUARD = W_MESSAGE + _MESSAGE_WORDS + _IOVEC_WORDS + 1 + 2
"""The received descriptor: the control message's data, right behind its header."""
W_OWN_OFFSET = W_GUARD + 1
"""Byte offset in the table of the numbers of the session's own descriptors."""
W_OWNED = W_OWN_OFFSET + 1
"""How many descriptors the session owns."""
W_OWNING = W_OWNED + 1
"""While descriptors are made: how many rows of the batch may have made one."""
HEADER_BYTES = 512
"""Size up to the rows, each of which fills a cache line; it ends with eight vector registers."""
NO_FD = 0xFFFF_FFFF
_CONTROL_BYTES = 24
"""CMSG_SPACE of one descriptor."""
ROW_WORDS = 8
ROW_BYTES = ROW_WORDS * WORD

MOST_OWNED = 64
"""Most descriptors that a session may own inside the target."""

IDLE, STUB_RUNS, CHAIN_RUNS = range(3)
"""Values of the header's BUSY word."""

CANCELLED = -125
"""-ECANCELED: the result of a row that was not run."""
NO_FLOOR = -(1 << 63)


def launched_header(
    read: Callable[[int, int], bytes], table_address: int
) -> npt.NDArray[np.uint64] | None:
    """The header of a killed session's table, `None` if no batch of it may still run.

    `read`: as for `left_owned`.
    """
    header = np.frombuffer(read(table_address, HEADER_BYTES), dtype=np.uint64)
    if not len(header) or header[W_MAGIC] != MAGIC or header[W_BUSY] == IDLE:
        return None
    return header


def free_gap(maps: Maps) -> int:
    """An unused address in the middle of the largest gap, chosen at random nearby.

    It is far from where the kernel would place the next mapping. The caller must map
    with MAP_FIXED_NOREPLACE: another thread may take it first.
    """
    edges = np.flatnonzero(maps.start[1:] > maps.end[:-1])
    sizes = maps.start[1:][edges] - maps.end[:-1][edges]
    user = maps.start[1:][edges] < np.uint64(1 << 47)
    best = edges[user][int(np.argmax(sizes[user]))]
    low, high = int(maps.end[best]), int(maps.start[best + 1])
    middle = low + (high - low) // 2
    spread_pages = min(1 << 20, max(1, (high - middle) // (2 * PAGE_BYTES)))
    return (middle // PAGE_BYTES + secrets.randbelow(spread_pages)) * PAGE_BYTES


def left_owned(read: Callable[[int, int], bytes], table_address: int) -> list[int]:
    """Descriptors that a killed session owns in a target; none of its batches may still run.

    `read`: reads (address, bytes) of the target, short if it is not mapped.
    """
    header = np.frombuffer(read(table_address, HEADER_BYTES), dtype=np.uint64)
    if len(header) < HEADER_BYTES // WORD or header[W_MAGIC] != MAGIC:
        return []
    count = min(int(header[W_OWNED]), MOST_OWNED)
    own = np.frombuffer(read(table_address + int(header[W_OWN_OFFSET]), count * WORD), np.uint64)
    found = own.tolist()
    making = min(int(header[W_OWNING]), 2 * MOST_OWNED) * ROW_BYTES
    rows = np.frombuffer(read(table_address + HEADER_BYTES, making), np.uint64)
    if len(rows) == making // WORD:
        rows = rows.reshape(-1, ROW_WORDS)
        made = rows[rows[:, 0] == NR.FCNTL, 7].view(np.int64)
        closed = rows[rows[:, 0] == NR.CLOSE]
        gone = closed[closed[:, 7].view(np.int64) == 0, 1].tolist()
        found = [fd for fd in found if fd not in gone] + made[made > 0].tolist()
    return [fd for fd in dict.fromkeys(found) if fd < NO_FD]


class Table:
    """Our mapping of the table's file. Close it; the target's mapping is not touched."""

    def __init__(self, fd: int, size_bytes: int, max_calls: int) -> None:
        self._memory = mmap.mmap(fd, size_bytes)
        whole = np.frombuffer(self._memory, dtype=np.uint64)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.max_calls = max_calls
        self.header = whole[: HEADER_BYTES // WORD]
        own_offset = HEADER_BYTES + max_calls * ROW_BYTES
        self.rows = whole[HEADER_BYTES // WORD : own_offset // WORD].reshape(max_calls, ROW_WORDS)
        self._own = whole[own_offset // WORD :][:MOST_OWNED]
        # From the first batch on: one that runs before a descriptor is owned maps no file.
        self.header[W_OWN_OFFSET] = own_offset
        end = own_offset + MOST_OWNED * WORD
        self.frames_offset = end
        """Byte offset in the table where frames may be written."""
        self.workspace_offset = -(-end // PAGE_BYTES) * PAGE_BYTES
        """Byte offset of the workspace: whole pages, for batches by stub, which need no frames."""
        anchor = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(anchor)
        """Address of the table in our own address space."""
        self.done_address = self.address + W_DONE * WORD
        """Address of the done word in our own address space."""
        del anchor

    @staticmethod
    def size_bytes(max_calls: int, behind_bytes: int) -> int:
        """File size in whole pages, for the rows and the frames or workspace behind them."""
        rows_bytes = max_calls * ROW_BYTES + MOST_OWNED * WORD
        used = HEADER_BYTES + rows_bytes + PAGE_BYTES + behind_bytes
        return -(-used // PAGE_BYTES) * PAGE_BYTES

    @property
    def workspace(self) -> npt.NDArray[np.uint8]:
        """Our view of the memory behind the rows. Drop it before the table is closed."""
        return self._bytes[self.workspace_offset :]

    @property
    def owned(self) -> list[int]:
        """The session's own descriptors inside the target."""
        owned: list[int] = self._own[: int(self.header[W_OWNED])].tolist()
        return owned

    def left_owned(self) -> list[int]:
        """As `owned`, but as a successor finds it, even if making them was interrupted."""

        def read(address: int, size_bytes: int) -> bytes:
            return self._bytes[address : address + size_bytes].tobytes()

        return left_owned(read, 0)

    def begin_owning(self, rows: int) -> None:
        """Note that the next batch, of `rows` rows, makes descriptors (F_DUPFD)."""
        # SAFETY: a successor believes these rows, so none from an older batch may remain.
        self.rows[:rows] = 0
        self.header[W_OWNING] = rows

    def end_owning(self, fds: Sequence[int]) -> None:
        """Note that the session now owns these descriptors, and no others."""
        self._own[: len(fds)] = fds
        self.header[W_OWNED] = len(fds)
        self.header[W_OWNING] = 0

    def close(self) -> None:
        """Unmap the table here. Arrays given out before become unusable, so copy results."""
        self.header = self.rows = np.empty((0, ROW_WORDS), dtype=np.uint64)
        self._own = np.empty(0, dtype=np.uint64)
        self._bytes = np.empty(0, dtype=np.uint8)
        self._memory.close()

    @property
    def busy(self) -> int:
        """IDLE, STUB_RUNS or CHAIN_RUNS."""
        return int(self.header[W_BUSY])

    @property
    def done(self) -> bool:
        """Whether every result of the launched batch is in the table."""
        return bool(self.header[W_DONE])

    def fill(
        self,
        calls: npt.NDArray[np.uint64],
        floors: npt.NDArray[np.int64] | None,
        table_address: int,
    ) -> None:
        """Write a batch of calls, shape (n, 7), and the floors of their results.

        Touches nothing that a stub reads while it waits for this batch.
        """
        self.header[W_DONE] = self.header[W_END] = self.header[W_CANCEL] = 0
        self.header[W_LAST] = table_address + HEADER_BYTES + len(calls) * ROW_BYTES
        rows = self.rows[: len(calls)]
        rows[:, :7] = calls
        rows[:, 7].view(np.int64)[:] = NO_FLOOR if floors is None else floors

    def fill_guard(self, socket: int | None, table_address: int, *, keep: bool) -> None:
        """Make the next launched batch receive its guard from `socket` first.

        With `keep` the stub then waits there for the guard of another batch.
        """
        self.header[W_SOCKET] = self.header[W_GUARD] = NO_FD
        self.header[W_KEEP] = keep
        if socket is None:
            return
        message = table_address + W_MESSAGE * WORD
        iovec = message + _MESSAGE_WORDS * WORD
        byte = iovec + _IOVEC_WORDS * WORD
        control = byte + WORD
        words = [0, 0, iovec, 1, control, _CONTROL_BYTES, 0, byte, 1]
        self.header[W_MESSAGE : W_MESSAGE + len(words)] = words
        self.header[W_SOCKET] = socket

    @property
    def keeps(self) -> bool:
        """Whether the stub, after its batch is done, waits for another one."""
        return bool(self.header[W_KEEP])

    def cancel(self) -> None:
        """Make the running batch begin no further row."""
        self.header[W_CANCEL] = 1

    def save(self, registers: Registers) -> None:
        """Write the registers that the stub restores at its end."""
        for index, name in enumerate(SAVED_REGISTERS):
            self.header[W_SAVED + index] = getattr(registers, name)

    def write_frames(self, content: bytes) -> None:
        """Write frames behind the rows."""
        self._bytes[self.frames_offset : self.frames_offset + len(content)] = np.frombuffer(
            content, dtype=np.uint8
        )

    def results(self, count: int, table_address: int) -> npt.NDArray[np.int64]:
        """The results of the first `count` rows, CANCELLED for those that were not run."""
        results = self.rows[:count, 7].astype(np.int64)
        if (end := int(self.header[W_END])) != 0:
            if not 0 <= end - table_address - HEADER_BYTES <= count * ROW_BYTES:
                raise BorderError(f"a batch of {count} calls ended at {end:#x}")
            results[(end - table_address - HEADER_BYTES) // ROW_BYTES :] = CANCELLED
        return results
