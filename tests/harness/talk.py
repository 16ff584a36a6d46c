"""What can be asked of a running test guest, whoever started its QEMU.

Owns the waiting: every wait ends with GuestError when QEMU ends or time is over.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from tests.harness.serial import POLL_S, Composition, GuestError, Serial, Status


class Talk(ABC):
    """A guest with a serial port."""

    name: str
    serial: Serial
    _timeout_s: float

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether QEMU still runs."""

    @abstractmethod
    def transcript(self) -> str:
        """The last lines of QEMU and of the guest."""

    @abstractmethod
    def state(self) -> str:
        """Whether QEMU runs, for messages."""

    def _failed(self, what: str) -> GuestError:
        return GuestError(f"{self.name} ({self.state()}): {what}\n{self.transcript()}")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not condition():
            if not self.alive or time.monotonic() > deadline:
                raise self._failed(what)
            time.sleep(POLL_S)

    def wait_boot(self) -> None:
        """Wait until the guest says that its workload runs, be it the worker or another."""
        self._wait(
            lambda: self.serial.boots() > 0 or self.serial.gave_up(),
            "the guest did not become ready",
        )
        if self.serial.gave_up():
            raise self._failed("the guest gave up")

    def wait_ready(self) -> Composition:
        """Wait until the worker has filled its area; what that is made of."""
        self._wait(
            lambda: self.serial.status() is not None or self.serial.gave_up(),
            "the guest did not become ready",
        )
        composition = self.serial.composition()
        if composition is None:
            raise self._failed("the guest gave up")
        return composition

    def begin_anew(self, reset: Callable[[], object]) -> None:
        """Reset the guest by `reset`, and wait until its worker has filled its area again."""
        boots = self.serial.boots()
        reset()
        self._wait(lambda: self.serial.boots() > boots, "it did not boot again")
        self.wait_ready()

    def status(self) -> Status:
        """The latest status; raises GuestError before the first."""
        status = self.serial.status()
        if status is None:
            raise self._failed("the guest has not said anything yet")
        return status

    @property
    def errors(self) -> int:
        """Looks at a page, and reads of the disk, that found something wrong."""
        status = self.status()
        return status.errors + status.dma_wrong

    def wait_checks(self, pages: int) -> Status:
        """Wait until so many further pages were checked."""
        return self.wait_status(lambda now, start: now.checks >= start.checks + pages)

    def wait_passes(self, passes: int) -> Status:
        """Wait until the area was checked so many times from now on, from end to end."""
        return self.wait_status(lambda now, start: now.passes >= start.passes + passes + 1)

    def wait_status(self, holds: Callable[[Status, Status], bool]) -> Status:
        """Wait until `holds(latest status, status at the call)`; the status that did."""
        self._wait(lambda: self.serial.status() is not None, "it does not say how it is")
        start = self.status()
        self._wait(lambda: holds(self.status(), start), f"no progress since {start}")
        return self.status()

    def ask(self, command: str, answer: str) -> str:
        """Tell the guest something (images/README.md); what it answers after `answer`."""
        return self.serial.ask(
            command, answer, lambda condition: self._wait(condition, f"no answer to {command}")
        )

    def hold(self) -> None:
        """Stop rewriting and reading the disk; the area stays as it is from here on."""
        self.ask("hold", "holding")

    def go(self) -> None:
        """Rewrite and read again."""
        self.ask("go", "going")

    def set_rewrite_rate(self, pages_per_s: int) -> None:
        """Change how much is rewritten."""
        self.ask(f"rate {pages_per_s}", f"rate={pages_per_s}")

    def sum(self) -> str:
        """The guest's own checksum of its area, as its memory is now."""
        return self.ask("sum", "sum=")
