"""VMs of this test run, and the daemon that merges them.

VM_COMMAND starts one VM and stays in the foreground; `{name}`, `{qmp}` and
`{number}` in it are filled in. VM_COUNT (2) is how many. Each VM is ended by its
pid when the tests are over.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmdedup.client import Client

START_S = 60
END_S = 10


@pytest.fixture(scope="session")
def service() -> Iterator[Client]:
    """The running daemon (`vmdedup run`)."""
    with Client() as client:
        client.health()
        yield client


@pytest.fixture(scope="session")
def vms(service: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Names of the VMs, booted and known to the daemon."""
    command = os.environ["VM_COMMAND"]
    folder = tmp_path_factory.mktemp("vms")
    processes: list[subprocess.Popen[bytes]] = []
    names = []
    try:
        for number in range(1, int(os.environ.get("VM_COUNT", "2")) + 1):
            name, qmp = f"ci-{os.getpid()}-{number}", folder / f"{number}.qmp"
            line = command.replace("{name}", name).replace("{qmp}", str(qmp))
            words = shlex.split(line.replace("{number}", str(number)))
            processes.append(subprocess.Popen(words, stdin=subprocess.DEVNULL))
            wait_for(qmp, processes[-1])
            service.attach(qmp)
            names.append(name)
        yield names
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a VM listens on its monitor."""
    deadline = time.monotonic() + START_S
    while not path.exists():
        assert process.poll() is None, f"the VM ended with {process.returncode}"
        assert time.monotonic() < deadline, f"no monitor at {path}"
        time.sleep(0.05)
