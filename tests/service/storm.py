"""Sharers in a memory cgroup whose limit is far below what they can take, and their daemon."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

from tests.harness.limits import MemoryGroup
from tests.harness.monitor import qmp
from tests.harness.serial import GuestError
from tests.harness.vm import Backend, Vm
from tests.service.daemon import Daemon, Directories, merged, monitors, running
from vmdedup.models import MemoryPlace

MIB = 1 << 20
SHARED_MIB = 66
"""Memory of each guest that the others have too."""
SPARE_MIB, RESERVE_MIB = 72, 56
FASTEST_PER_S = 10_000_000
"""More pages than any guest can write in a second."""
SLOW_PER_S = 400
"""Pages a second: it takes half a minute until memory is used up."""
_BACKENDS = (
    Backend("memfd", share=True, mib=96),
    Backend("ram", share=False, mib=96),
    Backend("ram", share=False, mib=96),
)
_SHARERS = {"mib": 72, "shared_mib": SHARED_MIB, "repeat_mib": 2, "zero_mib": 2, "hold": 1}


@dataclass
class Storm:
    """Merged VMs that have not begun to write."""

    vms: list[Vm]
    group: MemoryGroup
    daemon: Daemon

    def tighten(self, spare_mib: int = SPARE_MIB) -> None:
        """Leave the group so much memory."""
        self.group.set_limit(self.group.used_bytes + spare_mib * MIB)

    def place(self) -> MemoryPlace:
        """The cgroup in a fresh report."""
        places = self.daemon.client.report(fresh=True).memory
        return next(place for place in places if place.place == str(self.group.folder))

    def break_loose(self, pages_per_s: int = FASTEST_PER_S) -> None:
        """Have all guests rewrite their memory."""
        for vm in self.vms:
            vm.set_rewrite_rate(pages_per_s)
        for vm in self.vms:  # one may be paused before it has answered, another killed
            threading.Thread(target=_go, args=(vm,), daemon=True).start()

    def paused(self) -> list[Vm]:
        """The VMs that QEMU says are paused."""
        return [vm for vm in self.vms if not runs(vm)]


def runs(vm: Vm) -> bool:
    """Whether QEMU says so."""
    return bool(qmp(vm.test_qmp_path, "query-status")["status"] == "running")


@contextmanager
def storm(directories: Directories, *controls: str, program: str | None = None) -> Iterator[Storm]:
    """Three VMs that share most of their memory, merged, in a group that is still wide."""
    first = [f"reserve_bytes={RESERVE_MIB * MIB}", "reserve_percent=0", *controls]
    with MemoryGroup() as group, ExitStack() as exits:
        group.set_limit(2 << 30)
        group.add(os.getpid())
        try:  # what QEMU takes is charged to the group that it is started in
            vms = [
                exits.enter_context(
                    Vm("bare", name=f"s{n}", backend=each, parameters={**_SHARERS, "seed": n + 1})
                )
                for n, each in enumerate(_BACKENDS)
            ]
        finally:
            group.release(os.getpid())
        for vm in vms:
            vm.wait_ready()
        words = [word for control in first for word in ("--controls", control)]
        with running(directories, *words, *monitors(*vms), program=program) as daemon:
            merged(daemon, *vms)
            yield Storm(vms, group, daemon)


@contextmanager
def next_daemon(held: Storm, directories: Directories, *controls: str) -> Iterator[Storm]:
    """The same VMs with another daemon, after the first has died."""
    words = [word for control in controls for word in ("--controls", control)]
    with running(directories, *words, *monitors(*held.vms)) as daemon:
        yield replace(held, daemon=daemon)


def _go(vm: Vm) -> None:
    with suppress(GuestError):
        vm.go()
