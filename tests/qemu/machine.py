"""A QEMU without a guest system: the firmware runs, or (`-S`) nothing does.

For tests of attaching and of hazards, which need a machine of a certain make
and no workload. Owns the process and ends it by its pid.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.harness.kernel import becomes_true
from tests.harness.tool import ask
from vmdedup.closing import Closing

_START_S = 30.0


class Machine(Closing):
    """A running machine with two QMP sockets: `qmp` for vmdedup, `own` for the test."""

    def __init__(self, folder: Path, *arguments: str, memory_mib: int = 64, name: str = "") -> None:
        self.qmp = folder / f"{name}qmp.sock"
        self.own = folder / f"{name}own.sock"
        self.log = folder / f"{name}qemu.log"
        command = ["qemu-system-x86_64", "-accel", "tcg,tb-size=64", "-display", "none"]
        command += ["-nodefaults", "-no-user-config"]
        if "-m" not in arguments:
            command += ["-m", str(memory_mib)]
        for path in (self.qmp, self.own):
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait_for_greeting()
        except BaseException:
            self.close()
            raise

    def _wait_for_greeting(self) -> None:
        """QEMU binds its socket, then listens, then makes its memory, and greets only then."""
        deadline = time.monotonic() + _START_S
        while True:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_START_S)
                with suppress(FileNotFoundError, ConnectionRefusedError):
                    connection.connect(str(self.own))
                    connection.recv(1)
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"QEMU did not start: {self.log.read_text()}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        return self.process.pid

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def backend(
    kind: str, number: int, mib: int, options: str = "", *, path: Path | None = None
) -> str:
    """The `-object` argument of a memory backend `ramNUMBER`."""
    spec = f"memory-backend-{kind},id=ram{number},size={mib}M"
    if path is not None:
        spec += f",mem-path={path}"
    return spec + (f",{options}" if options else "")


@contextmanager
def alone(path: Path) -> Iterator[int]:
    """The process id of a QEMU with this QMP socket, and no other."""
    command = ["qemu-system-x86_64", "-S", "-M", "none", "-accel", "tcg", "-display", "none"]
    command += ["-nodefaults", "-qmp", f"unix:{path},server=on,wait=off"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        assert becomes_true(lambda: _answers(path), _START_S)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _answers(path: Path) -> bool:
    try:
        return ask(path, "ready") != ""
    except (FileNotFoundError, ConnectionRefusedError):
        return False
