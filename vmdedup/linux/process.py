"""One process, pinned: a pidfd and its start time.

Owns the pidfd. Promises that a `Process` never means another process that
was later given the same pid: the start time is read after the pidfd is open. Refuses
nothing by policy.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from vmdedup.closing import Closing
from vmdedup.errors import MergeError, VmError, VmGoneError
from vmdedup.linux.flock import open_process, take_lock
from vmdedup.linux.proc_file import read_record
from vmdedup.linux.unsynced_stat import file_behind

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ProcessId:
    """Identifies a process for as long as the host runs: pids are reused, pairs are not."""

    pid: int
    start_ticks: int
    """Start time in clock ticks since boot (field 22 of /proc/PID/stat)."""


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state (field 3) on; OSError when there is none."""
    stat = read_record(f"/proc/{pid}/stat")
    return stat[stat.rindex(")") + 2 :].split()


def read_process_id(pid: int) -> ProcessId:
    """Identify `pid` now; OSError when there is no such process."""
    return ProcessId(pid, int(_stat_fields(pid)[19]))


def start_unix_s(pid: int) -> float:
    """When process `pid` was started, to about a second (time.time). Raises OSError."""
    ticks = read_process_id(pid).start_ticks
    with open("/proc/stat", encoding="ascii") as file:
        booted_s = next(int(line.split()[1]) for line in file if line.startswith("btime "))
    return booted_s + ticks / os.sysconf("SC_CLK_TCK")


def end_with(parent_pid: int) -> None:
    """Have the kernel end this process (SIGTERM) with the thread of its parent that started it.

    Ends it at once if that is gone already. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit(0)


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory that a process has mapped, in bytes. Raises OSError if it has ended."""
    with open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has ended")


def is_running(identity: ProcessId) -> bool:
    """Whether exactly this process still runs; a zombie does not."""
    try:
        fields = _stat_fields(identity.pid)
    except OSError:
        return False
    return fields[0] not in "ZX" and int(fields[19]) == identity.start_ticks


def _unseen(vm: str, pid: int, error: OSError) -> VmError:
    """The error that a failed look at a process means: mostly that it has ended."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return MergeError(vm, "look", f"{error.strerror}; vmdedup tries again later", pid=pid)
    return VmGoneError(vm, "the VM's process ended", pid=pid)


class Process(Closing):
    """A running process, held by its pidfd.

    Use as a context manager, or call `close`. Raises VmGoneError when the
    process does not exist (any more). This and the methods raise MergeError
    when we have no descriptor or memory left to look.
    """

    def __init__(self, vm: str, pid: int) -> None:
        self.vm = vm
        self.pid = pid
        self._claim_fd = -1
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise _unseen(vm, pid, error) from error
        try:
            self.identity = read_process_id(pid)
        except OSError as error:
            os.close(self.pidfd)
            raise _unseen(vm, pid, error) from error
        if not self.alive():
            os.close(self.pidfd)
            raise VmGoneError(vm, "the process ended", pid=pid)

    def close(self) -> None:
        """Release the pidfd and the claim; the process itself is not touched."""
        for name in ("pidfd", "_claim_fd"):
            if (fd := getattr(self, name)) >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def claim(self) -> None:
        """Claim the process for this object alone, until `close`; does nothing if it is claimed.

        Raises HeldError while another claim exists, in any process and namespace, and
        VmGoneError.
        """
        if self._claim_fd >= 0:
            return
        try:
            fd = open_process(self.pid, self.pidfd)
        except OSError as error:
            raise _unseen(self.vm, self.pid, error) from error
        try:
            take_lock(fd)
            # The pid may have been reused before it was opened again.
            self.require_alive()
        except OSError as error:
            os.close(fd)
            raise _unseen(self.vm, self.pid, error) from error
        except BaseException:
            os.close(fd)
            raise
        self._claim_fd = fd

    def alive(self, *, for_s: float = 0.0) -> bool:
        """False once the process has ended (a zombie has ended), or if it ends within `for_s`."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(for_s * 1000)

    def require_alive(self) -> None:
        """Raise VmGoneError unless the process still runs."""
        if not self.alive():
            raise VmGoneError(self.vm, "the VM's process ended", pid=self.pid)

    def path(self, name: str) -> Path:
        """`/proc/PID/name`."""
        return Path(f"/proc/{self.pid}/{name}")

    def status(self) -> dict[str, str]:
        """/proc/PID/status as a mapping; VmGoneError when it ended."""
        try:
            text = read_record(f"/proc/{self.pid}/status")
        except OSError as error:
            raise _unseen(self.vm, self.pid, error) from error
        pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
        return {key: value.strip() for key, value in pairs}

    def cgroups(self) -> tuple[str, ...]:
        """Its paths in the cgroup hierarchies, each once; VmGoneError when it ended."""
        try:
            text = read_record(f"/proc/{self.pid}/cgroup", errors="surrogateescape")
        except OSError as error:
            raise _unseen(self.vm, self.pid, error) from error
        paths = (line.split(":", 2)[2] for line in text.splitlines() if line.count(":") >= 2)
        return tuple(dict.fromkeys(paths))

    def only_reads(self, fd: int | str) -> bool:
        """Whether its descriptor `fd` is not open for both reading and writing. Raises OSError."""
        text = read_record(f"/proc/{self.pid}/fdinfo/{fd}")
        flags = next(line for line in text.splitlines() if line.startswith("flags:"))
        return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDWR

    def find_fd(self, device: int, inode: int) -> int | None:
        """Number of a descriptor that the process has open on that file, if any."""
        folder = f"/proc/{self.pid}/fd"
        try:
            names = sorted(os.listdir(folder), key=int)
        except OSError as error:
            raise _unseen(self.vm, self.pid, error) from error
        return next(
            (int(name) for name in names if file_behind(self.pid, name) == (device, inode)), None
        )
