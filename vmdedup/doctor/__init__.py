"""`vmdedup doctor`: whether merging can work on this host, and the remedies if not.

`probes` tries the kernel's features on a process of its own, `host` looks at
limits and settings, `memory` at what a write of all merged pages takes, `vms` asks about each VM.
Each gives `CheckedThing`s;
`diagnose` puts them together. Nothing is changed, on the host or in a VM.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmdedup.doctor.host import host_checks
from vmdedup.doctor.memory import memory_checks
from vmdedup.doctor.probes import kernel_checks
from vmdedup.doctor.vms import vm_checks
from vmdedup.models import CheckedThing, Diagnosis, MemoryPlace, VmList
from vmdedup.settings import Settings

__all__ = ["diagnose"]


def diagnose(
    settings: Settings,
    found: VmList,
    *,
    daemon_pid: int | None,
    memory: Sequence[MemoryPlace] = (),
) -> Diagnosis:
    """All checks. `found`: the VMs, as a daemon lists them if `daemon_pid` is given."""
    checks: list[CheckedThing] = [
        *kernel_checks(settings),
        *host_checks(settings, daemon_pid=daemon_pid),
        *memory_checks(memory),
        *vm_checks(found),
    ]
    can_merge = all(check.verdict != "problem" for check in checks)
    return Diagnosis(can_merge=can_merge, checks=checks)
