"""Which parts of a VM's memory are registered for merging, with madvise's contract.

Pure. Owns, per VM, a set of registered page ranges for each memory backend, and
madvise's contract for changing it. Promises that a change is a value: nothing is
registered or unregistered until the caller keeps the new `Registration`, so an
unmerge that fails leaves the range registered, as in KSM. Refuses, with the
error number madvise(2) would give:

    EINVAL   unknown backend, offset or length that is negative or not whole pages,
             an offset outside the backend, a host that cannot merge at all
    EAGAIN   too little memory now
    ENOMEM   (no refusal) part of the range is not there; the rest is done

Registering is accepted "even if the range cannot contain any pages which KSM could
actually merge" (Documentation/admin-guide/mm/ksm.rst). So is unregistering a range that
was never registered. madvise rounds an odd length up; we refuse it, because an offset
in a backend that is not whole pages is a mistake.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vmdedup.errors import UsageError, VmError
from vmdedup.units import MIB, PAGE_BYTES

Verb = Literal["register", "unregister"]


class InvalidRangeError(UsageError):
    """EINVAL: the request names no range that could be (un)registered; nothing changed."""

    errno = errno.EINVAL

    def __init__(self, vm: str, backend: str, why: str) -> None:
        super().__init__(f"{vm}: backend {backend}: {why} (EINVAL)")
        self.vm = vm
        self.backend = backend
        self.why = why


class TryAgainError(VmError):
    """EAGAIN: the request needs more memory than is available now; nothing changed."""

    errno = errno.EAGAIN

    def __init__(self, vm: str, what: str, needed_bytes: int, available_bytes: int) -> None:
        needed, available = -(-needed_bytes // MIB), available_bytes // MIB
        super().__init__(
            vm,
            f"{what} needs {needed} MiB and {available} MiB are available; "
            "try again later or with a shorter range (EAGAIN)",
        )
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


@dataclass(frozen=True, slots=True)
class Intervals:
    """A set of pages as ascending half-open ranges that neither overlap nor touch.

    Make one with `of`; the operators are those of a set.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Intervals:
        """A set of any ranges, in any order; empty ones are dropped, others are joined."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if start >= end:
                continue
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], end))
            else:
                joined.append((start, end))
        return cls(tuple(joined))

    @property
    def pages(self) -> int:
        """How many pages the set holds."""
        return sum(end - start for start, end in self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.ranges)

    def __or__(self, other: Intervals) -> Intervals:
        return Intervals.of((*self.ranges, *other.ranges))

    def __sub__(self, other: Intervals) -> Intervals:
        left: list[tuple[int, int]] = []
        taken = iter((*other.ranges, (_ENDLESS, _ENDLESS)))
        hole = next(taken)
        for start, end in self.ranges:
            at = start
            while hole[1] <= at:
                hole = next(taken)
            while hole[0] < end:
                left.append((at, hole[0]))
                at = hole[1]
                if at >= end:
                    break
                hole = next(taken)
            left.append((at, end))
        return Intervals.of(left)

    def __and__(self, other: Intervals) -> Intervals:
        return self - (self - other)

    def mask(self, pages: int) -> NDArray[np.bool_]:
        """The set as a mask over `pages` pages; pages beyond it are cut off."""
        mask = np.zeros(pages, dtype=np.bool_)
        for start, end in self.ranges:
            mask[start:end] = True
        return mask


_ENDLESS = 2**62


@dataclass(frozen=True, slots=True)
class RegistrableBackend:
    """A memory backend, mergeable or not, with the properties that the registry needs."""

    id: str
    pages: int
    merge: bool
    """The backend's `merge` property: whether it is registered from the start."""
    never_merges: str | None = None
    """Why none of it will ever merge; `None` if it may. It can be registered even so."""
    holes: Intervals = Intervals()
    """Pages that are not there (not plugged in)."""

    @property
    def there(self) -> Intervals:
        """The pages that are there."""
        return Intervals.of([(0, self.pages)]) - self.holes

    @property
    def registered_at_first(self) -> Intervals:
        """Pages that are registered without a request."""
        return self.there if self.merge else Intervals()


@dataclass(frozen=True)
class VmRegistration:
    """The registered pages of one VM's backends, by backend id."""

    vm: str
    backends: Mapping[str, RegistrableBackend] = field(default_factory=dict)
    registered: Mapping[str, Intervals] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        """All registered pages."""
        return sum(ranges.pages for ranges in self.registered.values())

    def following(self, backends: Iterable[RegistrableBackend]) -> VmRegistration:
        """The same VM with its present backends (memory was plugged in or out).

        A backend that is new, or is another one under an old id, starts from its
        `merge` property. Others keep the ranges registered by hand, as far as the memory
        is still there. Memory plugged into a known backend counts as new.
        """
        now = {backend.id: backend for backend in backends}
        registered = {}
        for name, backend in now.items():
            before = self.backends.get(name)
            if before is None or before.merge != backend.merge:
                registered[name] = backend.registered_at_first
                continue
            plugged_in = backend.registered_at_first - before.there
            registered[name] = (self.registered[name] | plugged_in) & backend.there
        return VmRegistration(self.vm, now, registered)

    def mask(self, regions: Sequence[tuple[str, int]]) -> NDArray[np.bool_]:
        """Mask over a page space of these regions, (backend id, pages) in order."""
        parts = [
            self.registered.get(name, Intervals()).mask(region_pages)
            for name, region_pages in regions
        ]
        return np.concatenate((np.zeros(0, dtype=np.bool_), *parts))


@dataclass(frozen=True)
class Change:
    """The outcome of a request. Keep `registration` once it is carried out."""

    registration: VmRegistration
    backend: str
    added: Intervals = Intervals()
    """Newly registered pages of the backend."""
    removed: Intervals = Intervals()
    """Pages no longer registered: unmerge them before keeping `registration`."""
    missing: Intervals = Intervals()
    """Requested pages that are not there."""
    never_merges: str | None = None
    """Why registered pages will not merge; `None` if they may."""

    @property
    def errno(self) -> int:
        """0, or ENOMEM if part of the range is not there and only the rest is done."""
        return errno.ENOMEM if self.missing else 0

    @property
    def notice(self) -> str | None:
        """One line for the user if pages are missing or will not merge; otherwise `None`."""
        said = []
        if self.missing:
            gone = self.missing.pages
            said.append(f"{gone} pages of the range are not there, the rest was done (ENOMEM)")
        if self.never_merges is not None:
            said.append(f"registered, but it will not merge: {self.never_merges}")
        return f"{self.registration.vm}: {self.backend}: {'; '.join(said)}" if said else None


def first_registration(vm: str, backends: Iterable[RegistrableBackend]) -> VmRegistration:
    """The registration of a VM just attached, by each backend's `merge` property."""
    return VmRegistration(vm).following(backends)


def register(
    registration: VmRegistration,
    backend: str,
    offset_bytes: int = 0,
    length_bytes: int | None = None,
    *,
    available_bytes: int,
    bytes_per_page: int,
) -> Change:
    """Register [offset, offset + length) of a backend; without a length, to its end.

    `bytes_per_page` is the memory that we need for each newly registered page. Raises
    InvalidRangeError, TryAgainError.
    """
    known, wanted = _wanted(registration, backend, offset_bytes, length_bytes)
    added = (wanted & known.there) - registration.registered[backend]
    require_memory(registration.vm, "registering", added.pages * bytes_per_page, available_bytes)
    return Change(
        _with(registration, backend, registration.registered[backend] | added),
        backend,
        added=added,
        missing=wanted - known.there,
        never_merges=known.never_merges,
    )


def unregister(
    registration: VmRegistration,
    backend: str,
    offset_bytes: int = 0,
    length_bytes: int | None = None,
) -> Change:
    """Unregister [offset, offset + length) of a backend; without a length, to its end.

    The caller unmerges `removed`, after `require_memory` for its merged pages,
    and then keeps the registration. Raises InvalidRangeError.
    """
    known, wanted = _wanted(registration, backend, offset_bytes, length_bytes)
    before = registration.registered[backend]
    return Change(
        _with(registration, backend, before - wanted),
        backend,
        removed=before & wanted,
        missing=wanted - known.there,
    )


def require_host(vm: str, backend: str, cannot_merge: str | None) -> None:
    """Raise InvalidRangeError if `cannot_merge` says why this host cannot merge at all."""
    if cannot_merge is not None:
        raise InvalidRangeError(vm, backend, f"this host cannot merge: {cannot_merge}")


def require_memory(vm: str, what: str, needed_bytes: int, available_bytes: int) -> None:
    """Raise TryAgainError if `needed_bytes` for `what` are not available now."""
    if needed_bytes > available_bytes:
        raise TryAgainError(vm, what, needed_bytes, available_bytes)


def _with(registration: VmRegistration, backend: str, ranges: Intervals) -> VmRegistration:
    registered = {**registration.registered, backend: ranges}
    return VmRegistration(registration.vm, registration.backends, registered)


def _wanted(
    registration: VmRegistration, backend: str, offset_bytes: int, length_bytes: int | None
) -> tuple[RegistrableBackend, Intervals]:
    """The requested backend and page range, which may reach beyond its end."""
    vm = registration.vm
    known = registration.backends.get(backend)
    if known is None:
        names = ", ".join(sorted(registration.backends)) or "none"
        raise InvalidRangeError(vm, backend, f"no such backend; this VM has {names}")
    size_bytes = known.pages * PAGE_BYTES
    if length_bytes is None:
        length_bytes = max(0, size_bytes - offset_bytes)
    for name, value in (("offset", offset_bytes), ("length", length_bytes)):
        if value < 0 or value % PAGE_BYTES:
            why = f"{name} {value} must be a multiple of {PAGE_BYTES} and not negative"
            raise InvalidRangeError(vm, backend, why)
    if offset_bytes >= size_bytes:
        why = f"offset {offset_bytes} is outside the backend, which has {size_bytes} bytes"
        raise InvalidRangeError(vm, backend, why)
    first = offset_bytes // PAGE_BYTES
    return known, Intervals.of([(first, first + length_bytes // PAGE_BYTES)])
