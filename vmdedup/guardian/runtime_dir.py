"""The runtime directory: the engine's lock, and the notes about paused VMs.

Owns `engine.lock` and `stopped-PID-START.json`. Promises that the lock goes
when its holder dies, and that a note exists for as long as a VM is paused by
us: written before `stop` is sent, removed after `cont` was answered. Whoever
finds a note of a dead engine, or one that a living engine has given up, resumes
exactly that VM; the draft of one, of a VM that was not paused yet, is removed.
Refuses a directory that others may write.
"""

from __future__ import annotations

import json
import os
import stat
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
    """The thread on which calls run meanwhile; idle again before the VM may go on."""
    engine_pid: int
    """0 once the engine has given up resuming it: whoever reads the note may."""
    engine_start_ticks: int


class RuntimeDirectory:
    """One engine's hold of a runtime directory.

    Raises UsageError when the directory is unsafe, RuntimeBusyError naming the
    holder when another engine has the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        """Let go of the lock."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def give_up(self, note: StopNote) -> None:
        """Leave it to others to resume a VM that does not answer."""
        given_up = replace(note, engine_pid=0, engine_start_ticks=0)
        try:
            # SAFETY: one rename. Killed before: the guardian resumes it as a dead engine's.
            self.write_note(given_up)
        except OSError:
            # SAFETY: no room for a second file: into the first, which has some, at once.
            file = self.note_path(note.pid, note.start_ticks)
            whole = json.dumps(asdict(given_up)).encode().ljust(file.stat().st_size)
            with file.open("r+b", buffering=0) as there:
                there.write(whole)

    def is_noted(self, pid: int, start_ticks: int) -> bool:
        """Whether a VM is paused by an engine, or waits for somebody to resume it."""
        return self.note_path(pid, start_ticks).exists()

    def note_path(self, pid: int, start_ticks: int) -> Path:
        """Where the note of that VM is, if there is one."""
        return self.path / f"stopped-{pid}-{start_ticks}.json"

    def write_note(self, note: StopNote) -> Path:
        """Note that a VM is about to be paused; on disk before this returns.

        Raises OSError, which names the directory; what there was before is left then.
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
