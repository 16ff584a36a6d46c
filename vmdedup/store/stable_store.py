"""The stable store: one sparse tmpfs file of shared pages per trust domain.

Owns the files in the store directory (root-only, on tmpfs). `DOMAIN.store` has the
pages. `DOMAIN.sums` has the digest of each page when it was published, under a seed
that is drawn, or given, when the pair is made.

Promises that a process which may write or discard holds the file's lock while the file is
open. So a domain has one such process, whatever its settings. A published page never
changes and its slot is never given out again: a mapping that a VM still has always shows
the merged content. Slots only grow (offsets are 64 bit, a tmpfs file is sparse, unmapped
pages are punched out). A killed process leaves at worst published pages that no process
maps: the next one finds and punches them. Refuses to trust a file whose owner or mode is
not ours.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.closing import Closing
from vmdedup.core.rmap import FIRST_SLOT
from vmdedup.core.sorting import page_runs
from vmdedup.errors import StoreBusyError, StoreError
from vmdedup.linux import mman
from vmdedup.linux.borders import require_inside
from vmdedup.linux.filesystems import is_on_tmpfs
from vmdedup.linux.flock import HeldError, take_lock
from vmdedup.linux.maps import STORE_SUFFIX
from vmdedup.linux.numa import nodes_of_file
from vmdedup.linux.other_engine import held_by
from vmdedup.linux.readonly_fd import open_unwritable
from vmdedup.linux.sparse_file import allocated, punch_holes
from vmdedup.linux.syscall_batch import call_columns, require_done, run_calls
from vmdedup.linux.syscalls import NR, syscall
from vmdedup.units import PAGE_BYTES

SUMS_SUFFIX = ".sums"

_SUMS_MAGIC = b"vmdedup2"
"""First bytes of a checksum file, with the format's version: version 1 began at slot 0."""
_SUMS_HEADER = struct.Struct("<8sQ")
_SUMS_START_BYTES = PAGE_BYTES
_MOST_SLOTS = 2**31 - 1


def read_sums(path: Path) -> tuple[int, npt.NDArray[np.uint64]]:
    """Seed and digests, one a slot, of a checksum file. Raises OSError, StoreError."""
    content = path.read_bytes()
    if len(content) < _SUMS_HEADER.size or not content.startswith(_SUMS_MAGIC):
        raise _foreign(path)
    seed = int(_SUMS_HEADER.unpack_from(content)[1])
    return seed, np.frombuffer(content[_SUMS_START_BYTES:], dtype=np.uint64)


def _foreign(sums_path: Path) -> StoreError:
    return StoreError(
        f"{sums_path} is not of this version of vmdedup: unmerge all with the one that made it"
    )


def prepare_directory(directory: Path) -> Path:
    """Make the store directory, or check the one that is there; StoreError if unsafe."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(directory)
    except OSError as error:
        raise StoreError(f"store directory {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        # A user who may write to the parent folder can be first; so it is made at boot.
        raise StoreError(
            f"store directory {directory} was made by uid {found.st_uid}, not by us: remove it, and"
            " have systemd-tmpfiles make it at boot (docs/install.md), or set store_dir"
        )
    if found.st_mode & 0o077:
        raise StoreError(f"store directory {directory} is open to others: chmod 700 it")
    if not is_on_tmpfs(directory):
        raise StoreError(
            f"store directory {directory} is not on tmpfs: set store_dir to one that is"
        )
    return directory


class Access(Enum):
    """The purpose for which a store is opened."""

    CHANGE = "change"
    """To publish, discard, remove: no other process has it open for more than reading."""
    SHARE = "share"
    """To keep it in place, without publishing (zero pages need no store)."""
    READ = "read"
    """To change nothing; others may change it meanwhile."""


class StableStore(Closing):
    """The store of one trust domain, open for appending.

    `next_slot` is the slot that the next published page gets; `FIRST_SLOT` is the first.
    Raises StoreBusyError, which names the holder, if its access and `access` exclude each other.
    """

    def __init__(
        self,
        directory: Path,
        domain: str,
        access: Access = Access.CHANGE,
        *,
        seed: int | None = None,
    ) -> None:
        """`seed`: that of a store that is made now; one that exists keeps its own."""
        self.domain = domain
        self.access = access
        name = quote(domain, safe="")
        self._directory = directory
        self.path = directory / f"{name}{STORE_SUFFIX}"
        self._sums_path = directory / f"{name}{SUMS_SUFFIX}"
        self._sums_fd = self._read_only_fd = -1
        self._fd = self._open_held()
        try:
            self._sums_fd = self._open(self._sums_path)
            self._read_only_fd = self._open_to_lend()
            found = os.fstat(self._fd)
            self.device, self.inode = found.st_dev, found.st_ino
            self.next_slot = max(FIRST_SLOT, found.st_size // PAGE_BYTES)
            self.seed = self._read_or_note_seed(seed)
        except BaseException:
            self.close()
            raise

    def _open_held(self) -> int:
        """The store's file, locked; never a file that another engine has just removed."""
        while True:
            prepare_directory(self._directory)
            try:
                fd = self._open(self.path)
            except StoreError:
                if self._directory.exists():
                    raise
                continue  # removed by another engine in this moment
            try:
                if self.access is Access.READ:
                    return fd
                # SAFETY: lock before anything is read of it. The lock ends with the descriptor,
                # so with a killed engine; the descriptors lent to VMs are of another open file.
                take_lock(fd, shared=self.access is Access.SHARE)
                if self._is_current(fd):
                    return fd
            except HeldError as error:
                os.close(fd)
                what = f"works with the store of trust domain {self.domain} ({self.path})"
                raise StoreBusyError(held_by(error.pid, what)) from None
            except OSError as error:
                os.close(fd)
                raise StoreError(f"{self.path}: {error.strerror}") from error
            os.close(fd)

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _open(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT
        if self.access is Access.READ:
            flags = os.O_RDONLY
        try:
            return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def _open_to_lend(self) -> int:
        """A descriptor that a VM cannot turn into a writable one, if that is possible."""
        with suppress(FileNotFoundError):  # below a bind mount it sees what the mount hides
            fd = open_unwritable(self.path)
            name = os.readlink(f"/proc/self/fd/{fd}")
            if os.path.sameopenfile(fd, self._fd) and name.endswith(self.path.name):
                return fd
            # Another file, or mappings of it could not be recognised by their name.
            os.close(fd)
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def _read_or_note_seed(self, seed: int | None) -> int:
        header = os.pread(self._sums_fd, _SUMS_HEADER.size, 0)
        if len(header) == _SUMS_HEADER.size:
            magic, noted = _SUMS_HEADER.unpack(header)
            if magic != _SUMS_MAGIC:
                raise _foreign(self._sums_path)
            return int(noted)
        if self.access is Access.READ:
            raise StoreError(f"{self._sums_path}: another vmdedup is just making it; try again")
        seed = secrets.randbits(64) if seed is None else seed
        os.pwrite(self._sums_fd, _SUMS_HEADER.pack(_SUMS_MAGIC, seed), 0)
        return seed

    def close(self) -> None:
        """Close the descriptors; the files and all mappings of them stay."""
        for name in ("_fd", "_sums_fd", "_read_only_fd"):
            if (fd := getattr(self, name)) >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def publish(self, content: npt.NDArray[np.uint8], digest: npt.NDArray[np.uint64]) -> int:
        """Append pages and their digests; returns the first slot.

        `content`: uint8, shape (n, PAGE_BYTES); `digest`: uint64, shape (n,).
        Raises StoreError when the tmpfs is full: nothing was published then.
        """
        assert self.access is Access.CHANGE, "only its holder may publish"
        first = self.next_slot
        if first + len(content) > _MOST_SLOTS:
            raise StoreError(f"store {self.path} has used all its slots: unmerge all, then go on")
        try:
            _write_all(
                self._sums_fd,
                np.ascontiguousarray(digest).view(np.uint8),
                _SUMS_START_BYTES + first * digest.itemsize,
            )
            faults.reached("sums-written")
            _write_all(self._fd, content.reshape(-1), first * PAGE_BYTES)
        except OSError as error:
            os.ftruncate(self._fd, first * PAGE_BYTES)
            raise StoreError(f"store {self.path}: {error.strerror}") from error
        self.next_slot = first + len(content)
        return first

    def mapped(self, slots: int) -> PublishedPages:
        """The first `slots` slots, mapped here: also those that are still to be published."""
        return PublishedPages(self._read_only_fd, slots)

    def published_digests(self) -> npt.NDArray[np.uint64]:
        """The digest of every slot ever published: uint64, shape (next_slot,); `0` if no slot."""
        digests = np.zeros(self.next_slot, dtype=np.uint64)
        os.preadv(self._sums_fd, [digests.view(np.uint8).data], _SUMS_START_BYTES)
        return digests

    def nodes(self, slot: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The NUMA node of each of these slots, none of which was discarded."""
        return nodes_of_file(self._read_only_fd, slot)

    def allocated_slots(self) -> npt.NDArray[np.bool_]:
        """Whether each slot still has its page: bool, shape (next_slot,)."""
        return allocated(self._fd, 0, self.next_slot)

    def discard(self, slot: npt.NDArray[np.int64]) -> None:
        """Free the pages of slots that no process maps; their numbers stay used up.

        SAFETY: the caller has read from the kernel, with no merge in flight, that
        no mapping of these slots exists: a mapping would now show zeroes.
        """
        assert self.access is Access.CHANGE, "only its holder may discard"
        start, pages = page_runs(np.sort(slot), np.empty(0, dtype=np.int64))
        punch_holes(self._fd, start * PAGE_BYTES, pages * PAGE_BYTES)
        faults.reached("discarded")

    def open_read_only(self) -> int:
        """A read-only descriptor of the store, for a VM to map privately.

        A VM cannot make it writable, if the kernel supports that (`linux.readonly_fd`).
        It is always of the same open file: only then does the kernel join neighbouring
        mappings (mm/vma.c: is_mergeable_vma compares the struct file, not the inode).
        """
        return os.dup(self._read_only_fd)

    def remove(self) -> None:
        """Delete both files, once nothing is merged.

        The store is emptied first: a paused VM keeps descriptors that were lent to it
        open until it runs again (monitor/fds.c: monitor_fdset_cleanup).
        """
        assert self.access is Access.CHANGE, "only its holder may remove it"
        os.ftruncate(self._fd, 0)
        faults.reached("store-emptied")
        self._sums_path.unlink(missing_ok=True)
        faults.reached("sums-unlinked")
        # SAFETY: unlink last. An engine that makes the store again waits for this lock until here.
        self.path.unlink(missing_ok=True)


@contextmanager
def opened_store(path: Path, device: int, inode: int) -> Iterator[int]:
    """A descriptor to read the store at `path`. Raises OSError unless it is this device and inode.

    A mapping names its store, but the name may belong to another file by now.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (device, inode):
            raise FileNotFoundError(errno.ENOENT, "it is another file by now", str(path))
        yield fd
    finally:
        os.close(fd)


class PublishedPages(Closing):
    """The first `slots` pages of a store, which is open as `fd`, mapped here to be read.

    Read only slots that a VM maps, or is to map. Reading a discarded slot would allocate it
    again; reading a slot that was not published yet raises SIGBUS. Raises OSError.
    """

    def __init__(self, fd: int, slots: int) -> None:
        found = os.fstat(fd)
        self._file = found.st_dev, found.st_ino
        self._size_bytes = slots * PAGE_BYTES
        # Python's own mmap refuses to map beyond the present end of the file.
        self._base = syscall(NR.MMAP, 0, self._size_bytes, mman.PROT_READ, mman.MAP_SHARED, fd, 0)

    @classmethod
    def open(cls, path: Path, device: int, inode: int) -> PublishedPages:
        """The pages of the store at `path`. Raises OSError unless it is this device and inode."""
        with opened_store(path, device, inode) as fd:
            size_bytes = os.fstat(fd).st_size
            if not size_bytes:
                raise FileNotFoundError(errno.ENOENT, "the store is empty")
            return cls(fd, size_bytes // PAGE_BYTES)

    def is_of(self, device: int, inode: int) -> bool:
        """Whether these are the pages of that file."""
        return self._file == (device, inode)

    def address(self, slot: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Addresses of these slots' pages in our own memory; BorderError for other slots."""
        slots = slot.astype(np.int64)
        require_inside(slots, slots + 1, 0, self._size_bytes // PAGE_BYTES)
        return self._base + slot.astype(np.int64) * PAGE_BYTES

    def resident(self, slot: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the page of each of these slots, ascending, is in memory, not swapped out.

        Asks mincore, which reads none in. Raises OSError.
        """
        start, pages = page_runs(slot, np.empty(0, dtype=np.int64))
        answer = np.zeros(len(slot), dtype=np.uint8)
        into = answer.ctypes.data + np.cumsum(pages) - pages
        address = self._base + start * PAGE_BYTES
        results = run_calls(call_columns(NR.MINCORE, address, pages * PAGE_BYTES, into))
        require_done(results, "mincore")
        return np.asarray((answer & 1) != 0)

    def close(self) -> None:
        """Unmap the pages."""
        if self._size_bytes:
            syscall(NR.MUNMAP, self._base, self._size_bytes)
            self._size_bytes = 0


def _write_all(fd: int, data: npt.NDArray[np.uint8], offset_bytes: int) -> None:
    view = data.data
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset_bytes + done)
