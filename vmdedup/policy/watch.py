"""Whether anything about a VM has changed since it was examined, at low cost.

Owns a short look (a few monitor commands, about a millisecond) that is compared with
the last one, and the monitor's events. QEMU has no event for an added device, nor for a
migration capability that was set, so events alone are not enough. A glance is shorter
still and asks the kernel alone: hardly any device comes without a descriptor.
Promises no verdict: news only says that the VM should be examined again. Reads only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmdedup.attach import balloon, replies
from vmdedup.attach.monitor import COMMAND_TIMEOUT_S, Monitor, Question, one_line
from vmdedup.linux.cgroup import frozen_group
from vmdedup.linux.process import Process
from vmdedup.policy import signs
from vmdedup.policy.facts import (
    DEVICE_FOLDERS,
    NESTED_QUESTION,
    Facts,
    Migration,
    exported_folders,
    filesystems_of,
    first_number,
    ksm_runs,
    links_of,
    migration_of,
    migration_questions,
    nested_runs_of,
    own_userfaults,
)

_EVENTS = frozenset(
    (
        "ACPI_DEVICE_OST",
        "COLO_EXIT",
        "DEVICE_DELETED",
        "DUMP_COMPLETED",
        "MEMORY_DEVICE_SIZE_CHANGE",
        "MIGRATION",
        "NETDEV_VHOST_USER_CONNECTED",
    )
)
"""Events after which a VM may have changed (qapi/*.json)."""


_KVM = "anon_inode:kvm-vm"
"""Descriptor that QEMU has open if it runs its guest by KVM."""

_LONGEST_LOOK_S = 3.0
"""Longest wait for an answer between examinations: others wait meanwhile."""
_LONGEST_GLANCED_S = 1.0
"""Longest time covered by glances alone if the monitor does not report changes by itself."""

_NO_MIGRATION = Migration(
    run_state="running",
    migration_status=None,
    migration_mode="normal",
    capabilities=frozenset(),
    dump_status="none",
)
"""Answers assumed, without asking, if the monitor reports migrations by itself."""


@dataclass(frozen=True)
class _Glance:
    """Facts about the process that the kernel tells at once."""

    halted: str | None
    links: dict[int, str] = field(default_factory=dict)
    """Targets of the process's descriptors, by number."""
    pinned_kib: int = 0
    tracer_pid: int = 0
    shared_folders: tuple[tuple[str, str], ...] = ()
    """Folders exported by 9p, and the mounts below them."""


@dataclass(frozen=True)
class _Look:
    """The values that are compared: equal looks mean no news."""

    halted: str | None
    children: tuple[tuple[str, str], ...] = ()
    """(name, type) of every device and object."""
    facts: Facts | None = None
    """Facts that can be read at once; of a migration or dump, only whether one is under way."""


class Watch:
    """Watches one VM. Call `settle` before each examination, `has_news` at any time.

    Made before the first examination. Raises VmError.
    """

    def __init__(self, monitor: Monitor, process: Process) -> None:
        self._monitor = monitor
        self._process = process
        self._exports = tuple(exported_folders(process).values())
        self._settled: _Look
        self._has_news = False
        self.taken = balloon.Taken()
        """What the balloon and virtio-mem had taken from the guest at the last look."""
        self._glance = _Glance(None)
        self._looked_at = -math.inf
        self.settle()

    def settle(self) -> None:
        """Take the present state as known. Raises VmError."""
        self._monitor.events()
        self._has_news = False
        self._settled = self._look(ask_balloon=True)

    def has_news(self, *, at_leisure: bool = False) -> bool:
        """Whether anything has changed since it was settled. Raises VmError.

        With `at_leisure`, a glance is enough most of the time.
        """
        named = {str(event.get("event")) for event in self._monitor.events()}
        if not self._has_news and not (at_leisure and not named and self._is_quiet()):
            self._has_news = (
                not named.isdisjoint(_EVENTS) or self._look(_LONGEST_LOOK_S) != self._settled
            )
        return self._has_news

    def ask_balloon(self) -> None:
        """Read `taken` again. Raises VmError."""
        answers = self._monitor.ask_all(balloon.QUESTIONS, timeout_s=_LONGEST_LOOK_S)
        self.taken = balloon.taken_of(answers)

    def _is_quiet(self) -> bool:
        """Whether a glance equals the one of the last look, a short while ago."""
        is_recent = time.monotonic() - self._looked_at < _LONGEST_GLANCED_S
        return is_recent and self._read_glance() == self._glance

    def _read_glance(self) -> _Glance:
        status = self._process.status()
        halted = halted_by(self._process, status)
        if halted is not None:
            return _Glance(halted)
        return _Glance(
            None,
            links_of(self._process),
            pinned_kib=first_number(status.get("VmPin", "0")),
            tracer_pid=first_number(status.get("TracerPid", "0")),
            shared_folders=filesystems_of(self._process, self._exports),
        )

    def _look(self, timeout_s: float = COMMAND_TIMEOUT_S, *, ask_balloon: bool = False) -> _Look:
        # A stopped QEMU does not answer: look before asking.
        self._glance, self._looked_at = self._read_glance(), time.monotonic()
        if self._glance.halted is not None:
            return _Look(self._glance.halted)
        children = []
        told = self._monitor.tells_of_changes
        folders = () if told else (*DEVICE_FOLDERS, "/objects")
        listings = [
            Question("qom-list", replies.QomProperties, [], {"path": folder}) for folder in folders
        ]
        # All at once: each exchange waits for QEMU's main loop and two threads of ours.
        migration = () if told else migration_questions(self._monitor)
        links = self._glance.links
        nested = [NESTED_QUESTION] if _KVM in links.values() else []
        taken = balloon.QUESTIONS if ask_balloon or not told else ()
        questions = [*listings, *migration, *nested, *taken]
        answers = self._monitor.ask_all(questions, timeout_s=timeout_s)
        if taken:
            self.taken = balloon.taken_of([answers.pop() for _ in taken][::-1])
        runs = nested_runs_of(answers.pop()) if nested else 0
        for folder, found in zip(folders, answers[: len(folders)], strict=True):
            children += [(f"{folder}/{one.name}", one.type) for one in found if one.child_type]
        facts = Facts(
            version=self._monitor.version,
            pinned_kib=self._glance.pinned_kib,
            tracer_pid=self._glance.tracer_pid,
            nested_runs=min(runs, 1),  # their number is no news
            shared_folders=self._glance.shared_folders,
            own_userfaults=own_userfaults(self._process, links),
            ksm_runs=ksm_runs(),
            open_paths=frozenset(
                path for path in links.values() if path.startswith(signs.PINNING_PATHS)
            ),
            **(_NO_MIGRATION if told else migration_of(self._monitor, answers[len(folders) :])),
        )
        return _Look(None, tuple(children), signs.without_progress(facts))


def halted_by(process: Process, status: Mapping[str, str]) -> str | None:
    """Why the whole process does not run; `None` if it does.

    `status`: its /proc/PID/status.
    """
    if status.get("State", "").startswith("T"):
        return "SIGSTOP"
    group = frozen_group(process.pid)
    return None if group is None else f"its frozen cgroup {one_line(group, 120)}"
