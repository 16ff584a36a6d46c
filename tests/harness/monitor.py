"""A few words to a VM's second monitor, from the test itself."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.harness.serial import GuestError

Execute = Callable[..., Any]


@contextmanager
def connected(path: Path, *, timeout_s: float = 10) -> Iterator[Execute]:
    """A connection for the block; yields `execute(command, **arguments)`.

    GuestError if QEMU ends meanwhile, TimeoutError if it does not answer for `timeout_s`.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        with connection.makefile("rw") as stream:

            def execute(command: str, **arguments: Any) -> Any:
                question = {"execute": command, "arguments": arguments, "id": command}
                stream.write(json.dumps(question) + "\n")
                stream.flush()
                for line in stream:
                    answer = json.loads(line)
                    if "id" in answer:  # the others are events
                        return answer["return"]
                raise GuestError(f"{path}: QEMU ended before it answered {command}")

            stream.readline()
            execute("qmp_capabilities")
            yield execute


def qmp(path: Path, command: str, /, **arguments: Any) -> Any:
    """Connect, execute one QMP command, disconnect; what it returned."""
    with connected(path) as execute:
        return execute(command, **arguments)
