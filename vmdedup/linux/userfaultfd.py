"""Write protection and filling of another process's memory through its userfaultfd.

Owns the ioctls on a userfaultfd that belongs to QEMU's address space, and the
resolver that serves its faults. The descriptor is a copy: QEMU's own was closed
as soon as the copy was made, so this process is the only holder.

Promises: when this process dies, at any instruction, the kernel closes the
descriptor, lifts every protection and wakes every waiting thread; no thread of
the guest waits longer than the resolver needs, except while a gate is closed.
Refuses to be inherited: a forked child of ours closes its copy at once.

Source: Documentation/admin-guide/mm/userfaultfd.rst, include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.closing import Closing
from vmdedup.core.sorting import ranges
from vmdedup.errors import UnsupportedError, VmGoneError
from vmdedup.linux import syscalls
from vmdedup.linux.maps import read_maps
from vmdedup.linux.realtime import urgent
from vmdedup.linux.syscall_batch import call_columns, run_calls
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

USERFAULTFD_IOC_NEW = 0xAA00
FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15

SYNCHRONOUS_FEATURES = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_EVENT_REMOVE | FEATURE_WP_HUGETLBFS_SHMEM
"""Features of a session, all in Linux 5.19. EVENT_REMOVE: a thread that discards pages (a
balloon's MADV_DONTNEED) waits until its message was read.

SAFETY: a discard drops the protection of anonymous memory, and the next write would pass
unheld. So it does not begin while a gate is closed, nor while a launched batch runs. It
happens some time after its message was read. So the reader lifts the protection itself at
once, which the kernel allows only after the discard (EAGAIN before): no later gate holds
such a page.
"""
TRACKING_FEATURES = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM
"""Features of dirty tracking, all in Linux 6.7."""

_NAMES = {
    FEATURE_PAGEFAULT_FLAG_WP: "PAGEFAULT_FLAG_WP",
    FEATURE_EVENT_REMOVE: "EVENT_REMOVE",
    FEATURE_WP_HUGETLBFS_SHMEM: "WP_HUGETLBFS_SHMEM",
    FEATURE_WP_UNPOPULATED: "WP_UNPOPULATED",
    FEATURE_WP_ASYNC: "WP_ASYNC",
}

_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_WRITEPROTECT = 0xC018AA06
_REGISTER_MODE_MISSING = 1 << 0
_REGISTER_MODE_WP = 1 << 1
_COPY_MODE_DONTWAKE = 1 << 0
_WRITEPROTECT_MODE_WP = 1 << 0
_EVENT_PAGEFAULT = 0x12
_EVENT_REMOVE = 0x15
_MESSAGE_BYTES = 32
_MOST_TRIES = 20000
_RETRY_S = 0.00005
"""Pause before another try, seconds: protection cannot change while a discard begins (EAGAIN)."""

RESOLVER_IDLE_MS = 20
"""Interval at which an idle resolver shows that it lives, milliseconds."""

_Words = ctypes.c_ulong * 4
_USER_END = np.uint64(1 << 63)
"""End of user addresses; the vsyscall page lies above it."""
_GONE = (errno.ENOMEM, errno.ESRCH)

Int64s = npt.NDArray[np.int64]

_open: weakref.WeakSet[Userfault] = weakref.WeakSet()


class Userfault(Closing):
    """One userfaultfd of process `pid`, with `features` enabled.

    `optional`: enabled too if the kernel knows them. Takes ownership of `fd`. Raises
    UnsupportedError when the kernel does not know the features.
    """

    def __init__(self, vm: str, pid: int, fd: int, features: int, *, optional: int = 0) -> None:
        self.vm = vm
        self.pid = pid
        self.fd = fd
        self._reading = threading.Lock()
        self._removed: list[tuple[int, int]] = []
        """Discards, (start, end), whose message was read and whose protection is not lifted yet."""
        self._unserved: list[Int64s] = []
        """Addresses of faults that were read during a wait for something else."""
        _open.add(self)
        for self.features in (features | optional, features):
            with suppress(OSError):
                syscalls.ioctl(fd, _UFFDIO_API, _Words(_UFFD_API, self.features, 0, 0))
                return
        known = _known_features(fd)
        self.close()
        lacking = [name for bit, name in _NAMES.items() if features & bit & ~known]
        reason = f"{vm}: this kernel's userfaultfd lacks {', '.join(lacking) or 'an API'}"
        raise UnsupportedError("userfaultfd-wp", reason)

    @property
    def protects_absent(self) -> bool:
        """Whether anonymous pages that do not exist yet can be protected (Linux 6.4)."""
        return bool(self.features & FEATURE_WP_UNPOPULATED)

    def close(self) -> None:
        """Close it: the kernel lifts every protection and wakes every waiter."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def register(self, spans: Sequence[tuple[int, int]]) -> None:
        """Register every mapping in these (start, end) spans for write protection.

        Raises OSError: EINVAL when a mapping cannot be registered (a file on an
        ordinary filesystem), EBUSY when it is registered elsewhere. Then none of the spans
        is registered by this.
        """
        # SAFETY: changes no protection by itself; a kill here unregisters.
        results = self._on_spans(_UFFDIO_REGISTER, spans, _REGISTER_MODE_WP, 0)
        if (results < 0).any():
            # SAFETY: before Linux 6.17 unregistering works on another's registration, too: it
            # would take QEMU's protection away.
            ours = [span for span, result in zip(spans, results, strict=True) if result >= 0]
            self._on_spans(_UFFDIO_UNREGISTER, ours)
        self._require(results >= 0, results, "UFFDIO_REGISTER")

    def unregister(self, spans: Sequence[tuple[int, int]]) -> None:
        """Unregister these spans: lifts protection there and wakes all waiters. Raises OSError."""
        results = self._on_spans(_UFFDIO_UNREGISTER, spans)
        self._require(results >= 0, results, "UFFDIO_UNREGISTER")

    def _on_spans(self, request: int, spans: Sequence[tuple[int, int]], *tail: int) -> Int64s:
        words = np.zeros((len(spans), 2 + len(tail)), dtype=np.uint64)
        words[:, :2] = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        words[:, 1] -= words[:, 0]
        words[:, 2:] = tail
        return self._ioctls(request, words)

    def protect(self, start: Int64s, length_bytes: Int64s) -> None:
        """Write-protect ranges; a writer then waits for the resolver. int64, shape (n,)."""
        # SAFETY: from now on a guest thread that writes waits in the kernel until
        # the page is lifted. A kill closes the descriptor, which lifts and wakes.
        results = self._write_protect(start, length_bytes, _WRITEPROTECT_MODE_WP)
        over_several = results == -errno.ENOENT
        if over_several.any():
            pieces = self._by_mapping(start[over_several], length_bytes[over_several])
            self._require((results >= 0) | over_several, results)
            results = self._write_protect(*pieces, _WRITEPROTECT_MODE_WP)
        self._require(results >= 0, results)
        self._lift_removed()

    def _by_mapping(self, start: Int64s, length_bytes: Int64s) -> tuple[Int64s, Int64s]:
        """The same ranges, cut at the borders of mappings.

        Before Linux 6.4 one call protects within one mapping only. Else it gives ENOENT and
        does nothing (mm/userfaultfd.c: mwriteprotect_range).
        """
        edges = read_maps(self.vm, self.pid).start
        edges = edges[edges < _USER_END].astype(np.int64)
        end = start + length_bytes
        first = np.searchsorted(edges, start, side="right")
        inner = edges[ranges(first, np.searchsorted(edges, end, side="left") - first)]
        begins, ends = (np.sort(np.concatenate([each, inner])) for each in (start, end))
        return begins, ends - begins

    def lift(self, start: Int64s, length_bytes: Int64s) -> None:
        """Lift protection from ranges and wake their waiters.

        A range that has just been remapped is no longer registered (ENOENT). Its
        waiters are woken too, and with them all that wait in between: each retries
        its write.
        """
        results = self._write_protect(start, length_bytes, 0)
        gone = results == -errno.ENOENT
        self._require((results >= 0) | gone, results)
        if gone.any():
            self.wake(int(start[gone].min()), int((start + length_bytes)[gone].max()))

    def _write_protect(self, start: Int64s, length_bytes: Int64s, mode: int) -> Int64s:
        words = np.empty((len(start), 3), dtype=np.uint64)
        words[:, 0], words[:, 1], words[:, 2] = start, length_bytes, mode
        results = self._ioctls(_UFFDIO_WRITEPROTECT, words)
        for _ in range(_MOST_TRIES):
            again = results == -errno.EAGAIN
            if not again.any():
                break
            # A discard is just beginning (mmap_changing): it goes on once its message is read.
            with self._reading:
                self._unserved.append(self._read_faults())
            time.sleep(_RETRY_S)
            results[again] = self._ioctls(_UFFDIO_WRITEPROTECT, words[again])
        return results

    def _ioctls(self, request: int, words: npt.NDArray[np.uint64]) -> Int64s:
        """Make one call for each row of `words`, its argument; results, -errno for failures."""
        arguments = words.ctypes.data + np.arange(len(words)) * words.strides[0]
        return run_calls(call_columns(NR.IOCTL, self.fd, request, arguments))

    def fill(
        self, span: tuple[int, int], target: Int64s, source: Int64s, length_bytes: Int64s
    ) -> None:
        """Copy ranges of our own memory into untouched pages in `span` of the process.

        All int64, shape (n,); `span` is (start, end), mapped privately. Each page is copied
        once, into a new page that is not cleared first. Raises OSError if any copy fails;
        pages filled before stay filled.
        """
        # SAFETY: a thread that touches a missing page of the span meanwhile would wait: only
        # for scratch memory of ours. A kill closes the descriptor, and no thread waits longer.
        start, size_bytes = span[0], span[1] - span[0]
        self._ioctl(_UFFDIO_REGISTER, start, size_bytes, _REGISTER_MODE_MISSING)
        faults.reached("missing-registered")
        try:
            words = np.zeros((len(target), 5), dtype=np.uint64)
            words[:, 0], words[:, 1], words[:, 2] = target, source, length_bytes
            words[:, 3] = _COPY_MODE_DONTWAKE
            results = self._ioctls(_UFFDIO_COPY, words)
        finally:
            self._ioctl(_UFFDIO_UNREGISTER, start, size_bytes)
        self._require(results >= 0, results, "UFFDIO_COPY")

    def _require(
        self, done: npt.NDArray[np.bool_], results: Int64s, name: str = "UFFDIO_WRITEPROTECT"
    ) -> None:
        if not done.all():
            error = -int(results[~done][0])
            self._raise(OSError(error, f"{name}: {os.strerror(error)}"))

    def wake(self, start: int, end: int) -> None:
        """Wake every thread that waits for a page in [start, end); it retries its write."""
        self._ioctl(_UFFDIO_WAKE, start, end - start)

    def faults(self) -> Int64s:
        """Page addresses of the write faults that wait to be served (does not block)."""
        with self._reading:
            found = [*self._unserved, self._read_faults()]
            self._unserved.clear()
        self._lift_removed()
        return np.concatenate(found)

    def _lift_removed(self) -> None:
        """Lift protection from the pages being discarded, so that no gate holds them."""
        with self._reading:
            removed, self._removed = self._removed, []
        if not removed:
            return
        start, end = np.array(removed, dtype=np.int64).T
        results = self._write_protect(start, end - start, 0)
        if (results == -errno.ENOENT).any():
            # A part was remapped meanwhile: the rest is still lifted.
            self.lift(*self._by_mapping(start, end - start))
        else:
            self._require(results >= 0, results)

    @property
    def has_unserved(self) -> bool:
        """Whether faults or discards were read and are still to be handled."""
        return bool(self._unserved or self._removed)

    def _read_faults(self) -> Int64s:
        """Addresses of faults in the waiting messages; a discard goes on once its own is read."""
        try:
            data = os.read(self.fd, _MESSAGE_BYTES * 64)
        except BlockingIOError:
            return np.empty(0, dtype=np.int64)
        found = np.frombuffer(data, dtype=np.uint64).reshape(-1, _MESSAGE_BYTES // 8)
        removes = found[(found[:, 0] & np.uint64(0xFF)) == _EVENT_REMOVE]
        self._removed.extend((int(start), int(end)) for start, end in removes[:, 1:3].tolist())
        is_fault = (found[:, 0] & np.uint64(0xFF)) == _EVENT_PAGEFAULT
        addresses = found[is_fault, 2] & ~np.uint64(PAGE_BYTES - 1)
        return np.asarray(addresses, dtype=np.int64)

    def _ioctl(self, request: int, *words: int) -> None:
        try:
            syscalls.ioctl(self.fd, request, _Words(*words))
        except OSError as error:
            self._raise(error)

    def _raise(self, error: OSError) -> NoReturn:
        if error.errno in _GONE and not _alive(self.pid):
            raise VmGoneError(self.vm, "the VM's process ended", pid=self.pid) from error
        raise error


def _known_features(fd: int) -> int:
    """The features that this kernel has; `fd` cannot be used for anything else afterwards."""
    words = _Words(_UFFD_API, 0, 0, 0)
    with suppress(OSError):
        syscalls.ioctl(fd, _UFFDIO_API, words)
    return int(words[1])


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            return bool(maps.read(1))
    except OSError:
        return False


def _close_in_child() -> None:
    for userfault in list(_open):
        userfault.close()


os.register_at_fork(after_in_child=_close_in_child)


class Resolver:
    """Serves the faults of one protected VM, so that no writer waits long.

    A thread lifts each faulting page's protection at once. The merge holds `gate()`
    while it verifies and remaps: faults then wait. The resolver calls `beat` to show
    that it lives, at least every RESOLVER_IDLE_MS.
    """

    def __init__(self, userfault: Userfault, beat: Callable[[], None]) -> None:
        self._userfault = userfault
        self._beat = beat
        self._lock = threading.Lock()
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="vmdedup-resolver", daemon=True)
        self.lifted_pages = 0
        self.failure: BaseException | None = None

    def __enter__(self) -> Resolver:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def gate(self) -> threading.Lock:
        """The lock that, while held, keeps every faulting writer waiting.

        Call `serve` before releasing it: then no writer waits for two gates.
        """
        return self._lock

    def serve(self) -> None:
        """Lift every page that a writer waits for now. The caller holds the gate's lock."""
        while len(addresses := self._userfault.faults()):
            self._userfault.lift(addresses, np.full(len(addresses), PAGE_BYTES))
            self.lifted_pages += len(addresses)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._userfault.fd, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        try:
            self._serve_until_stopped(poll)
        except (OSError, VmGoneError) as error:
            # The VM is gone, or will be released by closing the descriptor. The
            # merge sees `failure` before its next gate and gives the batch up.
            self.failure = error

    def _serve_until_stopped(self, poll: select.poll) -> None:
        with urgent():
            while True:
                ready = {fd for fd, _ in poll.poll(RESOLVER_IDLE_MS)}
                with self._lock:
                    self._beat()
                    if self._userfault.fd in ready or self._userfault.has_unserved:
                        self.serve()
                if self._stop_read in ready:
                    return
