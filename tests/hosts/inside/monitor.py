"""`monitor.py SOCKET COMMAND`: what QEMU returns to a QMP command, as JSON."""

from __future__ import annotations

import json
import socket
import sys

_LIMIT_S = 120


def main() -> None:
    path, command = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(_LIMIT_S)
        monitor.connect(path)
        lines = monitor.makefile("rw")
        for each in ("qmp_capabilities", command):
            print(json.dumps({"execute": each, "id": each}), file=lines, flush=True)
            while (answer := json.loads(lines.readline())).get("id") != each:
                pass
    print(json.dumps(answer["return"]))


main()
