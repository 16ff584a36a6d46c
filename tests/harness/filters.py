"""System call filters: small programs, to be installed in a process or judged."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Collection, Mapping

LOAD, EQUAL, GREATER, SET, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
NUMBER_AT, ARGUMENTS_AT = 0, 16
KILL, TRAP, ERRNO, USER_NOTIF, TRACE, LOG, ALLOW = (
    0x8000_0000,
    0x0003_0000,
    0x0005_0000,
    0x7FC0_0000,
    0x7FF0_0000,
    0x7FFC_0000,
    0x7FFF_0000,
)


def program(rows: Collection[tuple[int, int, int, int]]) -> bytes:
    """`struct sock_filter` of each: code, jump if true, jump if false, k."""
    return b"".join(struct.pack("=HBBI", *row) for row in rows)


def answers(special: Mapping[int, int], otherwise: int) -> bytes:
    """What is answered to some calls by their numbers, and to all others."""
    rows = [(LOAD, 0, 0, NUMBER_AT)]
    for number, answer in special.items():
        rows += [(EQUAL, 0, 1, number), (RETURN, 0, 0, answer)]
    return program([*rows, (RETURN, 0, 0, otherwise)])


def allow_list(numbers: Collection[int], otherwise: int = KILL) -> bytes:
    """Lets these calls through."""
    return answers(dict.fromkeys(numbers, ALLOW), otherwise)


def answers_argument(number: int, index: int, bits: int, answer: int) -> bytes:
    """Answers one call where its argument has one of these bits; lets all else through."""
    rows = [(LOAD, 0, 0, NUMBER_AT), (EQUAL, 0, 3, number)]
    at = ARGUMENTS_AT + 8 * index + (4 if bits >> 32 else 0)
    rows += [(LOAD, 0, 0, at), (SET, 0, 1, bits >> 32 or bits), (RETURN, 0, 0, answer)]
    return program([*rows, (RETURN, 0, 0, ALLOW)])


def install(code: bytes) -> None:
    """Put this thread, and what it starts, under a filter. Raises OSError."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    rows = ctypes.create_string_buffer(code, len(code))
    fprog = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(rows))
    )
    if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.addressof(fprog), 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
