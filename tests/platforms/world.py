"""A pid and mount namespace in which a program finds only what it has started itself.

A daemon that is told of no socket takes all QEMUs of its host; here these are the tests' own.
/run and /dev/shm are empty, so that QEMUs lie where the platforms have them. When the program
ends, however that happens, the kernel ends everything in it, and its files are removed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache

from tests.harness.capabilities import root_missing
from tests.harness.images import REPOSITORY

_UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--mount"]
_UNSHARE += ["--propagation", "private"]
_OWN_FOLDERS = """
mount -t tmpfs -o mode=755 none /run && mount -t tmpfs -o mode=1777 none /dev/shm && exec "$@"
"""


def _inside(*program: str) -> list[str]:
    return [*_UNSHARE, "sh", "-c", _OWN_FOLDERS, "sh", *program]


@cache
def world_missing() -> str | None:
    """Why there can be no such world here, None where there can."""
    if reason := root_missing():
        return reason
    tried = subprocess.run(_inside("true"), capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()}"


def run_inside(module: str, *arguments: str, silent: bool = True) -> tuple[int, str, str]:
    """Run a Python module of the repository there: exit code, stdout and stderr.

    What it says on stderr goes to ours unless `silent`.
    """
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        os.chmod(folder, 0o711)  # QEMUs of other users look into it
        path = os.pathsep.join([str(REPOSITORY), *sys.path])
        done = subprocess.run(
            ["setpriv", "--pdeathsig", "KILL", *_inside(sys.executable, "-m", module, *arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if silent else None,
            text=True,
            check=False,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": folder},
        )
    return done.returncode, done.stdout, done.stderr or ""
