"""Another vmdedup that holds what this one wants: its identity, and the user's options.

Owns the words of every refusal of that kind, so that those for a runtime directory, a
store and a VM read the same. Only reads /proc. Promises one line; facts about the other
engine that cannot be read are left out. Small: the guardian imports it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from vmdedup.linux.flock import command_of

LOCK_NAME = "engine.lock"
"""Name of the file in a runtime directory that its engine holds."""
_DEFAULT_RUNTIME_DIR = Path("/run/vmdedup")
_API_SOCKET = "vmdedup.sock"
_MOST_COMMAND_CHARACTERS = 80


def held_by(pid: int | None, what: str) -> str:
    """One line: the other engine does `what` ("works with …"), and the remedy."""
    if pid is None:
        return f"another vmdedup, of another container, {what}: end it, or wait for it"
    if pid == os.getpid():
        return f"this process {what} already: close that Deduplicator first"
    runtime_dir = _runtime_dir(pid)
    facts = [f"pid {pid}", *filter(None, [_command(pid)])]
    if runtime_dir is not None:
        facts.append(f"runtime directory {runtime_dir}")
    return f"another vmdedup ({', '.join(facts)}) {what}: {_advice(runtime_dir)}"


def _advice(runtime_dir: Path | None) -> str:
    if runtime_dir is None or not (runtime_dir / _API_SOCKET).exists():
        return "wait for it, or end it"
    option = "" if runtime_dir == _DEFAULT_RUNTIME_DIR else f" --runtime-dir {runtime_dir}"
    return f"it is the daemon, ask it (`vmdedup merge{option}`) or end it"


def _command(pid: int) -> str:
    """Its command line without the interpreter, in backquotes; "" when it cannot be read."""
    words = command_of(pid).split()
    if len(words) > 1 and Path(words[0]).name.startswith("python"):
        del words[0]
    if words:
        words[0] = Path(words[0]).name
    text = "".join(c for c in " ".join(words) if c.isprintable())
    if len(text) > _MOST_COMMAND_CHARACTERS:
        text = f"{text[: _MOST_COMMAND_CHARACTERS - 1]}…"
    return f"`{text}`" if text else ""


def _runtime_dir(pid: int) -> Path | None:
    """The runtime directory that the other engine holds, by its descriptor on the lock there."""
    folder = Path(f"/proc/{pid}/fd")
    with suppress(OSError):
        for name in os.listdir(folder):
            link = os.readlink(folder / name)
            if link.endswith(f"/{LOCK_NAME}"):
                return Path(link).parent
    return None
