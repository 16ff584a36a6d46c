"""One engine for a store and for a VM: who holds them, who is told so, and what a kill frees.

And who ends a pause, which store files are refused, or were removed by another engine while
they were opened.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.harness.images import REPOSITORY
from tests.harness.kernel import becomes_true
from vmdedup.core.rmap import FIRST_SLOT
from vmdedup.errors import (
    AttachError,
    MergeError,
    RuntimeBusyError,
    StoreBusyError,
    StoreError,
)
from vmdedup.guardian.resume import locked
from vmdedup.guardian.runtime_dir import RuntimeDirectory, StopNote
from vmdedup.linux.flock import HeldError, take_lock
from vmdedup.linux.process import Process
from vmdedup.policy.domains import ZERO_ONLY
from vmdedup.remap import session
from vmdedup.remap.domain_store import open_domain_store, remove_unused_stores
from vmdedup.remap.stopped import StoppedSession
from vmdedup.store import stable_store
from vmdedup.store.stable_store import Access, PublishedPages, StableStore
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

_HOLD_STORE = """
import sys, time
from pathlib import Path
from vmdedup.remap.stopped import StoppedSession
from vmdedup.store import stable_store
from vmdedup.store.stable_store import Access, PublishedPages, StableStore
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


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes another user")
def test_a_store_is_not_swept_by_who_may_not_see_what_a_qemu_maps(folder: Path) -> None:
    """Pages that the QEMU shows would be discarded. Nothing is, and the store is let go."""
    nobody = 65534
    os.chown(folder, nobody, nobody)
    (folder / "kvm").symlink_to("/bin/sleep")
    with subprocess.Popen([folder / "kvm", "600"]) as qemu:
        try:
            comm = Path(f"/proc/{qemu.pid}/comm")
            assert becomes_true(lambda: comm.read_text() == "kvm\n")
            os.seteuid(nobody)
            with StableStore(folder / "vmdedup", "uid:0") as store:
                slot = store.publish(page(), np.ones(1, dtype=np.uint64))
            for _ in range(2):
                with pytest.raises(StoreError, match=r"cannot see whether .* maps it: run as root"):
                    open_domain_store(folder / "vmdedup", "uid:0")
            with StableStore(folder / "vmdedup", "uid:0") as store:
                assert store.allocated_slots()[slot]
        finally:
            os.seteuid(0)
            qemu.kill()


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


@pytest.mark.parametrize("removed", ["directory", "file"])
def test_a_store_that_is_removed_while_it_is_opened_is_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    """By another engine: its directory before the file is made, or the file before its lock."""
    steps = [removed]
    prepare = stable_store.prepare_directory

    def prepare_first(directory: Path) -> Path:
        prepare(directory)
        if steps == ["directory"]:
            steps.clear()
            directory.rmdir()
        return directory

    def remove_first(fd: int, *, shared: bool) -> None:
        if steps == ["file"]:
            steps.clear()
            Path(f"/proc/self/fd/{fd}").readlink().unlink()
        take_lock(fd, shared=shared)

    monkeypatch.setattr(stable_store, "prepare_directory", prepare_first)
    monkeypatch.setattr("vmdedup.store.stable_store.take_lock", remove_first)
    before = len(os.listdir("/proc/self/fd"))
    with StableStore(folder / "vmdedup", "uid:0") as store:
        assert not steps
        assert store.path.stat().st_ino == store.inode
        with pytest.raises(StoreBusyError):
            StableStore(folder / "vmdedup", "uid:0")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("suffix", [".store", ".sums"])
def test_a_link_in_the_place_of_a_file_is_not_followed(folder: Path, suffix: str) -> None:
    with StableStore(folder / "vmdedup", "uid:0") as store:
        path = store.path.with_suffix(suffix)
    kept = path.rename(folder / "kept")
    path.symlink_to(kept)
    before = kept.read_bytes()
    with pytest.raises(StoreError, match="symbolic links"):
        StableStore(folder / "vmdedup", "uid:0")
    assert kept.read_bytes() == before
    # The lock of the attempt is gone with it.
    path.unlink()
    with StableStore(folder / "vmdedup", "uid:0") as store:
        store.publish(page(), np.ones(1, dtype=np.uint64))


def test_a_store_that_can_not_be_had_is_told_in_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    with pytest.raises(StoreError, match=f"store directory {folder}/file/own: Not a directory"):
        StableStore(folder / "file" / "own", "uid:0")

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(StoreError, match=r"uid%3A0\.store: No locks available"):
            StableStore(folder / "vmdedup", "uid:0")
    assert len(os.listdir("/proc/self/fd")) == before
    for name in ("uid%3A0.store", "uid%3A0.sums"):
        (folder / "vmdedup" / name).touch(mode=0o600)
    with pytest.raises(StoreError, match="another vmdedup is just making it; try again"):
        open_domain_store(folder / "vmdedup", "uid:0", dry=True)
    StableStore(folder / "vmdedup", "uid:0").close()


def test_a_store_without_free_slots_publishes_no_more(folder: Path) -> None:
    """The file is sparse: each slot has been used up, and holds nothing any more."""
    with StableStore(folder / "vmdedup", "uid:0") as store:
        os.truncate(store.path, (2**31 - 1) * PAGE_BYTES)
    with StableStore(folder / "vmdedup", "uid:0") as store:
        with pytest.raises(StoreError, match="has used all its slots: unmerge all"):
            store.publish(page(), np.ones(1, dtype=np.uint64))
        assert store.path.stat().st_blocks == 0
        store.remove()
    with StableStore(folder / "vmdedup", "uid:0") as store:
        assert store.publish(page(), np.ones(1, dtype=np.uint64)) == FIRST_SLOT


def test_an_empty_store_is_not_mapped_and_a_mapped_one_is_unmapped_once(folder: Path) -> None:
    with StableStore(folder / "vmdedup", "uid:0") as store:
        with pytest.raises(FileNotFoundError, match="the store is empty"):
            PublishedPages.open(store.path, store.device, store.inode)
        store.publish(page(), np.ones(1, dtype=np.uint64))
        published = PublishedPages.open(store.path, store.device, store.inode)
        published.close()
        # In its place: what came there since is not ours to unmap.
        again = PublishedPages.open(store.path, store.device, store.inode)
        maps = Path("/proc/self/maps").read_text()
        assert store.path.name in maps
        published.close()
        assert store.path.name in Path("/proc/self/maps").read_text()
        again.close()
    assert store.path.name not in Path("/proc/self/maps").read_text()


_OPEN_STORE = """
import os, sys
from pathlib import Path
from vmdedup.store.stable_store import StableStore
with StableStore(Path(sys.argv[1]), "uid:0") as store:
    fd = store.open_read_only()
    assert os.path.sameopenfile(fd, os.open(store.path, os.O_RDONLY))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace takes root")
@pytest.mark.parametrize("stale", [False, True])
def test_a_store_below_a_bind_mount_is_lent_and_not_what_the_mount_hides(
    folder: Path, stale: bool
) -> None:
    for name in ("own", "seen"):
        (folder / name).mkdir(mode=0o700)
    hidden = folder / "seen" / "uid%3A0.store"
    if stale:
        hidden.write_bytes(b"hidden")
    bind = f'mount --bind {folder}/own {folder}/seen; exec "$@"'
    before = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", bind, "sh")
    command = [*before, sys.executable, "-c", _OPEN_STORE, str(folder / "seen")]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    assert (folder / "own" / "uid%3A0.store").exists()
    assert hidden.exists() == stale
    assert not stale or hidden.read_bytes() == b"hidden"


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


def test_a_pause_is_ended_by_one_alone(
    folder: Path, victim_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its monitor is not even asked while another thread, or a guardian, is to resume the VM."""
    monkeypatch.setattr(session, "_NOTE_WAIT_S", 0.05)
    runtime = RuntimeDirectory(folder / "run")
    host: Any = SimpleNamespace(runtime=runtime)
    with Process("vm", victim_pid) as process:
        ticks = process.identity.start_ticks
        note = StopNote("vm", victim_pid, ticks, "/nowhere", victim_pid, os.getpid(), 1)
        identity = SimpleNamespace(name="vm", start_ticks=ticks)
        vm: Any = SimpleNamespace(
            name="vm", pid=victim_pid, process=process, identity=identity, findings=[]
        )
        nothing: Any = None
        paused = StoppedSession(
            "vm",
            remote=nothing,
            pagemap=nothing,
            monitor=nothing,
            guardian=nothing,
            runtime=runtime,
            note=note,
            size=nothing,
            budget_ms=10,
            look=lambda: None,
            protection=None,
        )
        file = runtime.write_note(note)
        assert runtime.begin_pause(victim_pid)
        session.resume_given_up(host, vm)
        with pytest.raises(MergeError, match="it is paused until there is memory"), paused:
            pass
        assert (file.exists(), runtime.pauses(victim_pid)) == (True, True)
        runtime.end_pause(victim_pid)
        with locked(file) as is_ours:
            assert is_ours
            with pytest.raises(AttachError, match="a guardian is just resuming it"):
                session.resume_given_up(host, vm)
        with pytest.raises(MergeError, match="still to be resumed after an earlier pause"):
            session._stopped(host, vm, nothing, None)
        assert file.exists()
    runtime.close()
