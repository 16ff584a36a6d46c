"""The user's program for short memory: told, bounded, and never waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest

from tests.harness.kernel import becomes_true
from vmdedup.daemon.memory_hook import MemoryHook

pytestmark = pytest.mark.process

END_S = 30


@pytest.fixture
def told() -> Queue[str]:
    return Queue()


@pytest.fixture
def hook(told: Queue[str]) -> Iterator[MemoryHook]:
    with MemoryHook(told.put) as running:
        yield running


def program(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def test_it_gets_the_document_and_little_else(
    hook: MemoryHook, told: Queue[str], tmp_path: Path
) -> None:
    into = f"> {tmp_path}/"
    lines = (f"cat {into}in", f"env {into}env", f"pwd {into}pwd", f'printf %s "$1" {into}word')
    path = program(tmp_path, "\n".join(lines))
    hook.run([path, "$(id) 'x'"], 10, "host", '{"event": "memory-short"}')
    assert told.get(timeout=END_S) == f"{path} has ended"
    assert (tmp_path / "in").read_text() == '{"event": "memory-short"}'
    assert (tmp_path / "word").read_text() == "$(id) 'x'", "no shell"
    assert (tmp_path / "pwd").read_text() == "/\n"
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert names <= {"PATH", "PWD", "SHLVL", "_", "OLDPWD"}


@pytest.mark.parametrize("text", ["exit 7", "kill -9 $$"])
def test_how_it_ended_is_told(
    hook: MemoryHook, told: Queue[str], tmp_path: Path, text: str
) -> None:
    path = program(tmp_path, text)
    hook.run([path], 10, "host", "{}")
    code = 7 if text == "exit 7" else -9
    assert told.get(timeout=END_S) == f"{path} ended with {code}"


def test_one_that_hangs_is_killed_with_its_children(
    hook: MemoryHook, told: Queue[str], tmp_path: Path
) -> None:
    path = program(tmp_path, f"sleep 600 &\necho $! > {tmp_path}/child\nwait")
    began_s = time.monotonic()
    hook.run([path], 1, "host", "{}")
    assert time.monotonic() - began_s < 1, "nobody waits for it"
    assert told.get(timeout=END_S) == f"{path} was killed after 1 s"
    child = int((tmp_path / "child").read_text())
    assert becomes_true(lambda: not runs(child))


def test_one_that_is_not_there_harms_nothing(hook: MemoryHook, told: Queue[str]) -> None:
    hook.run(["/nowhere/program"], 10, "host", "{}")
    assert told.get(timeout=END_S).startswith("/nowhere/program cannot be started: No such file")
    hook.run(["/bin/true"], 10, "host", "{}")
    assert told.get(timeout=END_S) == "/bin/true has ended"


def test_while_one_runs_only_the_newest_of_a_place_waits(
    hook: MemoryHook, told: Queue[str], tmp_path: Path
) -> None:
    path = program(
        tmp_path, f"cat >> {tmp_path}/in\nuntil [ -e {tmp_path}/go ]; do sleep 0.01; done"
    )
    hook.run([path], END_S, "host", "first ")
    assert becomes_true((tmp_path / "in").exists)
    for number in range(3):
        hook.run([path], END_S, "host", f"host{number} ")
        hook.run([path], END_S, "group", f"group{number} ")
    (tmp_path / "go").touch()
    for _ in range(3):
        told.get(timeout=END_S)
    assert (tmp_path / "in").read_text().split() == ["first", "host2", "group2"]
    assert told.empty()


def test_the_end_kills_what_runs(told: Queue[str], tmp_path: Path) -> None:
    path = program(tmp_path, f"echo $$ > {tmp_path}/pid\nexec sleep 600")
    hook = MemoryHook(told.put)
    hook.run([path], 600, "host", "{}")
    assert becomes_true(
        lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != ""
    )
    hook.run(["/bin/true"], 10, "group", "{}")
    hook.close()
    assert told.get_nowait() == f"{path} ended with -9", "it has been waited for"
    assert not runs(int((tmp_path / "pid").read_text()))
    assert not hook_threads()
    hook.run(["/bin/true"], 10, "host", "{}")
    hook.close()
    assert not hook_threads()
    assert told.empty(), "what waited, and what came later, was not run"


def test_the_end_does_not_wait_for_what_hangs() -> None:
    """As where the kernel does not let go of a program: the thread is at its work for good."""
    at_work, may_end = threading.Event(), threading.Event()

    def hangs(_: str) -> None:
        at_work.set()
        may_end.wait()

    hook = MemoryHook(hangs)
    hook.run(["/bin/true"], 10, "host", "{}")
    assert at_work.wait(END_S)
    hook.close()
    assert hook_threads()
    may_end.set()
    assert becomes_true(lambda: not hook_threads())


def hook_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vmdedup-hook"]


def runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
