#!/usr/bin/python3
"""vmdedup, which a test has halt or die at a fault point, once. Runs in the host.

The file `trap` in the runtime directory names the step and what to do there: `wait` until
the test removes `trapped`, or `kill` the guardian and then this process.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from vmdedup import faults
from vmdedup.cli.main import main

_FOLDER = Path("/run/vmdedup")
_LONGEST_WAIT_S = 300


def _hook(step: str) -> None:
    try:
        wanted, action = (_FOLDER / "trap").read_text().split()
        if step != wanted:
            return
        (_FOLDER / "trap").unlink()
    except FileNotFoundError:
        return
    trapped = _FOLDER / "trapped"
    trapped.write_text(step)
    if action == "wait":
        deadline = time.monotonic() + _LONGEST_WAIT_S
        while trapped.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"vmdedup.guardian.process" in file.read_bytes():
                os.kill(int(file.parent.name), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    faults.hook = _hook
    main()
