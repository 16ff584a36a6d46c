"""Settings of the host that a benchmark changes, put back whatever happens.

Owns the values to go back to. Promises that they are written back when `close` is
called, when the process ends and also when it is killed with SIGKILL: a small shell in
a session of its own waits at a pipe, and writes when the pipe closes.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmark.errors import BenchError
from vmdedup.closing import Closing

_SCRIPT = """
trap '' INT TERM HUP
read -r _
cd "$1" || exit 1
shift
for word; do
    [ -e "${word%%=*}" ] && echo "${word#*=}" >"${word%%=*}"
done
exit 0
"""
_END_LIMIT_S = 120.0


class Restoring(Closing):
    """`values` (`NAME=VALUE`, in this order) go into files of `directory` at the end.

    One benchmark at a time: BenchError while another one's values are to be put back.
    """

    def __init__(self, directory: Path, values: Callable[[], Sequence[str]]) -> None:
        lock_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._shell = self._start(directory, values(), lock_fd)
        except BlockingIOError:
            raise BenchError(f"another benchmark has changed {directory}; wait for it") from None
        finally:
            os.close(lock_fd)  # the shell has it, and with it the lock, until it has written

    def _start(
        self, directory: Path, values: Sequence[str], lock_fd: int
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["sh", "-c", _SCRIPT, "restore", str(directory), *values],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock_fd,),
        )

    def close(self) -> None:
        """Write the values back now. Idempotent."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait(_END_LIMIT_S)
