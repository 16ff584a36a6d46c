"""A guest's serial port: its lines, parsed, and commands to it.

Lines arrive in a file (QEMU's chardev log), so nothing is lost while nobody
listens. Commands go through the chardev's socket, which is open only while one
is asked; QEMU drops what the guest says there when nobody is connected.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

POLL_S = 0.02
_TOLD_LINES = 5

_PREFIX = "vmdedup-guest: "
_READY = "ready "
_FAILED = "failed"
_FIELD = re.compile(r"\b(\w+)=(\d+)(?!\w)")


class GuestError(Exception):
    """The guest or its QEMU did not do what was asked; ends with what they said last."""


@dataclass(frozen=True)
class Composition:
    """The `ready` line: pages of the worker's area, by class."""

    pages: int
    unique: int
    shared: int
    repeat: int
    zero: int


@dataclass(frozen=True)
class Status:
    """One status line; images/README.md says what each count means."""

    checks: int
    rewrites: int
    errors: int
    passes: int
    held: int
    dma_reads: int = 0
    dma_wrong: int = 0


_Parsed = TypeVar("_Parsed", Composition, Status)


def _parse(kind: type[_Parsed], line: str) -> _Parsed:
    names = {field.name for field in fields(kind)}
    return kind(**{name: int(value) for name, value in _FIELD.findall(line) if name in names})


class Serial:
    """The port of one guest: `log` is the file its lines go to, `socket_path` the way in."""

    def __init__(self, log: Path, socket_path: Path) -> None:
        self._log = log
        self._socket_path = socket_path

    def text(self) -> str:
        """Everything said so far."""
        if not self._log.exists():
            return ""
        return self._log.read_bytes().decode(errors="replace").replace("\r", "")

    def lines(self) -> list[str]:
        """The worker's complete lines, without their prefix and what the firmware left there.

        QEMU may drop the end of a line when a client leaves; the next one then follows on it.
        """
        whole = self.text().rpartition("\n")[0].splitlines()
        return [said for line in whole for said in line.split(_PREFIX)[1:]]

    def _latest(self, start: str) -> str | None:
        return next((line for line in reversed(self.lines()) if line.startswith(start)), None)

    def boots(self) -> int:
        """How many times the guest has said that its workload runs: the worker's area is filled."""
        return sum(line.startswith(_READY) for line in self.lines())

    def composition(self) -> Composition | None:
        """What the area is made of; None until the guest is ready."""
        line = self._latest(_READY)
        return _parse(Composition, line) if line else None

    def status(self) -> Status | None:
        """The latest status line since the worker filled its area; None before the first."""
        for line in reversed(self.lines()):
            if line.startswith("checks=") and " held=" in line:
                return _parse(Status, line)
            if line.startswith(_READY):
                return None
        return None

    def complaints(self) -> list[str]:
        """The descriptions of wrong pages."""
        return [line for line in self.lines() if line.startswith("error ")]

    def gave_up(self) -> bool:
        """Whether the worker could not do what its parameters ask for."""
        return self._latest(_FAILED) is not None

    def _told(self, command: str) -> socket.socket:
        """A connection on which QEMU was sent the command."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._socket_path))
        connection.sendall(f"{command}\n".encode())
        connection.setblocking(False)
        return connection

    def ask(self, command: str, answer: str, wait: Callable[[Callable[[], bool]], None]) -> str:
        """Send `command`; the first new line that starts with `answer`, without that start.

        `wait(condition)` returns when the condition holds and raises when it
        never will. Raises GuestError at once where the worker gives up.
        """
        before = len(self.lines())

        def said(start: str) -> str | None:
            return next((line for line in self.lines()[before:] if line.startswith(start)), None)

        with ExitStack() as connections:
            connection = connections.enter_context(self._told(command))

            def answered() -> bool:
                nonlocal connection
                try:
                    # What QEMU also sends here stands in the log; left unread it would block.
                    connection.recv(1 << 16)
                except BlockingIOError:
                    time.sleep(POLL_S)
                except ConnectionResetError:  # QEMU left without having read the command
                    time.sleep(POLL_S)
                    with suppress(ConnectionRefusedError):  # QEMU has ended: `wait` tells
                        connection = connections.enter_context(self._told(command))
                if failure := said(_FAILED):
                    raise GuestError(failure)
                return said(answer) is not None

            try:
                wait(answered)
            except GuestError as error:
                told = "\n".join(self.lines()[before : before + _TOLD_LINES])
                raise GuestError(f"{error}\nafter {command!r} it first said\n{told}") from error
        found = said(answer)
        assert found is not None  # `wait` has returned
        return found.removeprefix(answer)
