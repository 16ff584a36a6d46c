"""The victim process, seen from the tests."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vmdedup.inject.scratch_files import scratch_fds, scratch_mappings

_NOBODY = 65534
_SOURCES = Path(__file__).parent


_VICTIM = ("victim.c", "victim_registers.S")
_BARE = ("-nostdlib", "-static", "bare.S")
_PROGRAMS = {
    "dynamic": _VICTIM,
    "static": ("-static", *_VICTIM),
    "bare": _BARE,
    "bare-no-restorer": ("-DNO_RESTORER", *_BARE),
    "idlers": ("idlers.c",),
}
"""Options and sources of each program that tests look into."""


def build(folder: Path) -> dict[str, Path]:
    """Compile all programs into the folder, or take them from VMDEDUP_VICTIMS."""
    if built := os.environ.get("VMDEDUP_VICTIMS"):
        return {name: Path(built) / name for name in _PROGRAMS}
    for name, arguments in _PROGRAMS.items():
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", *arguments]
        subprocess.run([*command, "-o", str(folder / name)], check=True, cwd=_SOURCES)
    return {name: folder / name for name in _PROGRAMS}


@dataclass(frozen=True)
class StateResult:
    """How the worker's system call ended, by the victim's own account."""

    result: int
    errno: int
    took_ms: float
    errors: int
    """Wrong signal masks, alternate stacks and futex results so far."""


class Victim:
    """A running victim, which has `pass_fds` too. A context manager; ends with it."""

    def __init__(self, program: Path, pass_fds: Sequence[int] = ()) -> None:
        self._process = subprocess.Popen(
            [str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            pass_fds=pass_fds,
        )
        self.pid = self._process.pid
        self.worker, self.busy = (int(word) for word in self.ask("tids").split())
        self._checksum = self.ask("check").split()[2]

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def kill_only(self) -> None:
        """Kill it, and do not wait: a traced thread ends only when its tracer lets it."""
        self._process.kill()

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise AssertionError(f"the victim died ({self._process.wait()})") from error

    def hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the victim died ({self._process.wait()})")
        return line.strip()

    def has_answer(self, timeout_s: float) -> bool:
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], timeout_s)[0])

    def ask(self, command: str) -> str:
        self.tell(command)
        return self.hear()

    def enter(self, state: str, ms: int = 0) -> None:
        """The worker leaves its futex for another state."""
        assert self.ask(f"state {state} {ms}") == "ok"

    def result(self) -> StateResult:
        return parse_result(self.ask("result"))

    def require_healthy(self) -> None:
        """Data as it was, no register ever lost, all threads running."""
        _, errors, checksum = self.ask("check").split()
        assert errors == "0"
        assert checksum == self._checksum

    def require_no_scratch(self) -> None:
        assert scratch_mappings(self.pid) == []
        assert scratch_fds(self.pid) == []


def parse_result(answer: str) -> StateResult:
    result, number, took_ms, errors = answer.split()
    return StateResult(int(result), int(number), float(took_ms), int(errors))


def wait_for_syscall(pid: int, tid: int, number: int | str, timeout_s: float = 10.0) -> None:
    """Until the thread is seen inside that system call, or "running"."""
    poll = select.poll()
    path = Path(f"/proc/{pid}/task/{tid}/syscall")
    for _ in range(int(timeout_s * 1000)):
        if path.read_text().split()[0] == str(number):
            return
        poll.poll(1)
    raise AssertionError(f"thread {tid} is in {path.read_text()}, not in system call {number}")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Make this process another user's, without capabilities; needs root."""
    os.setresuid(_NOBODY, _NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def fork_and(run: Callable[[], object]) -> int:
    """Run a callable in a forked child that exits with 0, or with 1 after an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run()
        code = 0
    finally:
        os._exit(code)
