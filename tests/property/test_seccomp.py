"""What filters may answer, against an interpreter that knows every word."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.filters import ALLOW, ERRNO, KILL, LOG, TRAP, allow_list, answers, program
from vmdedup.inject.seccomp import (
    ARCH_X86_64,
    CALLS,
    Call,
    UndecidableError,
    denial,
    possible_answers,
    strictest,
)
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.property

_WORD = 0xFFFF_FFFF
_LOADS = (0x20, 0x80, 0x00, 0x60)
_ARITHMETIC = (0x00, 0x10, 0x20, 0x40, 0x50, 0x60, 0x70, 0xA0)
Row = tuple[int, int, int, int]


def naive(code: bytes, data: bytes) -> int:
    """One run of a filter, word for word as net/core/filter.c described it of old."""
    rows = list(struct.iter_unpack("=HBBI", code))
    a = x = at = 0
    memory = [0] * 16
    while True:
        op, yes, no, k = rows[at]
        at += 1
        kind, by = op & 7, x if op & 8 else k
        if kind == 6:
            return a if op & 0x10 else k
        if kind in (0, 1):
            mode = op & 0xE0
            value = {0x00: k, 0x80: 64, 0x60: memory[k % 16]}.get(mode)
            if mode == 0x20:
                (value,) = struct.unpack_from("=I", data, k)
            assert value is not None
            a, x = (value, x) if kind == 0 else (a, value)
        elif kind in (2, 3):
            memory[k] = a if kind == 2 else x
        elif kind == 7:
            a, x = (x, x) if op & 0x80 else (a, a)
        elif kind == 4:
            shift = by % 32
            results = {
                0x00: a + by,
                0x10: a - by,
                0x20: a * by,
                0x30: a // by if by else 0,
                0x40: a | by,
                0x50: a & by,
                0x60: a << shift,
                0x70: a >> shift,
                0x80: -a,
                0xA0: a ^ by,
            }
            if op & 0xF0 == 0x30 and not by:
                return 0
            a = results[op & 0xF0] % (1 << 32)
        elif op & 0xF0 == 0:
            at += k
        else:
            tests = {0x10: a == by, 0x20: a > by, 0x30: a >= by, 0x40: bool(a & by)}
            at += yes if tests[op & 0xF0] else no


def _row(chance: random.Random, left: int) -> Row:
    """An instruction that `left` others follow, the last of which returns."""
    k = chance.choice([chance.getrandbits(32), chance.randrange(100), int(NR.MMAP), 1 << 31])
    kind = chance.randrange(9)
    way = chance.randrange(left), chance.randrange(left)
    by_x = chance.choice([0, 8])
    rows: list[Row] = [
        (chance.choice([0x20, 0x20, 0x80, 0x00, 0x60]), 0, 0, k),
        (chance.choice([0x01, 0x61, 0x81]), 0, 0, k),
        (chance.choice([0x02, 0x03]), 0, 0, k % 16),
        (0x04 | chance.choice(_ARITHMETIC) | by_x, 0, 0, k),
        (chance.choice([0x84, 0x34, 0x3C]), 0, 0, k or 1),
        (0x05 | chance.choice([0x10, 0x20, 0x30, 0x40]) | by_x, *way, k),
        (0x05, 0, 0, way[0]),
        (chance.choice([0x07, 0x87]), 0, 0, 0),
        (0x06, 0, 0, chance.choice([ALLOW, KILL, ERRNO | 1, LOG, TRAP])),
    ]
    op, yes, no, k = rows[kind]
    if op & 0xE7 == 0x20:
        k = k % 16 * 4
    if op & 0xE6 == 0x60:
        k %= 16
    if op in (0x64, 0x74):
        k %= 32
    return op, yes, no, k


def programs(seed: int, length: int) -> bytes:
    chance = random.Random(seed)
    rows = [_row(chance, length - index) for index in range(length)]
    return program([*rows, chance.choice([(0x06, 0, 0, ALLOW), (0x16, 0, 0, 0)])])


words = st.one_of(st.sampled_from([0, 1, 3, 1 << 31, 1 << 63]), st.integers(0, 2**64 - 1))


@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.lists(st.one_of(st.none(), words), max_size=6),
    st.lists(words, min_size=6, max_size=6),
    words,
)
def test_what_is_not_known_is_followed_both_ways(
    seed: int, length: int, known: list[int | None], found: list[int], made_at: int
) -> None:
    """Whatever the call is in the end, its answer was among the possible ones."""
    code = programs(seed, length)
    call = Call(NR.MMAP, tuple(known))
    for index, value in enumerate(known):
        if value is not None:
            found[index] = value
    data = struct.pack("=IIQ6Q", NR.MMAP, ARCH_X86_64, made_at, *found)
    try:
        possible = possible_answers(code, call)
    except UndecidableError:
        assert strictest([code], call) == KILL
    else:
        answer = naive(code, data)
        assert answer in possible
        assert _signed(strictest([code], call)) <= _signed(answer & 0xFFFF_0000)


def _signed(action: int) -> int:
    return struct.unpack("=i", struct.pack("=I", action))[0]  # type: ignore[no-any-return]


@given(st.integers(0, 2**32), st.lists(words, min_size=6, max_size=6))
def test_where_all_is_known_there_is_one_answer(seed: int, arguments: list[int]) -> None:
    code = programs(seed, 20)
    try:
        possible = possible_answers(code, Call(NR.MMAP, tuple(arguments)))
    except UndecidableError:
        return  # it asks where the call is made from, and returns that
    data = struct.pack("=IIQ6Q", NR.MMAP, ARCH_X86_64, 0x7F00_0000_1234, *arguments)
    assert naive(code, data) in possible
    if not any(op & 0xE7 == 0x20 and k in (8, 12) for op, _, _, k in _rows(code)):
        assert possible == {naive(code, data)}


def _rows(code: bytes) -> list[Row]:
    return list(struct.iter_unpack("=HBBI", code))


@given(st.permutations([KILL, 0, TRAP, ERRNO | 1, 0x7FC0_0000, 0x7FF0_0000, LOG, ALLOW]))
def test_of_several_filters_the_strictest_counts(order: list[int]) -> None:
    """The order of kernel/seccomp.c: KILL_PROCESS, KILL_THREAD, TRAP, ERRNO, … ALLOW."""
    precedence = [KILL, 0, TRAP, ERRNO, 0x7FC0_0000, 0x7FF0_0000, LOG, ALLOW]
    for count in range(1, len(order) + 1):
        filters = [answers({}, answer) for answer in order[:count]]
        actions = [answer & 0xFFFF_0000 for answer in order[:count]]
        assert strictest(filters, CALLS[0]) == min(actions, key=precedence.index)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name}{call.arguments}")
def test_each_call_that_is_not_let_through_is_named(call: Call) -> None:
    others = {each.number for each in CALLS} - {call.number}
    assert denial((allow_list(others),)) == f"{call.name} with KILL_PROCESS"
    assert denial((allow_list(others, LOG),)) is None
    milder = denial((answers({call.number: ERRNO | 1}, ALLOW),))
    all_may_fail = all(each.may_fail for each in CALLS if each.number == call.number)
    assert milder == (None if all_may_fail else f"{call.name} with ERRNO")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(0x20, 0, 0, 0)],
        [(0x20, 0, 0, 8), (0x16, 0, 0, 0)],
        [(0x02, 0, 0, 16), (0x06, 0, 0, ALLOW)],  # a word of memory that is not there
        [(0x40, 0, 0, 0), (0x06, 0, 0, ALLOW)],  # a load relative to X
        [(0x20, 0, 0, 64), (0x06, 0, 0, ALLOW)],  # a load behind the data
        [(0x94, 0, 0, 1), (0x06, 0, 0, ALLOW)],  # a remainder
        [
            (0x20, 0, 0, 8),
            (0x07, 0, 0, 0),
            (0x3C, 0, 0, 0),
            (0x06, 0, 0, ALLOW),
        ],  # by what is not known
        [(0x55, 0, 0, 0), (0x06, 0, 0, ALLOW)],  # another jump
    ],
)
def test_a_filter_that_can_not_be_followed_is_one_that_denies(rows: list[Row]) -> None:
    assert denial((program(rows),)) == f"{CALLS[0].name} with KILL_PROCESS"


def test_ways_that_meet_are_followed_once() -> None:
    """Else each of these jumps would double their number."""
    unknown: Row = (0x20, 0, 0, 8)
    rows = [unknown, *[(0x15, 0, 0, k) for k in range(1000)], (0x06, 0, 0, ALLOW)]
    assert possible_answers(program(rows), CALLS[0]) == {ALLOW}
    assert denial(()) is None
