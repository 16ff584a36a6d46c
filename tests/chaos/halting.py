"""Ways in which a VM cannot run for a while: stopped, frozen, starved of its processor.

Each begins in the process of the engine that is to die, and is ended by the test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from tests.chaos.engines import Halt

_GROUPS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
_STARVED_CPU = 0
_WAIT_S = 10.0


def begin(pid: int, how: Halt) -> None:
    """From now on the VM's threads do not run; one that a tracer has stops when it is let go."""
    if how == "stop":
        os.kill(pid, signal.SIGSTOP)
        _wait(lambda: all(state in "tTZX" for state in _states(pid)))
    elif how == "freeze":
        group = _group_of(pid)
        group.mkdir(exist_ok=True)
        (group / "cgroup.procs").write_text(str(pid))
        (group / "cgroup.freeze").write_text("1")
        _wait(lambda: "frozen 1" in (group / "cgroup.events").read_text())
    else:
        for tid in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                os.sched_setaffinity(int(tid), {_STARVED_CPU})


def end(pid: int, how: Halt) -> None:
    """Let it run again."""
    if how == "stop":
        os.kill(pid, signal.SIGCONT)
    elif how == "freeze":
        group = _group_of(pid)
        (group / "cgroup.freeze").write_text("0")
        (group.parent / "cgroup.procs").write_text(str(pid))
        _wait(lambda: not (group / "cgroup.procs").read_text().strip())
        group.rmdir()
    else:
        for tid in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                os.sched_setaffinity(int(tid), range(os.cpu_count() or 1))


@contextmanager
def busy_processor(how: Halt) -> Iterator[None]:
    """While in the block, where VMs are to be starved, one processor has no time for them.

    Nor for others, the kernel's own threads included: tests that starve VMs run alone.
    """
    if how != "starve":
        yield
        return
    spin = f"import os; os.sched_setaffinity(0, {{{_STARVED_CPU}}})\nwhile True: pass"
    hog = subprocess.Popen(["chrt", "--fifo", "60", "python3", "-c", spin])
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come to rest"
        time.sleep(0.001)


def _states(pid: int) -> list[str]:
    states = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
            states.append(stat[stat.rindex(")") + 2])
    return states


def _group_of(pid: int) -> Path:
    home = next(path for path in _GROUPS if (path / "cgroup.procs").exists())
    return home / f"vmdedup-test-{pid}"


@cache
def missing(how: Halt) -> str | None:
    """Why a VM cannot be halted in that way here, found out by trying."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        with busy_processor(how):
            begin(process.pid, how)
            end(process.pid, how)
    except (OSError, StopIteration) as error:
        return f"a process cannot be halted by {how}: {error}"
    finally:
        process.kill()
        process.wait()
    if how == "starve" and (os.cpu_count() or 1) < 2:
        return "to starve a VM takes a second processor"
    return None
