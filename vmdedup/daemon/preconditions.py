"""Whether this host lets the engine merge at all, and take more memory now.

Owns the two probes that registering asks (EINVAL and EAGAIN of madvise). Both try
the real operation where it harms nobody: tracing on the guardian, which is our own
child, the store directory in its own place. Promises to change nothing in any VM.

A kernel without userfaultfd write protection can merge even so, in short
stops. Two things are indispensable: running calls inside a QEMU, and a store.
"""

from __future__ import annotations

import resource
from pathlib import Path

from vmdedup.errors import InjectionError, StoreError, VmGoneError
from vmdedup.inject.ptrace import Tracee
from vmdedup.linux.meminfo import available_bytes
from vmdedup.store.stable_store import prepare_directory
from vmdedup.units import PAGE_BYTES

_STOP_TIMEOUT_S = 1.0


def why_host_cannot_merge(store_dir: Path, child_pid: int | None) -> str | None:
    """Why no VM of this host can be merged; `None` if they can.

    `child_pid`: a child process to try tracing on; `None` leaves that out.
    """
    try:
        prepare_directory(store_dir)
    except StoreError as error:
        return str(error)
    return None if child_pid is None else _why_not_traced(child_pid)


def _why_not_traced(pid: int) -> str | None:
    """Why calls cannot be run inside another process: ptrace is denied to us."""
    tracee = Tracee("guardian", pid, pid)
    try:
        try:
            tracee.seize()
            tracee.interrupt(_STOP_TIMEOUT_S)
        finally:
            # SAFETY: the guardian only stands still meanwhile; if we are killed here, the
            # kernel lets it go on.
            tracee.detach()
    except VmGoneError:
        return None  # it is being replaced, which says nothing about tracing
    except InjectionError as error:
        return error.reason
    except OSError as error:
        return f"ptrace: {error.strerror}"
    return None


def allocatable_bytes() -> int:
    """Memory that this process can still have: the host's available, within its own limit."""
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes == resource.RLIM_INFINITY:
        return available_bytes()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return max(0, min(available_bytes(), limit_bytes - pages * PAGE_BYTES))
