"""Registration against naive sets of pages, and madvise's contract."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.errors import UsageError, VmError
from vmdedup.policy.registry import (
    Intervals,
    InvalidRangeError,
    RegistrableBackend,
    TryAgainError,
    VmRegistration,
    first_registration,
    register,
    require_host,
    require_memory,
    unregister,
)
from vmdedup.units import MIB, PAGE_BYTES

pytestmark = pytest.mark.property

TOP = 24
RANGES = st.lists(st.tuples(st.integers(0, TOP), st.integers(0, TOP)), max_size=8)
PLENTY = 1 << 40


def naive(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for start, end in ranges for page in range(start, end)}


def pages_of(intervals: Intervals) -> set[int]:
    return naive(list(intervals))


def is_normal(intervals: Intervals) -> bool:
    edges = [edge for both in intervals.ranges for edge in both]
    return edges == sorted(set(edges))


@given(RANGES, RANGES)
def test_intervals_are_sets_of_pages(
    some: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    one, other = Intervals.of(some), Intervals.of(others)
    mine, theirs = naive(some), naive(others)
    for result, expected in (
        (one, mine),
        (one | other, mine | theirs),
        (one - other, mine - theirs),
        (one & other, mine & theirs),
    ):
        assert is_normal(result)
        assert pages_of(result) == expected
        assert result.pages == len(expected)
        assert bool(result) == bool(expected)
    assert np.flatnonzero(one.mask(TOP)).tolist() == sorted(mine)
    assert np.flatnonzero(one.mask(7)).tolist() == sorted(page for page in mine if page < 7)
    assert (one == other) == (mine == theirs)


BACKENDS = st.lists(
    st.tuples(st.integers(1, TOP), st.booleans(), RANGES), min_size=1, max_size=3
).map(
    lambda all_: [
        RegistrableBackend(f"m{number}", pages, merge, holes=Intervals.of(holes))
        for number, (pages, merge, holes) in enumerate(all_)
    ]
)
REQUESTS = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 2),
        st.integers(0, TOP),
        st.one_of(st.none(), st.integers(0, TOP)),
    ),
    max_size=8,
)


@given(BACKENDS, REQUESTS, BACKENDS)
def test_registration_is_a_set_of_pages_for_each_backend(
    backends: list[RegistrableBackend],
    requests: list[tuple[bool, int, int, int | None]],
    later: list[RegistrableBackend],
) -> None:
    registration = first_registration("vm", backends)
    there = {one.id: set(range(one.pages)) - pages_of(one.holes) for one in backends}
    model = {one.id: set(there[one.id]) if one.merge else set() for one in backends}
    for adds, number, first, length in requests:
        name = f"m{number}"
        if name not in model or first >= registration.backends[name].pages:
            continue
        end = registration.backends[name].pages if length is None else first + length
        wanted = set(range(first, end))
        size = None if length is None else length * PAGE_BYTES
        if adds:
            change = register(
                registration,
                name,
                first * PAGE_BYTES,
                size,
                available_bytes=PLENTY,
                bytes_per_page=24,
            )
            assert pages_of(change.added) == (wanted & there[name]) - model[name]
            assert not change.removed
            model[name] |= wanted & there[name]
        else:
            change = unregister(registration, name, first * PAGE_BYTES, size)
            assert pages_of(change.removed) == wanted & model[name]
            assert not change.added
            model[name] -= wanted
        assert pages_of(change.missing) == wanted - there[name]
        assert change.errno == (errno.ENOMEM if wanted - there[name] else 0)
        assert (change.notice is None) == (change.errno == 0)
        registration = change.registration
        assert {n: pages_of(r) for n, r in registration.registered.items()} == model
        assert registration.pages == sum(map(len, model.values()))

    regions = [(one.id, one.pages) for one in backends]
    mask = registration.mask(regions)
    expected = [page in model[one.id] for one in backends for page in range(one.pages)]
    assert mask.dtype == np.bool_
    assert mask.tolist() == expected

    followed = registration.following(later)
    for one in later:
        now = set(range(one.pages)) - pages_of(one.holes)
        before = registration.backends.get(one.id)
        fresh = now if one.merge else set()
        if before is None or before.merge != one.merge:
            assert pages_of(followed.registered[one.id]) == fresh
        else:
            new = fresh - there[one.id]
            assert pages_of(followed.registered[one.id]) == (model[one.id] | new) & now
    assert set(followed.registered) == {one.id for one in later}


ONE = RegistrableBackend("ram", 8, merge=True)
OFF = RegistrableBackend("off", 8, merge=False)
NEVER = RegistrableBackend("rom", 4, merge=False, never_merges="read-only memory")
VM = first_registration("vm", [ONE, OFF, NEVER])


@pytest.mark.parametrize(
    ("backend", "offset", "length", "says"),
    [
        ("nope", 0, None, "no such backend; this VM has off, ram, rom"),
        ("off", 1, None, "offset 1"),
        ("off", 0, PAGE_BYTES - 1, "length 4095"),
        ("off", -PAGE_BYTES, PAGE_BYTES, "offset -4096"),
        ("off", 0, -PAGE_BYTES, "length -4096"),
        ("off", 8 * PAGE_BYTES, PAGE_BYTES, "outside the backend"),
        ("off", 2**70, None, "outside the backend"),
    ],
)
def test_what_names_no_range_is_einval(
    backend: str, offset: int, length: int | None, says: str
) -> None:
    def registering() -> None:
        register(VM, backend, offset, length, available_bytes=PLENTY, bytes_per_page=24)

    for attempt in (registering, lambda: unregister(VM, backend, offset, length)):
        with pytest.raises(InvalidRangeError, match=says) as raised:
            attempt()
        assert isinstance(raised.value, UsageError)
        assert raised.value.errno == errno.EINVAL
        assert "EINVAL" in str(raised.value)
        assert (raised.value.vm, raised.value.backend) == ("vm", backend)


def test_a_host_that_can_not_merge_is_einval() -> None:
    with pytest.raises(InvalidRangeError, match=r"vm: backend off: .* no ptrace \(EINVAL\)"):
        require_host("vm", "off", "no ptrace")
    require_host("vm", "off", None)


def test_too_little_memory_now_is_eagain_and_succeeds_later() -> None:
    with pytest.raises(TryAgainError, match="try again") as raised:
        register(VM, "off", available_bytes=8 * 24 - 1, bytes_per_page=24)
    assert isinstance(raised.value, VmError)
    assert raised.value.errno == errno.EAGAIN
    assert raised.value.needed_bytes == 8 * 24
    change = register(VM, "off", available_bytes=8 * 24, bytes_per_page=24)
    assert change.added.pages == 8
    # What is registered already needs nothing more.
    again = register(change.registration, "off", available_bytes=0, bytes_per_page=24)
    assert not again.added
    with pytest.raises(TryAgainError, match="unregistering needs 2 MiB and 1 MiB"):
        require_memory("vm", "unregistering", 2 * MIB, MIB)


def test_a_range_with_gaps_registers_the_rest_and_says_enomem() -> None:
    holey = first_registration(
        "vm", [RegistrableBackend("m", 8, merge=False, holes=Intervals.of([(2, 4)]))]
    )
    change = register(
        holey, "m", PAGE_BYTES, 9 * PAGE_BYTES, available_bytes=PLENTY, bytes_per_page=24
    )
    assert change.added == Intervals.of([(1, 2), (4, 8)])
    assert change.missing == Intervals.of([(2, 4), (8, 10)])
    assert change.errno == errno.ENOMEM
    assert change.notice is not None
    assert "4 pages of the range are not there" in change.notice


def test_what_will_never_merge_is_registered_with_the_reason() -> None:
    change = register(VM, "rom", available_bytes=PLENTY, bytes_per_page=24)
    assert change.registration.registered["rom"].pages == 4
    assert change.errno == 0
    assert change.notice is not None
    assert "read-only memory" in change.notice


def test_unregistering_what_never_was_registered_is_accepted() -> None:
    change = unregister(VM, "off")
    assert not change.removed
    assert change.registration == VM
    assert change.notice is None


def test_a_change_changes_nothing_until_it_is_kept() -> None:
    change = unregister(VM, "ram", 2 * PAGE_BYTES, 3 * PAGE_BYTES)
    assert change.removed == Intervals.of([(2, 5)])
    assert VM.registered["ram"].pages == 8
    assert change.registration.registered["ram"] == Intervals.of([(0, 2), (5, 8)])


def test_a_backend_by_hand_survives_a_hot_plug_of_another() -> None:
    by_hand = unregister(VM, "ram", 0, 4 * PAGE_BYTES).registration
    dimm = RegistrableBackend("dimm1", 4, merge=True)
    plugged = by_hand.following([ONE, OFF, NEVER, dimm])
    assert plugged.registered["ram"] == Intervals.of([(4, 8)])
    assert plugged.registered["dimm1"].pages == 4
    assert "dimm1" not in plugged.following([ONE]).registered
    assert VmRegistration("vm").pages == 0
