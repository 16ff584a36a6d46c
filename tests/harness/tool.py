"""A tool that asks a VM over a QMP socket as Proxmox VE's do: connect, ask, leave, again and again.

Owns one thread. It gives up a command after `TOLERANCE_S`, as they do, and takes an answer
with another id than its command's for a failure (qemu-server: PVE/QMPClient.pm).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Self

TOLERANCE_S = 5.0


class Tool:
    """Asks `query-status` every `pause_s` while its context lasts."""

    def __init__(self, path: Path, *, pause_s: float = 0.05) -> None:
        self._path = path
        self._pause_s = pause_s
        self.answered = 0
        self.failures: list[str] = []
        self.longest_s = 0.0
        """The longest time from connecting to an answer."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tool", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2 * TOLERANCE_S)

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            began_at = time.monotonic()
            try:
                ask(self._path, f"{number}:1")
            except (OSError, ValueError) as error:
                waited_s = time.monotonic() - began_at
                self.failures.append(f"{type(error).__name__} after {waited_s:.2f} s: {error}")
            else:
                self.answered += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began_at)
            self._ended.wait(self._pause_s)


def ask(path: Path, name: str) -> str:
    """The VM's run state. Raises OSError (TimeoutError too), ValueError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TOLERANCE_S)
        connection.connect(str(path))
        stream = connection.makefile("rw")
        if "QMP" not in json.loads(stream.readline()):
            raise ValueError("no greeting")
        _execute(stream, "qmp_capabilities", f"{name}0")
        return str(_execute(stream, "query-status", name)["status"])


def _execute(stream, command: str, name: str) -> dict[str, object]:  # type: ignore[no-untyped-def]
    stream.write(json.dumps({"execute": command, "id": name}) + "\n")
    stream.flush()
    while True:
        line = stream.readline()
        if not line:
            raise ValueError("QEMU closed the connection")
        answer = json.loads(line)
        if "event" in answer:
            continue
        if answer.get("id") != name:
            raise ValueError(f"got wrong command id {answer.get('id')} (expected {name})")
        return dict(answer["return"])
