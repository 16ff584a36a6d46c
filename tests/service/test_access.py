"""Who may talk to the daemon, which VMs it finds by itself, and that there is one of it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import Directories, assert_unharmed, merged, monitors, running

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

GROUP = 4242

ASK = """
import os, socket, sys
path, groups = sys.argv[1], [int(word) for word in sys.argv[2:]]
os.setgroups(groups); os.setgid(65534); os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect(path)
except PermissionError:
    sys.exit("denied")
connection.sendall(b"GET /v1/health HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
print(connection.recv(100).split(b"\\r\\n")[0].decode())
"""
"""Run as another user: the status line of the daemon's answer."""


def answer_to(directories: Directories, *groups: int) -> str:
    """What the daemon answers to a user who is in these groups."""
    socket = directories.runtime / "vmdedup.sock"
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(socket), *map(str, groups)],
        capture_output=True,
        text=True,
        check=False,
        env={},  # coverage.py, if it is on, could not write as that user
    )
    return done.stdout.strip() or done.stderr.strip()


def test_the_socket_is_for_root_and_the_group(directories: Directories) -> None:
    directories.base.chmod(0o711)
    nothing = ["--qmp", str(directories.base / "*.qmp")]
    directories.write(f'api_group = "{GROUP}"\n')
    with running(directories, *nothing) as daemon:
        found = daemon.client.socket.stat()
        assert (found.st_uid, found.st_gid) == (os.geteuid(), GROUP)
        assert stat.S_IMODE(found.st_mode) == 0o660
        folder = directories.runtime.stat()
        assert (stat.S_IMODE(folder.st_mode), folder.st_gid) == (0o710, GROUP)
        assert answer_to(directories, GROUP) == "HTTP/1.1 200 OK"
        assert answer_to(directories) == "denied"
        assert answer_to(directories, GROUP + 1) == "denied"
        lock = directories.runtime / "engine.lock"
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    directories.write()
    with running(directories, *nothing):
        assert answer_to(directories, GROUP) == "denied"


def test_a_second_daemon_takes_over_when_the_first_ends(
    directories: Directories, start: Start
) -> None:
    """It waits a while for the lock: a restart needs no pause and loses no merge."""
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as first:
        merged(first, *vms)
        ending = threading.Timer(1, first.kill)
        ending.start()
        # Answers only when it has the lock: that of the first is another process.
        with running(directories, *monitors(*vms)) as second:
            assert first.process.poll() is not None
            merged(second, *vms)
        ending.join()
        assert_unharmed(*vms)


def test_without_sockets_every_qemu_of_the_host_is_found(
    need: Callable[[str | None], None],
) -> None:
    """In a process namespace of its own, where the host's other VMs are not seen."""
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    tried = subprocess.run([*alone, "true"], capture_output=True, text=True, check=False)
    need(None if tried.returncode == 0 else f"no process namespace: {tried.stderr.strip()}")
    done = subprocess.run(
        [*alone, sys.executable, "-m", "tests.service.discovery"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "found, merged, followed"
