"""Running spin over merge.pml: what it searched, and what it found."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("merge.pml")
WORLD = Path(__file__).with_name("world.pml")

_MOST_STEPS = 10_000
_MOST_MIB = 2048
_TIMEOUT_S = 240
_INCOMPLETE = ("Search not completed", "max search depth too small", "out of memory", "aborting")
"""What spin's search says when it has not looked at everything."""
_ERROR = re.compile(r"^pan:\d+: (assertion violated|invalid end state) (.*)$", re.MULTILINE)

READS, DISCARDS, WAITS, CYCLE = "wrong read", "discarded", "invalid end state", "cycle"
"""Kinds of errors: RIGHT or the assertion in `discard` failed; somebody waits; a run never ends."""


def spin_missing() -> str | None:
    """Why models cannot be checked here; None when they can."""
    for program, package in (("spin", "spin"), ("gcc", "gcc")):
        if shutil.which(program) is None:
            return f"no {program} on this machine: apt-get install {package}"
    return None


@dataclass(frozen=True)
class Verdict:
    """What a search has found; `steps` until the first error, 0 where there was none."""

    error: str | None
    steps: int
    states: int
    unreached: tuple[tuple[str, int, str], ...]
    """(process, line, statement) of `MODEL` that no order of steps reaches."""


def check(
    folder: Path, *defines: str, compiler: tuple[str, ...], shortest: bool = False
) -> Verdict:
    """Search all states of the model with these defines; `folder` is for what is made of it.

    `shortest`: breadth first, so that no error has a shorter way to it. Raises
    AssertionError when the search was not complete, or ended in another way.
    """
    _run(folder, "spin", *(f"-D{name}" for name in defines), "-a", str(MODEL))
    order = ["-DBFS"] if shortest else []
    _run(folder, "gcc", "-w", *compiler, *order, f"-DMEMLIM={_MOST_MIB}", "-o", "pan", "pan.c")
    cycles = ["-l"] if "-DNP" in compiler else []
    said = _run(folder, "./pan", f"-m{_MOST_STEPS}", "-w22", *cycles)
    return _verdict(said)


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout}"
    return done.stdout


def _verdict(said: str) -> Verdict:
    errors = re.search(r"errors: (\d+)", said)
    states = re.search(r"(\d+) states, stored", said)
    assert errors, said
    assert states, said
    found = _ERROR.search(said)
    if errors[1] == "0":
        assert "Full statespace search" in said, said
        assert not any(words in said for words in _INCOMPLETE), said
        assert found is None, said
        return Verdict(None, 0, int(states[1]), tuple(_unreached(said)))
    depth = re.search(r"\(at depth (\d+)\)", said)
    assert depth, said
    return Verdict(_kind(found), int(depth[1]), int(states[1]), ())


def _kind(found: re.Match[str] | None) -> str:
    if found is None:
        return CYCLE
    if found[1] == WAITS:
        return WAITS
    return READS if ".last" in found[2] else DISCARDS


def _unreached(said: str) -> list[tuple[str, int, str]]:
    process = ""
    found: list[tuple[str, int, str]] = []
    for line in said.splitlines():
        if (heading := re.match(r"unreached in (?:proctype )?(\w+)", line)) is not None:
            process = heading[1]
        statement = re.match(r'\t(\S+):(\d+), state \d+, "(.*)"', line)
        if statement is not None and statement[1].endswith(MODEL.name):
            found.append((process, int(statement[2]), statement[3]))
    return found
