"""A few words to a VM's second monitor, from the test itself."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Execute = Callable[..., Any]


@contextmanager
def connected(path: Path) -> Iterator[Execute]:
    """A connection for the block; yields `execute(command, **arguments)`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        with connection.makefile("rw") as stream:

            def execute(command: str, **arguments: Any) -> Any:
                question = {"execute": command, "arguments": arguments, "id": command}
                stream.write(json.dumps(question) + "\n")
                stream.flush()
                while "id" not in (answer := json.loads(stream.readline())):
                    pass  # events
                return answer["return"]

            stream.readline()
            execute("qmp_capabilities")
            yield execute


def qmp(path: Path, command: str, /, **arguments: Any) -> Any:
    """Connect, execute one QMP command, disconnect; what it returned."""
    with connected(path) as execute:
        return execute(command, **arguments)
