"""Processes of a pid namespace of their own, found by the names that they have there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true
from tests.harness.skips import require
from vmdedup.attach.libvirt.processes import daemon_of, qemu_of

pytestmark = pytest.mark.process

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
_POD = ["unshare", "--pid", "--fork", "--kill-child"]
_LISTENER = """
import socket, sys, threading, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
def tell():
    print(threading.get_native_id(), flush=True)
    time.sleep(600)
threading.Thread(target=tell, daemon=True).start()
time.sleep(600)
"""


@contextmanager
def listening(path: Path, *words: str, pod: bool) -> Iterator[tuple[int, int]]:
    """A process that listens there, with these words on its command line.

    Its pid, and what one of its threads calls itself.
    """
    command = [sys.executable, "-c", _LISTENER, str(path), *words]
    process = subprocess.Popen([*_POD, *command] if pod else command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        thread = int(process.stdout.readline())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield (int(children) if pod else process.pid), thread
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    require(root_missing())
    tried = subprocess.run([*_POD, "true"], capture_output=True, text=True, check=False)
    require(None if tried.returncode == 0 else f"no pid namespace: {tried.stderr.strip()}")


def test_a_thread_is_found_by_the_name_that_it_has_in_its_pod(tmp_path: Path) -> None:
    uri = f"qemu:///system?socket={tmp_path / 'sock'}"
    with listening(tmp_path / "sock", UUID, pod=True) as (pid, thread):
        assert thread < 10 < pid
        assert daemon_of(uri) == pid
        assert qemu_of(uri, UUID, thread) == pid
        assert qemu_of(uri, UUID, thread + 1) is None
        assert qemu_of(uri, "another", thread) is None
    assert becomes_true(lambda: daemon_of(uri) is None)  # the pod ends a moment later


def test_a_process_of_another_pod_is_not_taken_for_it(tmp_path: Path) -> None:
    uri = f"qemu:///system?socket={tmp_path / 'sock'}"
    with (
        listening(tmp_path / "sock", pod=True),
        listening(tmp_path / "other", UUID, pod=True) as (_, thread),
    ):
        assert qemu_of(uri, UUID, thread) is None


def test_in_our_own_namespace_the_kernels_name_counts(tmp_path: Path) -> None:
    uri = f"qemu:///system?socket={tmp_path / 'sock'}"
    with listening(tmp_path / "sock", UUID, pod=False) as (pid, thread):
        assert daemon_of(uri) == pid
        assert qemu_of(uri, UUID, thread) == pid
