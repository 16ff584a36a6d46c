"""Abilities of every monitor of a VM, whatever carries the commands.

Owns the `Monitor` base class, which the rest of the project is written against, and the
commands that are the same for all carriers. The carriers are QMP sockets (`qmp.py`) and
libvirt (`libvirt/monitor.py`). Every method is synchronous, bounded in time, and
raises MonitorError or VmGoneError; nothing else.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from vmdedup.attach import replies
from vmdedup.attach.silence import Silence
from vmdedup.errors import MonitorError

T = TypeVar("T")

COMMAND_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 30.0
"""Longest wait for a drain, which ends with the guest's slowest disk request."""


def one_line(text: str, limit: int = 300) -> str:
    """`text` from outside, made fit for a message: one line, printable, short."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def answer_or_refusal(answer: Callable[[], object]) -> object:
    """The answer, or the MonitorError with which QEMU itself has refused."""
    try:
        return answer()
    except MonitorError as error:
        if not error.error_class:
            raise
        return error


@dataclass(frozen=True)
class Question(Generic[T]):
    """A command, and the answer to assume if this QEMU refuses it (older, not built in)."""

    command: str
    reply: TypeAdapter[T]
    default: T
    arguments: Mapping[str, object] | None = None


class DrainGuard(Protocol):
    """Knows the VM's storage; asked before each drain, told after it."""

    def require_drainable(self) -> None:
        """Raise VmError if a drain would not end soon."""

    def drained(self, took_ms: float) -> None:
        """Note that a drain took so long."""


class Monitor(ABC):
    """A connection through which one VM is asked and told things.

    A carrier implements `execute`, `add_fd`, `events`, `close` and the two
    properties; everything else uses `execute`.
    """

    vm: str
    """The VM's name in messages; the socket's path until the name is known."""

    silence: Silence
    """The commands that were not answered in time."""

    drain_guard: DrainGuard | None = None
    """The guard to ask before a drain; `None` if there is none."""

    @property
    @abstractmethod
    def peer_pid(self) -> int:
        """Process id of the QEMU at the other end."""

    @property
    @abstractmethod
    def version(self) -> tuple[int, int, int]:
        """QEMU's version."""

    @property
    def outage(self) -> str | None:
        """Why the VM cannot be asked anything now, though it lives; `None` if it can."""
        return self.silence.reason

    @property
    def tells_of_changes(self) -> bool:
        """Whether `events` reports devices and migrations that come and go."""
        return False

    @property
    def misses_events(self) -> bool:
        """Whether events that come between two commands may never be heard."""
        return False

    @property
    def connection(self) -> int:
        """The number of the connection, `-1` if there is none now.

        While it stays the same, no event was missed and QEMU has not closed what it was lent.
        """
        return 0

    @property
    def resumes(self) -> int | None:
        """How often the VM was resumed since connecting, by its events; `None` if unknown."""
        return None

    @property
    def turn_left_s(self) -> float:
        """Seconds until the connection is left, whatever is under way."""
        return math.inf

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep the connection for the commands of the block, if it is one that is left."""
        yield

    def in_own_words(self, key: str, reason: str) -> str:
        """A reason against merging, in the words of the tool that set the VM up.

        `key`: the row of the hazard table, "" for the refusal of a backend.
        """
        return reason

    @abstractmethod
    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> object:
        """Run a QMP command and return the value of `return`, unchecked.

        Raises MonitorError if QEMU refuses or does not answer in time, VmGoneError if QEMU
        ended. After an unanswered command further ones fail at once, until the late answer
        has come (and is dropped).
        """

    @abstractmethod
    def add_fd(self, fd: int, opaque: str, fdset_id: int | None = None) -> tuple[int, int]:
        """Give QEMU a copy of our `fd`: (fd set id, descriptor number inside QEMU).

        The copy gets a set of its own, unless `fdset_id` names one of ours.
        """

    @abstractmethod
    def events(self) -> list[dict[str, Any]]:
        """QMP events since the last call; the oldest are lost if this is not called for long."""

    @abstractmethod
    def close(self) -> None:
        """Release the monitor; the VM is not touched. Idempotent."""

    def require_answering(self, command: str) -> None:
        """Raise MonitorError while an earlier command is still not answered."""
        if (reason := self.silence.reason) is not None:
            raise MonitorError(self.vm, command, reason, pid=self.peer_pid, unanswered=True)

    def query(
        self,
        command: str,
        reply: TypeAdapter[T],
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> T:
        """Run a command and check its answer; MonitorError if it has another shape."""
        return self._checked(command, reply, self.execute(command, arguments, timeout_s=timeout_s))

    def _checked(self, command: str, reply: TypeAdapter[T], answer: object) -> T:
        try:
            return reply.validate_python(answer)
        except (ValidationError, RecursionError) as error:
            raise MonitorError(
                self.vm, command, "unexpected reply (not a QEMU?)", pid=self.peer_pid
            ) from error

    def query_if_known(
        self,
        command: str,
        reply: TypeAdapter[T],
        default: T,
        arguments: Mapping[str, object] | None = None,
    ) -> T:
        """Like `query`, but `default` if this QEMU refuses the command (older, not built in).

        Only QEMU's own refusal counts; a missing or malformed answer still raises.
        """
        return self.ask_all([Question(command, reply, default, arguments)])[0]

    def ask_all(
        self, questions: Sequence[Question[T]], *, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> list[T]:
        """Like `query_if_known` for each; quicker if the carrier can run several at once."""
        commands = [(each.command, each.arguments) for each in questions]
        answers = self.execute_all(commands, timeout_s=timeout_s)
        return [
            each.default
            if isinstance(answer, MonitorError)
            else self._checked(each.command, each.reply, answer)
            for each, answer in zip(questions, answers, strict=True)
        ]

    def execute_all(
        self,
        commands: Sequence[tuple[str, Mapping[str, object] | None]],
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> list[object]:
        """Run QMP commands, in order; the answer of each, or the MonitorError of a refusal.

        Only QEMU's own refusals are returned; a missing answer raises as in `execute`.
        """
        return [
            answer_or_refusal(partial(self.execute, *each, timeout_s=timeout_s))
            for each in commands
        ]

    def hmp(self, line: str) -> str:
        """Run a human monitor command and return what it prints."""
        text = self.query("human-monitor-command", replies.HmpReply, {"command-line": line})
        return text.replace("\r", "")

    def remove_fds(self, fdset_ids: Sequence[int]) -> None:
        """Close QEMU's copies of the descriptors of these sets; mappings of them stay.

        While the VM is not running, QEMU 7.2 keeps them until it runs again
        (monitor/misc.c: monitor_fdset_cleanup). A set that QEMU has closed already is not missed.
        """
        self.execute_all([("remove-fd", {"fdset-id": each}) for each in fdset_ids])

    def drain(self, *, timeout_s: float = DRAIN_TIMEOUT_S) -> float:
        """Wait until every disk request now in flight has ended; milliseconds taken.

        The empty transaction runs bdrv_drain_all() without pausing the vCPUs
        (blockdev.c: qmp_transaction), but with QEMU's big lock held. Raises what the
        `drain_guard` does if it would not end soon.
        """
        self.require_drainable()
        with self.turn():
            began = time.monotonic()
            self.execute("transaction", {"actions": []}, timeout_s=timeout_s)
            took_ms = (time.monotonic() - began) * 1000.0
        if self.drain_guard is not None:
            self.drain_guard.drained(took_ms)
        return took_ms

    def require_drainable(self) -> None:
        """Raise, as the `drain_guard` does, if `drain` or `stop` would not end soon."""
        if self.drain_guard is not None:
            self.drain_guard.require_drainable()

    def status(self) -> str:
        """QEMU's run state: `running`, `paused`, `inmigrate` and so on."""
        return self.query("query-status", replies.StatusReply).status

    def stop(self) -> None:
        """Pause the VM (which also drains its disks); returns when it is paused."""
        # SAFETY: the guest stands still until `cont`; a kill right here leaves it
        # paused, so the caller has written its stop note before.
        self.execute("stop")

    def has_job(self) -> bool:
        """Whether somebody's work on the VM, a dump for instance, forbids to pause or resume it."""
        return False

    def resume_left_paused(self) -> None:
        """Let the VM run on if a pause of ours, which its maker did not end, still holds it."""
        if self.status() == "paused":
            self.cont()

    def cont(self) -> None:
        """Let the VM run on."""
        self.execute("cont")
