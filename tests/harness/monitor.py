"""A few words to a VM's second monitor, from the test itself."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any


def qmp(path: Path, command: str, **arguments: Any) -> Any:
    """Connect, execute one QMP command, disconnect; what it returned."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        stream = connection.makefile("rw")
        stream.readline()
        for execute, given in (("qmp_capabilities", {}), (command, arguments)):
            stream.write(json.dumps({"execute": execute, "arguments": given, "id": execute}) + "\n")
            stream.flush()
            while "id" not in (answer := json.loads(stream.readline())):
                pass  # events
        return answer["return"]
