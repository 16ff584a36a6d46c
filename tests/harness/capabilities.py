"""What this machine can run, tried for real.

Each probe returns None when the thing works, else the reason why not: the text
of an honest skip, and of a failure where it must work (`tests.harness.skips`).
"""

from __future__ import annotations

import importlib.util
import subprocess
from functools import cache
from pathlib import Path

from tests.harness.serial import GuestError
from tests.harness.vm import Backend, Vm
from vmdedup.linux.pagemap import has_pagemap_scan

_PROBE_TIMEOUT_S = 120


@cache
def kvm_missing() -> str | None:
    """Whether the bare guest runs under KVM."""
    if not Path("/dev/kvm").exists():
        return "no /dev/kvm on this machine"
    try:
        with Vm(
            "bare",
            name="kvm-probe",
            accel="kvm",
            backend=Backend(mib=16),
            parameters={"mib": 1},
            timeout_s=_PROBE_TIMEOUT_S,
        ) as vm:
            vm.wait_ready()
    except GuestError as error:
        return f"KVM does not run the bare guest: {error}"
    return None


def pagemap_scan_missing() -> str | None:
    """Whether this kernel has PAGEMAP_SCAN (Linux 6.7)."""
    return None if has_pagemap_scan() else "this kernel has no PAGEMAP_SCAN"


def fleet_extra_missing() -> str | None:
    """Whether what sketches are compared with is installed: the extra `fleet`."""
    missing = [name for name in ("duckdb", "pyarrow") if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def object_missing(kind: str) -> str | None:
    """Whether the QEMU that comes first in PATH knows objects of that kind."""
    listed = subprocess.run(
        ["qemu-system-x86_64", "-object", "help"], capture_output=True, text=True, check=True
    )
    return None if kind in listed.stdout.split() else f"this QEMU has no {kind}"


def capability_missing(number: int, purpose: str) -> str | None:
    """Whether this process has the capability of that number (linux/capability.h)."""
    effective = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    return None if effective & (1 << number) else f"needs capability {number} to {purpose}"


@cache
def root_missing() -> str | None:
    """Whether processes of other users can be started and looked into."""
    effective = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    cap_setuid, cap_sys_ptrace = 7, 19
    if effective & (1 << cap_setuid) and effective & (1 << cap_sys_ptrace):
        return None
    return "needs root (CAP_SETUID and CAP_SYS_PTRACE)"
