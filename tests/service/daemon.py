"""The real daemon as a process of its own, with directories that go with it.

Owns the process, its settings file and its directories. Ends the process by its
pid, gently first; VMs are the caller's.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.harness.kernel import becomes_true, mappings
from tests.harness.vm import Vm
from vmdedup.client import Client, ServiceError, ServiceUnreachableError

COMMAND = [sys.executable, "-c", "from vmdedup.cli.main import main; main()"]
ALLOWANCE = 5
"""How many times as long as promised a test allows."""
_END_S = 30

_DYING = """
import os, signal
from vmdedup import faults
from vmdedup.cli.main import main
left = {occurrence}
def die(step):
    global left
    left -= step == {step!r}
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
faults.hook = die
main()
"""


def without_settings() -> dict[str, str]:
    """Our environment, without settings of vmdedup."""
    return {name: value for name, value in os.environ.items() if "VMDEDUP" not in name}


def verb(*words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end, which must have this exit code, with this in its environment."""
    done = subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=without_settings() | environment,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def free_port() -> int:
    """One that no outgoing connection is given by the kernel."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


class Directories:
    """Directories of a daemon's own and a settings file. A context manager."""

    def __enter__(self) -> Self:
        self.base = Path(tempfile.mkdtemp(prefix="vmdedup-"))
        self.runtime = self.base / "run"
        self.state = self.base / "state"
        self.store = Path(f"/dev/shm/vmdedup-test-{secrets.token_hex(6)}")
        self.config = self.base / "vmdedup.toml"
        self.log = self.base / "log"
        self.out = self.base / "out"
        self.write()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.base)
        shutil.rmtree(self.store, ignore_errors=True)

    def write(self, text: str = "") -> None:
        """The settings file: the directories, and this."""
        own = f'runtime_dir = "{self.runtime}"\nstore_dir = "{self.store}"\n'
        own += f'state_dir = "{self.state}"\n'
        self.config.write_text(own + text)

    @property
    def environment(self) -> dict[str, str]:
        """Ours, without settings, and with the runtime directory."""
        return without_settings() | self._places

    @property
    def _places(self) -> dict[str, str]:
        return {
            "VMDEDUP_RUNTIME_DIR": str(self.runtime),
            "VMDEDUP_STATE_DIR": str(self.state),
        }

    def verb(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a verb in these directories to its end, which must have this exit code."""
        return verb(*words, code=code, **self._places)


class Daemon:
    """A running daemon and its client."""

    def __init__(
        self, directories: Directories, *arguments: str, program: str | None = None
    ) -> None:
        """`program`: Python that runs the command's `main` in its own way."""
        command = COMMAND if program is None else [sys.executable, "-c", program]
        self.directories = directories
        started = time.monotonic()
        with directories.log.open("ab") as log, directories.out.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "run", "--config", str(directories.config), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=directories.environment | {"PYTHONFAULTHANDLER": "1"},
            )
        self.client = Client(directories.runtime / "vmdedup.sock")
        try:
            assert becomes_true(self._answers, 12 * ALLOWANCE), directories.log.read_text()
        except BaseException:
            self.kill()
            raise
        self.start_s = time.monotonic() - started

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.directories.log.read_text()
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.client.socket)) != 0:
                return False
        # A killed daemon's server may have listened for the last time: the HTTP library
        # leaves a socket that was refused to the collector.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                return self.client.health().engine.engine_pid == self.process.pid
            except ServiceError:
                return False

    def cpu_s(self) -> float:
        """CPU time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def names(self) -> set[str]:
        """The VMs listed."""
        return {row.name for row in self.client.vms().vms}

    def row_of(self, vm: Vm) -> tuple[bool, str | None]:
        """Whether a VM is merged, and why not; (False, None) for one that is not listed."""
        rows = [row for row in self.client.vms().vms if row.pid == vm.pid]
        return (rows[0].mergeable, rows[0].reason) if rows else (False, None)

    def happened(self, kind: str) -> list[str]:
        """The messages of the events of that kind."""
        return [event.message for event in self.client.events().events if event.kind == kind]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> float:
        """SIGTERM, and wait for the end; how long that took."""
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        assert self.process.wait(_END_S) == 0, self.directories.log.read_text()
        return time.monotonic() - began

    def kill(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def killed_at(step: str, occurrence: int = 0) -> str:
    """A `program` that ends by SIGKILL at a step, after it has passed it `occurrence` times."""
    return _DYING.format(step=step, occurrence=occurrence)


@contextmanager
def running(
    directories: Directories, *arguments: str, program: str | None = None
) -> Iterator[Daemon]:
    """A daemon for a block; how it ended is printed, for pytest to show when the test fails."""
    daemon = Daemon(directories, *arguments, program=program)
    try:
        yield daemon
    finally:
        ended = daemon.process.poll()
        daemon.kill()
        print(directories.log.read_text(), f"it ended by itself: {ended}" if ended else "")


def monitors(*vms: Vm) -> list[str]:
    """The options that name these VMs to a daemon."""
    return [word for vm in vms for word in ("--qmp", str(vm.qmp_path))]


def store_pages(vm: Vm) -> int:
    """Pages of a VM that its kernel maps privately from a store.

    A shared mapping of it serves to compare in place, until nobody waits any more.
    """
    merged = (m for m in mappings(vm.pid) if m.is_store and m.permissions.endswith("p"))
    return sum(m.pages for m in merged)


def saved(daemon: Daemon) -> int:
    """What the kernel's page tables say is saved now."""
    return daemon.client.report(fresh=True).host.saved_bytes


def wait_mergeable(daemon: Daemon, *vms: Vm) -> None:
    """Until these VMs are attached: on a busy host a monitor may not greet at once."""
    are_all = becomes_true(lambda: all(daemon.row_of(vm)[0] for vm in vms), 8 * ALLOWANCE)
    assert are_all, daemon.client.vms()


def merged(daemon: Daemon, *vms: Vm) -> None:
    """Have these VMs merged, as the kernel sees it."""
    wait_mergeable(daemon, *vms)
    report = daemon.client.merge([vm.name for vm in vms], timeout_s=60)
    assert report.converged
    assert min(map(store_pages, vms)) > 200


def why_unreachable(url: str) -> str:
    """What a client says of a daemon that cannot be reached there, in one line."""
    with Client(url) as client:
        try:
            client.health()
        except ServiceUnreachableError as failure:
            line = str(failure)
        else:
            raise AssertionError(f"{url} can be reached")
    assert line.startswith(f"{url}: ")
    assert "\n" not in line
    return line


def assert_unharmed(*vms: Vm) -> None:
    """The guests have checked all of their memory once more, and it was right."""
    for vm in vms:
        vm.wait_passes(1)
        assert (vm.errors, vm.serial.complaints()) == (0, [])
