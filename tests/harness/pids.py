"""Processes with chosen process ids: what pid reuse looks like.

Owns the small parent that makes them (clone3 with set_tid, as CRIU restores
processes). A pid can be taken again as soon as its last owner has been waited for.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.harness.vm import Vm

_PARENT = """
import ctypes, os, sys
SYS_CLONE3, SIGCHLD = 435, 17
libc = ctypes.CDLL(None, use_errno=True)
wanted = (ctypes.c_int * 1)(int(sys.argv[1]))
arguments = (ctypes.c_uint64 * 10)()
arguments[4], arguments[8], arguments[9] = SIGCHLD, ctypes.addressof(wanted), 1
pid = libc.syscall(SYS_CLONE3, arguments, ctypes.sizeof(arguments))
if pid == 0:
    libc.prctl(1, 9, 0, 0, 0)
    os.execvp(sys.argv[2], sys.argv[2:])
if pid < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


_ASLEEP = "230 "
"""clock_nanosleep."""


def command_with_pid(pid: int, command: Sequence[str]) -> list[str]:
    """A command whose only child runs `command` as process `pid` and ends with it."""
    return [sys.executable, "-S", "-c", _PARENT, str(pid), *command]


@contextmanager
def imposters(pids: Sequence[int]) -> Iterator[list[int]]:
    """Sleeping processes with these ids."""
    parents = [
        subprocess.Popen(command_with_pid(pid, ["sleep", "1000"]), stderr=subprocess.PIPE)
        for pid in pids
    ]
    try:
        for pid, parent in zip(pids, parents, strict=True):
            _wait_for(pid, parent)
        yield list(pids)
    finally:
        for parent in parents:
            parent.kill()
            parent.communicate()


def _wait_for(pid: int, parent: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(OSError):
            if Path(f"/proc/{pid}/syscall").read_text().startswith(_ASLEEP):
                return
        assert parent.poll() is None, (parent.stderr.read() if parent.stderr else b"").decode()
        time.sleep(0.01)
    raise AssertionError(f"no process {pid}")


def traces(pid: int) -> tuple[str, ...]:
    """What would change if anybody did anything to a sleeping process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    kept = (
        "voluntary",
        "nonvoluntary",
        "TracerPid",
        "FDSize",
        "VmPeak",
        "VmSize",
        "SigPnd",
        "ShdPnd",
    )
    return (Path(f"/proc/{pid}/maps").read_text(), *(x for x in status if x.startswith(kept)))


@cache
def set_tid_missing() -> str | None:
    """Whether processes with chosen ids can be made."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    try:
        with imposters([ended.pid]):
            return None
    except AssertionError as error:
        return f"a process id cannot be chosen here: {error}"


class VmWithPid(Vm):
    """A VM whose QEMU gets the process id `wanted`."""

    def __init__(self, *arguments: Any, wanted: int, **options: Any) -> None:
        self._wanted = wanted
        super().__init__(*arguments, **options)

    @property
    def pid(self) -> int:
        return self._wanted

    def _start(self, command: list[str], uid: int | None, thp: bool) -> subprocess.Popen[bytes]:
        return super()._start(command_with_pid(self._wanted, command), uid, thp)

    def _end(self) -> None:
        super()._end()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{self._wanted}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
