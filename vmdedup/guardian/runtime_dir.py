"""The runtime directory: the engine's lock, and the notes about paused VMs.

Owns `engine.lock` and `stopped-PID-START.json`. Promises that the lock is released
when its holder dies, and that a note exists for as long as a VM is paused by
us: it is written before `stop` is sent, and removed after `cont` was answered. A process
that finds a note of a dead engine, or one that a living engine has given up, resumes
exactly that VM. A draft of a note, whose VM was not paused yet, is removed.
Refuses a directory that others may write.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmdedup import faults
from vmdedup.errors import RuntimeBusyError, UsageError
from vmdedup.linux.flock import HeldError, take_lock
from vmdedup.linux.other_engine import LOCK_NAME, held_by


@dataclass(frozen=True)
class StopNote:
    """A VM that this engine has paused, and how to resume it."""

    vm: str
    pid: int
    start_ticks: int
    monitor_path: str
    thread_id: int
    """Id of the thread on which calls run in the pause; it must be idle before a resume."""
    engine_pid: int
    """Process id of the engine, `0` once it has given up resuming the VM: then others may."""
    engine_start_ticks: int


class RuntimeDirectory:
    """One engine's hold of a runtime directory.

    Raises UsageError if the directory is unsafe, RuntimeBusyError naming the
    holder if another engine has the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pausing: set[int] = set()
        self._pausing_lock = threading.Lock()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode):
                raise UsageError(f"runtime directory {path} is not a directory: remove it")
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise UsageError(f"runtime directory {path} is not ours alone: chmod 700 it")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock_fd = os.open(path / LOCK_NAME, flags, 0o600)
        except OSError as error:
            raise UsageError(
                f"runtime directory {path}: {error.strerror}; set VMDEDUP_RUNTIME_DIR"
            ) from error
        try:
            self._take(self._lock_fd)
        except BaseException:
            self.close()
            raise

    def _take(self, lock_fd: int) -> None:
        try:
            take_lock(lock_fd)
            for draft in self.path.glob("stopped-*.draft"):  # its engine was killed at it
                draft.unlink()
            os.ftruncate(lock_fd, 0)
            os.pwrite(lock_fd, str(os.getpid()).encode(), 0)
        except HeldError as error:
            raise RuntimeBusyError(held_by(error.pid, f"works with {self.path}")) from None
        except OSError as error:
            raise UsageError(
                f"runtime directory {self.path}: {error.strerror}; make room,"
                " or set VMDEDUP_RUNTIME_DIR"
            ) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def give_up(self, note: StopNote) -> None:
        """Leave it to others to resume a VM that does not answer."""
        given_up = replace(note, engine_pid=0, engine_start_ticks=0)
        try:
            # SAFETY: one rename. Killed before: the guardian resumes the VM of a dead engine.
            self.write_note(given_up)
        except OSError:
            # SAFETY: there is no room for a second file, so one write replaces the content of
            # the first, which has room.
            file = self.note_path(note.pid, note.start_ticks)
            whole = json.dumps(asdict(given_up)).encode().ljust(file.stat().st_size)
            with file.open("r+b", buffering=0) as there:
                there.write(whole)

    def begin_pause(self, pid: int) -> bool:
        """Claim the pauses of a VM until `end_pause`; False if another thread of ours has them.

        SAFETY: who resumes a VM must be the one who paused it. A merge in a pause of another
        thread would have the guest run on in the middle of a gate.
        """
        with self._pausing_lock:
            is_free = pid not in self._pausing
            self._pausing.add(pid)
            return is_free

    def end_pause(self, pid: int) -> None:
        """Give up the claim; the VM runs, or its note was given up."""
        with self._pausing_lock:
            self._pausing.discard(pid)

    def pauses(self, pid: int) -> bool:
        """Whether a thread of ours has claimed the VM's pauses, and will end them itself."""
        with self._pausing_lock:
            return pid in self._pausing

    def is_noted(self, pid: int, start_ticks: int) -> bool:
        """Whether a VM is paused by an engine, or waits for somebody to resume it."""
        return self.note_path(pid, start_ticks).exists()

    def note_path(self, pid: int, start_ticks: int) -> Path:
        """Path of the note of that VM, whether or not it exists."""
        return self.path / f"stopped-{pid}-{start_ticks}.json"

    def write_note(self, note: StopNote) -> Path:
        """Note that a VM is about to be paused; the note is in place before this returns.

        Raises OSError, which names the directory; an earlier note then stays as it was.
        """
        target = self.note_path(note.pid, note.start_ticks)
        draft = target.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(asdict(note)))
            faults.reached("note-drafted")
            draft.replace(target)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return target


def read_notes(path: Path) -> list[tuple[Path, StopNote]]:
    """The notes in a runtime directory; a file that is not a whole note is skipped."""
    notes = []
    for file in sorted(path.glob("stopped-*.json")):
        try:
            notes.append((file, StopNote(**json.loads(file.read_text()))))
        except (OSError, ValueError, TypeError):
            continue
    return notes
