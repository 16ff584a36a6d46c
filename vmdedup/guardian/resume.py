"""Resuming VMs that an engine paused and did not resume.

Owns the way from a stop note to a `cont`: by the guardian for an engine that has ended, by
an engine for itself if its monitor was lost, or for a predecessor. Promises to resume a VM
only if the very process of the note still runs, no call launched inside it is under way, and
QEMU calls its state `paused`.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmdedup.guardian.runtime_dir import StopNote, read_notes
from vmdedup.linux.flock import HeldError, take_lock
from vmdedup.linux.process import ProcessId, is_running

_MONITOR_TIMEOUT_S = 2.0
_LIBVIRT_TIMEOUT_S = 10.0
_RESUME_ATTEMPTS = 10
_ATTEMPT_PAUSE_S = 0.1
_IDLE_CALLS = ("202", "230")
"""futex and clock_nanosleep: QEMU's RCU thread waits in them, and no launched call is one."""


@dataclass
class Resumed:
    """Names of VMs that an engine that has ended had left paused."""

    settled: list[str] = field(default_factory=list)
    """VMs that run, have ended, or were paused by somebody else."""
    unreached: list[str] = field(default_factory=list)
    """VMs that could not be reached; their notes stay, to be tried again."""
    elsewhere: list[str] = field(default_factory=list)
    """VMs that another process is resuming now."""


def left_paused(
    runtime_dir: str | Path, *, closed_engine_pid: int | None = None
) -> list[tuple[Path, StopNote]]:
    """The notes of VMs that no engine will resume by itself any more.

    `closed_engine_pid`: an engine that still runs, but no longer deals with VMs.
    """
    found = []
    for file, note in read_notes(Path(runtime_dir)):
        engine = ProcessId(note.engine_pid, note.engine_start_ticks)
        if engine.pid in (os.getpid(), closed_engine_pid) or not is_running(engine):
            found.append((file, note))
    return found


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Lock a note's file in the block; gives `False` if another process has it, or it is gone.

    SAFETY: a process that resumes a VM by a note has the note alone, from before it is read
    until it is removed. So a slow guardian cannot resume a VM in the pause of a later
    engine, which begins no pause while there is a note.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            take_lock(fd)
            is_current = os.path.samestat(os.fstat(fd), os.stat(file))
        except (HeldError, OSError):
            is_current = False
        yield is_current
    finally:
        os.close(fd)


@contextmanager
def taken(file: Path) -> Iterator[StopNote | None]:
    """As `locked`, but gives the note; `None` also if the note is incomplete."""
    with locked(file) as is_ours:
        yield dict(read_notes(file.parent)).get(file) if is_ours else None


def resume_noted(
    runtime_dir: str | Path,
    *,
    closed_engine_pid: int | None = None,
    pauses: Callable[[int], bool] = lambda _: False,
) -> Resumed:
    """Resume every VM that an engine that has ended left paused, or this one itself.

    `pauses`: whether a thread of this process has paused a VM, and will resume it by itself.
    """
    result = Resumed()
    for file, found in left_paused(runtime_dir, closed_engine_pid=closed_engine_pid):
        if pauses(found.pid):
            continue
        with taken(file) as note:
            if note == found and resume(note):
                file.unlink(missing_ok=True)
                result.settled.append(note.vm)
            elif file.exists():
                (result.unreached if note == found else result.elsewhere).append(found.vm)
    return result


def resume(note: StopNote, *, attempts: int = _RESUME_ATTEMPTS) -> bool:
    """Send `cont` to a noted VM if it is paused; `False` if it could not be reached."""
    if not is_running(ProcessId(note.pid, note.start_ticks)):
        return True
    for _ in range(attempts):
        # SAFETY: calls that the dead engine launched may still be running. Only
        # when they have ended may the guest write again.
        if _is_idle(note.pid, note.thread_id):
            # Only once: a silent monitor takes the whole timeout, and other VMs wait too.
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                if "#" in note.monitor_path:
                    return _resume_by_libvirt(note)
                return _converse(note.monitor_path, note.pid)
            return False
        time.sleep(_ATTEMPT_PAUSE_S)
    return False


def _is_idle(pid: int, thread_id: int) -> bool:
    try:
        call = Path(f"/proc/{pid}/task/{thread_id}/syscall").read_text()
    except FileNotFoundError:
        return True
    return call.startswith(_IDLE_CALLS)


def _resume_by_libvirt(note: StopNote) -> bool:
    """As `_converse`, for a libvirt domain (URI#UUID), in a process that can load libvirt."""
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        " from vmdedup.attach.libvirt.resume import main; main()"
    )
    words = [sys.executable, "-I", "-c", program, str(Path(__file__).parents[2])]
    words += [note.monitor_path, str(note.pid)]
    done = subprocess.run(words, check=False, timeout=_LIBVIRT_TIMEOUT_S, capture_output=True)
    return done.returncode == 0


def _converse(monitor_path: str, pid: int) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(_MONITOR_TIMEOUT_S)
        peer.connect(monitor_path)
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[0] != pid:
            return True
        stream = peer.makefile("rw")

        def execute(command: str) -> object:
            name = f"vmdedup-guardian-{os.getpid()}-{command}"
            stream.write(json.dumps({"execute": command, "id": name}) + "\n")
            stream.flush()
            while line := stream.readline():
                answer = json.loads(line)
                if answer.get("id") == name:
                    return answer.get("return")
            raise ValueError("the monitor closed")

        stream.readline()
        execute("qmp_capabilities")
        status = execute("query-status")
        if isinstance(status, dict) and status.get("status") == "paused":
            # SAFETY: the note says that the engine paused the VM; without `cont` it stays so.
            execute("cont")
    return True
