"""Whether a thread's system call filters are known to let our calls through.

Owns the reading of the filters from a stopped thread, and the messages of a refusal. If we
may not read them (under a filter of our own, such as systemd's SystemCallFilter=), QEMU's own
sandbox is recognized by its command line: it denies listed calls, and none of ours. Reads only.
"""

from __future__ import annotations

import itertools

from vmdedup.errors import VmGoneError
from vmdedup.inject.ptrace import Tracee
from vmdedup.inject.seccomp import denial
from vmdedup.linux.process import Process


def filtered(process: Process, tracee: Tracee, count: str) -> str | None:
    """Why our calls must not be run on the stopped thread; `None` if its filters allow them.

    `count`: how many filters it has (Seccomp_filters), "" if the kernel does not say.
    """
    try:
        programs = tracee.filters()
    except OSError as error:
        if count == "1" and _is_sandboxed_by_itself(process):
            return None
        reason = "its system call filter (seccomp) cannot be read, so that a call might end it"
        return f"{reason} ({error.strerror}); run vmdedup as root, and not under seccomp itself"
    denied = denial(programs)
    if denied is None:
        return None
    return f"its system call filter (seccomp) answers {denied}; have the filter allow that call"


def _is_sandboxed_by_itself(process: Process) -> bool:
    """Whether QEMU runs under `-sandbox on`: one filter (softmmu/qemu-seccomp.c: denylist)."""
    try:
        words = process.path("cmdline").read_bytes().split(b"\0")
    except OSError as error:  # uncovered: it was stopped a moment ago, and ends only now
        raise VmGoneError(process.vm, "the VM's process ended", pid=process.pid) from error
    pairs = itertools.pairwise(words)
    return any(one.lstrip(b"-") == b"sandbox" and two.startswith(b"on") for one, two in pairs)
