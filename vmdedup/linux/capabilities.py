"""Capabilities: the needed ones, their purpose, and giving up all others.

Owns the list that the systemd unit and docs/security.md repeat. Promises that
after `keep_only` neither this thread nor its children can get more again. The
other capabilities leave every set, the bounding set too if that is allowed, and
no program that is run can gain any. Capabilities belong to threads: call it
before the first thread is started.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_VERSION_3 = 0x20080522
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4


class Capability(IntEnum):
    """The capabilities of include/uapi/linux/capability.h that matter here."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYS_NICE = 23

    @property
    def label(self) -> str:
        """The name in the kernel's documentation."""
        return f"CAP_{self.name}"


PURPOSE = {
    Capability.SYS_PTRACE: "read QEMU's memory and mappings, run system calls inside it",
    Capability.SYS_ADMIN: "tell swapped pages from markers (pagemap), open RAM that only a"
    " mapping shows (map_files), lend the store through a read-only mount",
    Capability.DAC_OVERRIDE: "reach the monitors and RAM files of QEMUs that other users run",
    Capability.SYS_NICE: "split huge pages, so that merged memory in them is freed"
    " (process_madvise)",
    Capability.CHOWN: "give the API socket to `api_group`",
}
"""The capabilities that the engine needs, found by leaving out one at a time."""

ENGINE = frozenset(PURPOSE)
GUARDIAN = frozenset({Capability.SYS_PTRACE, Capability.DAC_OVERRIDE})
"""To see if QEMU's thread is idle, and to reach the monitor of a VM to be resumed."""
API_SERVER: frozenset[Capability] = frozenset()
"""No capabilities: the engine hands over its sockets open."""
COUNTING = frozenset({Capability.DAC_OVERRIDE})
"""To read disk images of QEMUs that other users run."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    """Effective, permitted and inheritable; two of them hold 64 capabilities."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


_libc = ctypes.CDLL(None, use_errno=True)


def held() -> frozenset[int]:
    """The capabilities this thread may use. Raises OSError."""
    sets = (_Sets * 2)()
    _check(_libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), sets), "capget")
    bits = sets[0].permitted | sets[1].permitted << 32
    return frozenset(number for number in range(64) if bits >> number & 1)


def lacking() -> list[Capability]:
    """The capabilities that the engine needs and this thread lacks."""
    return [each for each in PURPOSE if each not in held()]


def keep_only(kept: Collection[int]) -> None:
    """Give up every capability but these, for good. Raises OSError.

    It adds none: capabilities in `kept` that are not held stay so.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        if number not in kept and _prctl(_PR_CAPBSET_READ, number):
            try:
                _prctl(_PR_CAPBSET_DROP, number)
            except PermissionError:
                # Without CAP_SETPCAP. No program gains from it: no_new_privs is set.
                break
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    bits = sum(1 << number for number in held() & frozenset(kept))
    sets = (_Sets * 2)()
    for index, half in enumerate((bits & 0xFFFF_FFFF, bits >> 32)):
        sets[index].effective = sets[index].permitted = half
    _check(_libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), sets), "capset")


def started_with(kept: Collection[int], start: Callable[[], T]) -> T:
    """The result of `start`, called in a thread that has only these capabilities.

    So a process can be started with fewer capabilities than this thread must keep.
    """

    def call() -> T:
        keep_only(kept)
        return start()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _prctl(option: int, argument: int) -> int:
    arguments = (ctypes.c_ulong(word) for word in (argument, 0, 0, 0))
    return _check(_libc.prctl(option, *arguments), f"prctl({option})")


def _check(result: int, name: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result
