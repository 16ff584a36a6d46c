"""A fleet that serves VMs as the daemon does: passes, and reexamining what has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.vm import Vm
from tests.qemu.fleet import Member, paths
from vmdedup.attach.discover import attach_all
from vmdedup.engine.fleet import Fleet
from vmdedup.settings import Settings

DONE = ("completed", "failed", "cancelled")


@dataclass
class Serving:
    """The fleet and the VMs it was given."""

    fleet: Fleet
    members: Sequence[Member]

    def take_in(self) -> None:
        """Attach to those that are not attached."""
        absent = [member for member in self.members if member.pid not in self.fleet.pids()]
        for found in attach_all(paths(absent), self.fleet.loop).attached:
            self.fleet.take_in(found)

    def merge(self, passes: int = 3) -> int:
        """Run passes; how many pages stand merged then."""
        for _ in range(passes):
            self.fleet.follow_changes()
            self.fleet.engine.run_pass(lambda _: None)
        return self.fleet.engine.standing_pages()

    def pass_once(self) -> None:
        """A pass without looking for changes first, as one that had begun already."""
        self.fleet.engine.run_pass(lambda _: None)

    def refusal(self, member: Member) -> str:
        """Why a VM is not attached; "" where it is, or was never tried."""
        return self.fleet.roster.reason_of(member.pid) or ""

    def troubles(self) -> list[str | None]:
        return [vm.record.trouble for vm in self.fleet.engine.vms]


@contextmanager
def serving(settings: Settings, members: Sequence[Member]) -> Iterator[Serving]:
    """All of them attached, for merging."""
    fleet = Fleet(settings, merging=True, wait_s=2)
    try:
        served = Serving(fleet, members)
        served.take_in()
        assert fleet.pids() == {member.pid for member in members}, fleet.listed()
        yield served
    finally:
        fleet.close()


def merged_pages(member: Member) -> int:
    """Pages of its RAM that lie on a store or on the zero page, by /proc/PID/maps."""
    return sum(m.pages for m in member.mappings() if m.is_ours)


def hmp(vm: Vm, line: str) -> str:
    """A human monitor command."""
    return str(qmp(vm.test_qmp_path, "human-monitor-command", **{"command-line": line}))


def set_capability(vm: Vm, name: str, state: bool = True) -> None:
    """Of migration, with what it takes: x-colo needs a return path from QEMU 11 on."""
    names = (name, "return-path") if name == "x-colo" else (name,)
    wanted = [{"capability": each, "state": state} for each in names]
    qmp(vm.test_qmp_path, "migrate-set-capabilities", capabilities=wanted)


def migrate(vm: Vm, uri: str, command: str = "migrate") -> None:
    """Migrate to `uri` (or with `migrate-incoming` from it), and wait for the end."""
    qmp(vm.test_qmp_path, command, uri=uri)
    assert becomes_true(lambda: migration_of(vm).get("status") in DONE, 30)
    assert migration_of(vm)["status"] == "completed", migration_of(vm)


def migration_of(vm: Vm) -> dict[str, Any]:
    return dict(qmp(vm.test_qmp_path, "query-migrate"))


def speaks(vm: Vm) -> None:
    """Wait for the first status line of a VM that was restored."""
    assert becomes_true(lambda: vm.serial.status() is not None, 30), vm.transcript()
