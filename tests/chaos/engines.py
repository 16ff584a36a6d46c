"""Engines in processes of their own, started, killed and waited for by the tests."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tests.harness.images import REPOSITORY

Halt = Literal["stop", "freeze", "starve"]
Action = Literal["KILL", "KILL_BOTH", "STOP", "EXIT"]
_ANSWER_S = 60.0


@dataclass(frozen=True)
class Job:
    """What an engine is to do with `qmp` until `step` is reached `occurrence` + 1 times.

    `action`: SIGKILL itself, its guardian and then itself, SIGSTOP itself, or exit.
    `after`: only occurrences that follow on that step. `together`: once so many of its
    threads are there. Without a step it goes on until it is killed from outside.
    `halt_at`: from that step on, once, the VM at hand cannot run (`halt`), and the step
    then counts only for that VM.
    """

    qmp: Sequence[str]
    settings: dict[str, Any]
    step: str = ""
    after: str = ""
    occurrence: int = 0
    together: int = 1
    action: Action = "KILL"
    merge: bool = True
    unmerge: bool = False
    halt_at: str = ""
    halt: Halt = "stop"


@dataclass
class Engine:
    """One engine process, until it has ended."""

    pid: int
    guardian: int = 0
    exit_code: int | None = None
    halted_pid: int = 0
    """The VM that cannot run since."""


class Driver:
    """The driver process; runs one engine at a time. A context manager."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.driver"],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._buffer = b""
        self._running: Engine | None = None
        self._hear("ready", _ANSWER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.end()
        finally:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()

    def start(self, job: Job) -> Engine:
        """Start an engine; returns as soon as its process exists."""
        assert self._running is None
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(asdict(job), default=str) + "\n").encode())
        self._process.stdin.flush()
        self._running = Engine(int(self._hear("pid", _ANSWER_S)["pid"]))
        return self._running

    def wait_attached(self) -> None:
        """Until the engine serves its VMs."""
        assert self._running is not None
        self._running.guardian = int(self._hear("attached", _ANSWER_S)["guardian"])

    def wait_exit(self, timeout_s: float = _ANSWER_S) -> int:
        """The exit code (-N for signal N) of the engine; all its files are closed then."""
        assert self._running is not None
        engine = self._running
        engine.exit_code = int(self._hear("exit", timeout_s)["exit"])
        self._running = None
        return engine.exit_code

    def run(self, job: Job, timeout_s: float = _ANSWER_S) -> Engine:
        """Start an engine and wait for its end."""
        engine = self.start(job)
        try:
            self.wait_exit(timeout_s)
        except BaseException:
            self.end()
            raise
        return engine

    def end(self) -> None:
        """Kill the engine that runs, if one does."""
        if self._running is not None:
            with suppress(ProcessLookupError):
                os.kill(self._running.pid, signal.SIGKILL)
            self.wait_exit()

    def _hear(self, wanted: str, timeout_s: float) -> dict[str, Any]:
        """The next line that has the fact `wanted`; earlier ones are taken note of."""
        deadline = time.monotonic() + timeout_s
        assert self._process.stdout is not None
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                facts: dict[str, Any] = json.loads(line)
                if self._running is not None and "guardian" in facts:
                    self._running.guardian = facts["guardian"]
                if self._running is not None and "halted" in facts:
                    self._running.halted_pid = facts["halted"]
                if wanted in facts:
                    return facts
                if "exit" in facts:
                    self._running = None
                    raise AssertionError(f"the engine ended ({facts}): {self.log.read_text()}")
                continue
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                raise AssertionError(f"the engine did not come to {wanted!r}: {self._state()}")
            self._buffer += os.read(self._process.stdout.fileno(), 1 << 16)

    def _state(self) -> str:
        status = Path(f"/proc/{self._running.pid}/status") if self._running else None
        state = status.read_text().splitlines()[2] if status and status.exists() else "gone"
        return f"{state}; {self.log.read_text()}"
