"""Locks on files and on processes that end with their holder (flock(2)).

Owns taking a lock without waiting, and finding the process that holds one. Such a lock
belongs to the open file: it ends when its last descriptor is closed, however the holder
ends. Promises that a refused caller learns the holder's pid, if the kernel tells it.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from vmdedup.linux.proc_file import read_record


class HeldError(Exception):
    """Another process holds the lock. `pid` is `None` if that is in another namespace."""

    def __init__(self, pid: int | None) -> None:
        super().__init__(f"held by pid {pid}")
        self.pid = pid


def take_lock(fd: int, *, shared: bool = False) -> None:
    """Lock the open file, without waiting. Raises HeldError, OSError."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HeldError(lock_holder(fd)) from error


def lock_holder(fd: int) -> int | None:
    """A process that holds a lock on the file open as `fd`, `None` if none is seen.

    If several processes share the lock, it is any of them.
    """
    found = os.fstat(fd)
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            # 1: FLOCK  ADVISORY  WRITE 5887 00:05:5930 0 EOF (fs/locks.c: lock_get_status)
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == file and words[4] != "0":
                return int(words[4])
    return None


def open_process(pid: int, pidfd: int) -> int:
    """A descriptor whose lock is a lock on the process itself. Raises OSError.

    Since kernel 6.9 each process has an inode of its own in pidfs, which is the same in
    every namespace. Before, all pidfds shared one inode: then the process's folder in /proc
    serves instead. That folder is a different file in each new mount of /proc.
    """
    own = os.pidfd_open(os.getpid())
    try:
        is_of_process = os.fstat(own).st_ino != os.fstat(pidfd).st_ino
    finally:
        os.close(own)
    if is_of_process or pid == os.getpid():
        return os.pidfd_open(pid)
    return os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def command_of(pid: int) -> str:
    """The command line of a process, "" when it cannot be read."""
    try:
        text = read_record(f"/proc/{pid}/cmdline")
    except OSError:
        return ""
    return " ".join(text.rstrip("\0").split("\0"))
