"""One engine for a store and for a VM: who holds them, who is told so, and what a kill frees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.harness.images import REPOSITORY
from tests.harness.kernel import becomes_true
from vmdedup.core.rmap import FIRST_SLOT
from vmdedup.errors import RuntimeBusyError, StoreBusyError
from vmdedup.guardian.runtime_dir import RuntimeDirectory
from vmdedup.linux.flock import HeldError
from vmdedup.linux.process import Process
from vmdedup.policy.domains import ZERO_ONLY
from vmdedup.remap.domain_store import open_domain_store, remove_unused_stores
from vmdedup.store.stable_store import Access, StableStore
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

_HOLD_STORE = """
import sys, time
from pathlib import Path
from vmdedup.store.stable_store import Access, StableStore
from vmdedup.guardian.runtime_dir import RuntimeDirectory
folder = Path(sys.argv[1])
runtime = RuntimeDirectory(folder / "run")
store = StableStore(folder / "vmdedup", sys.argv[2], Access(sys.argv[3]))
print("held", flush=True)
time.sleep(600)
"""
_CLAIM = """
import sys, time
from vmdedup.linux.process import Process
process = Process("vm", int(sys.argv[1]))
process.claim()
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def other(program: str, *words: str, before: tuple[str, ...] = ()) -> Iterator[int]:
    """A process that holds something, by its pid. It dies by SIGKILL."""
    command = [*before, sys.executable, "-c", program, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """On tmpfs."""
    place = Path(f"/dev/shm/vmdedup-holding-{os.getpid()}")
    place.mkdir()
    try:
        yield place
    finally:
        subprocess.run(["rm", "-r", str(place)], check=True)


def page() -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.ones((1, PAGE_BYTES), dtype=np.uint8)


def test_a_store_has_one_engine_and_the_second_is_told_which(folder: Path) -> None:
    with other(_HOLD_STORE, str(folder), "uid:0", "change") as pid:
        with pytest.raises(StoreBusyError) as busy:
            StableStore(folder / "vmdedup", "uid:0")
        told = str(busy.value)
        assert f"pid {pid}" in told
        assert f"runtime directory {folder / 'run'}" in told
        assert "\n" not in told
        # Another trust domain is another store.
        with StableStore(folder / "vmdedup", "uid:1") as store:
            store.publish(page(), np.ones(1, dtype=np.uint64))
    # SAFETY: the lock went with its killed holder.
    with StableStore(folder / "vmdedup", "uid:0") as store:
        assert store.publish(page(), np.ones(1, dtype=np.uint64)) == FIRST_SLOT


def test_a_store_that_an_engine_has_is_not_removed(folder: Path) -> None:
    with other(_HOLD_STORE, str(folder), "uid:0", "change"):
        inode = (folder / "vmdedup" / "uid%3A0.store").stat().st_ino
        assert not remove_unused_stores(folder / "vmdedup")
        assert (folder / "vmdedup" / "uid%3A0.store").stat().st_ino == inode
    assert remove_unused_stores(folder / "vmdedup")


def test_reading_takes_no_lock_and_changes_nothing(folder: Path) -> None:
    with other(_HOLD_STORE, str(folder), "uid:0", "change"):
        store = open_domain_store(folder / "vmdedup", "uid:0", dry=True)
        assert store.file is not None
        assert store.file.access is Access.READ
        with pytest.raises(AssertionError):
            store.file.publish(page(), np.ones(1, dtype=np.uint64))
        store.close()


def test_vms_that_share_with_nobody_may_have_several_engines(folder: Path) -> None:
    with other(_HOLD_STORE, str(folder), ZERO_ONLY, "share"):
        store = open_domain_store(folder / "vmdedup", ZERO_ONLY)
        store.close()
        assert not remove_unused_stores(folder / "vmdedup")


def test_a_store_that_was_removed_meanwhile_is_made_anew(folder: Path) -> None:
    """The next engine opened the file in the moment before it went."""
    first = StableStore(folder / "vmdedup", "uid:0")
    stale = os.open(first.path, os.O_RDWR)
    first.remove()
    first.close()
    with StableStore(folder / "vmdedup", "uid:0") as second:
        assert second.inode != os.fstat(stale).st_ino
        assert second.path.stat().st_ino == second.inode
        assert second.path.with_suffix(".sums").exists()
    os.close(stale)


def test_a_runtime_directory_names_its_holder(folder: Path) -> None:
    with other(_HOLD_STORE, str(folder), "uid:0", "change") as pid:
        with pytest.raises(RuntimeBusyError, match=f"pid {pid}.*works with {folder / 'run'}"):
            RuntimeDirectory(folder / "run")
        (folder / "run" / "vmdedup.sock").touch()
        with pytest.raises(RuntimeBusyError, match="`vmdedup merge --runtime-dir"):
            RuntimeDirectory(folder / "run")


def test_a_process_has_one_claim(victim_pid: int) -> None:
    with Process("vm", victim_pid) as process:
        with other(_CLAIM, str(victim_pid)) as pid:
            with pytest.raises(HeldError) as held:
                process.claim()
            assert held.value.pid == pid
        process.claim()
        process.claim()
        with Process("vm", victim_pid) as again, pytest.raises(HeldError):
            again.claim()
    with Process("vm", victim_pid) as process:
        process.claim()


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace takes root")
def test_a_claim_holds_across_mount_namespaces(victim_pid: int) -> None:
    own_proc = ("unshare", "--mount", "--propagation", "private")
    with (
        other(_CLAIM, str(victim_pid), before=own_proc),
        Process("vm", victim_pid) as process,
        pytest.raises(HeldError),
    ):
        process.claim()


@pytest.fixture
def victim_pid() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "600"])
    try:
        assert becomes_true(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        yield process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
