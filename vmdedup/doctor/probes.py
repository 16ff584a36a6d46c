"""The kernel's features and our privileges, tried for real on a process of our own.

Owns the victim: an idle Python process, with a second thread that waits in
futex as QEMU's RCU thread does. The same code does to it everything that a merge
does to a QEMU: it runs system calls inside it, takes its userfaultfd, reads its
pagemap. Promises to end it on every way out. A feature that is masked in
the settings, or was not built, counts as absent.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from vmdedup.doctor.words import fine, note, problem
from vmdedup.errors import UnsupportedError, VmdedupError
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux import capabilities, realtime, syscalls
from vmdedup.linux.pagemap import has_pagemap_scan, zero_page_frame
from vmdedup.linux.syscalls import NR
from vmdedup.linux.userfaultfd import (
    FEATURE_WP_UNPOPULATED,
    SYNCHRONOUS_FEATURES,
    TRACKING_FEATURES,
    Userfault,
)
from vmdedup.models import CheckedThing
from vmdedup.remap import burst
from vmdedup.settings import Settings

_KERNEL, _PRIVILEGES = "kernel", "privileges"
_VICTIM = (
    "import sys, threading\n"
    "lock = threading.Lock()\n"
    "lock.acquire()\n"
    "second = threading.Thread(target=lock.acquire, daemon=True)\n"
    "second.start()\n"
    "print(second.native_id, flush=True)\n"
    "sys.stdin.read()\n"
)
_END_S = 5.0


@dataclass(frozen=True)
class _Tried:
    """Outcomes of the attempts inside the victim; `None` means that one worked."""

    injection: str | None
    stub: bool = False
    live: str | None = "not tried"
    absent: str | None = "not tried"
    tracking: str | None = "not tried"


def kernel_checks(settings: Settings) -> list[CheckedThing]:
    """Machine, capabilities, and each feature that merging uses."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        found = f"{sys.platform} on {platform.machine()}"
        return [problem(_KERNEL, "machine", found, "vmdedup needs x86-64 Linux")]
    tried = _try_inside_victim(settings)
    return [
        fine(_KERNEL, "machine", f"Linux {platform.release()}, x86-64"),
        *_processor_checks(),
        *_feature_checks(settings, tried),
        *_privilege_checks(tried),
    ]


def _processor_checks() -> Iterator[CheckedThing]:
    """A problem if vector instructions go wrong, as in QEMU 7.2's emulated AVX2."""
    if not sorts_rightly():
        remedy = "give an emulated CPU no AVX2 (-cpu SandyBridge), or emulate it by a newer QEMU"
        yield problem(_KERNEL, "processor", "it sorts numbers wrongly", remedy)


def sorts_rightly() -> bool:
    """Whether numpy, with the instructions it uses here, orders numbers as Python does."""
    numbers = np.random.default_rng(0).integers(0, 1 << 62, 4000)
    for count in (40, 200, 1000, len(numbers)):
        some = numbers[:count]
        if some[np.argsort(some)].tolist() != sorted(some.tolist()):
            return False
    return True


def _feature_checks(settings: Settings, tried: _Tried) -> list[CheckedThing]:
    return [
        _as_check(
            "userfaultfd write protection",
            _masked(settings, "userfaultfd-wp") or tried.live,
            "VMs are merged while they run",
            "VMs are merged only in short pauses; Linux 5.19 or newer merges live",
        ),
        _as_check(
            "protection of absent pages",
            _masked(settings, "wp-unpopulated") or tried.absent,
            "zero pages are unmerged without being read",
            "zero pages are read before they are unmerged; Linux 6.4 or newer spares that",
        ),
        _as_check(
            "asynchronous write protection",
            _masked(settings, "wp-async") or tried.tracking,
            "only pages that were written are read again",
            "every pass reads all memory again; Linux 6.7 or newer spares that",
        ),
        _as_check(
            "PAGEMAP_SCAN",
            _masked(settings, "pagemap-scan") or (None if has_pagemap_scan() else "not there"),
            "page tables are read by ranges",
            "page tables are read page by page; Linux 6.7 or newer is faster",
        ),
        _as_check(
            "executable memfd",
            _masked(settings, "stub") or (None if tried.stub else "denied"),
            "calls inside QEMU run as one program",
            "VMs are merged only in short pauses; allow QEMU's domain to map a memfd executable"
            " (SELinux, vm.memfd_noexec=0)",
        ),
        _as_check(
            "reading in place",
            _masked(settings, "in-place") or (None if tried.stub else "needs executable memfd"),
            "QEMU's idle thread reads and compares many pages where they are",
            "all pages are copied before they are read, which takes four times as long",
        ),
        _as_check(
            "compiled gates",
            _masked(settings, "compiled-gates") or (None if burst.is_available() else "not built"),
            "gates are closed by compiled code",
            "guests wait twice as long in a gate; install gcc and Python's headers"
            " (python3-dev), then install vmdedup again",
        ),
    ]


def _as_check(name: str, missing: str | None, works: str, remedy: str) -> CheckedThing:
    if missing is None:
        return fine(_KERNEL, name, works)
    return note(_KERNEL, name, missing, remedy)


def _masked(settings: Settings, feature: str) -> str | None:
    return None if feature not in settings.mask else "masked by the settings"


def _privilege_checks(tried: _Tried) -> Iterator[CheckedThing]:
    held = capabilities.held()
    for capability, purpose in capabilities.PURPOSE.items():
        if capability in held:
            yield fine(_PRIVILEGES, capability.label, purpose)
        elif capability == capabilities.Capability.SYS_PTRACE:
            yield problem(_PRIVILEGES, capability.label, "missing", f"run as root, to {purpose}")
        else:
            yield note(_PRIVILEGES, capability.label, "missing", f"run as root, to {purpose}")
    if tried.injection is None:
        yield fine(_PRIVILEGES, "calls in another process", "tried: they run")
    else:
        remedy = "run as root; kernel.yama.ptrace_scope must be below 3, and no seccomp filter"
        remedy += " (of a container, for instance) may deny ptrace"
        yield problem(_PRIVILEGES, "calls in another process", tried.injection, remedy)
    if realtime.is_allowed():
        yield fine(_PRIVILEGES, "real-time scheduling", "tried: allowed while a gate is closed")
    else:
        remedy = "guests wait longer in gates on a busy host; no RestrictRealtime= in a unit,"
        remedy += " CAP_SYS_NICE, and a cgroup with a real-time budget"
        yield note(_PRIVILEGES, "real-time scheduling", "denied", remedy)
    if zero_page_frame():
        yield fine(_PRIVILEGES, "page frame numbers", "readable in pagemap")
    else:
        remedy = "run as root (CAP_SYS_ADMIN); zero pages are told by their content until then"
        yield note(_PRIVILEGES, "page frame numbers", "hidden in pagemap", remedy)


def _try_inside_victim(settings: Settings) -> _Tried:
    try:
        with _victim() as (pid, tid), _thread_of(pid, tid, settings) as remote:
            if remote.call(NR.GETPID) != pid:
                return _Tried("a call returned something else than it should")
            return _Tried(
                injection=None,
                stub=remote.uses_stub,
                live=_try_userfault(remote, pid, SYNCHRONOUS_FEATURES),
                absent=_try_userfault(remote, pid, SYNCHRONOUS_FEATURES | FEATURE_WP_UNPOPULATED),
                tracking=_try_userfault(remote, pid, TRACKING_FEATURES),
            )
    except (VmdedupError, OSError) as error:
        return _Tried(str(error))


def _thread_of(pid: int, tid: int, settings: Settings) -> RemoteThread:
    return RemoteThread("the doctor's test process", pid, tid, stub=settings.has("stub"))


def _try_userfault(remote: RemoteThread, pid: int, features: int) -> str | None:
    """Why a userfaultfd of the victim cannot be had with these features; `None` if it can."""
    try:
        number = remote.call(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        pidfd = os.pidfd_open(pid)
        try:
            fd = syscalls.pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)
            remote.call(NR.CLOSE, number)
        Userfault("the doctor's test process", pid, fd, features).close()
    except (UnsupportedError, OSError) as error:
        return str(error)
    return None


@contextmanager
def _victim() -> Iterator[tuple[int, int]]:
    """Pid of a QEMU-like process for our purposes, and its second thread, which waits in futex."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _VICTIM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout is not None
            told = process.stdout.readline().strip()
            if not told.isdigit():
                raise VmdedupError("the test process (Python) could not be started")
            yield process.pid, int(told)
        finally:
            process.kill()
            process.wait(_END_S)
