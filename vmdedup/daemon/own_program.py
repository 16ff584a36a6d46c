"""The command that runs a program of ours: the API server, the counting of contents.

Owns it. Promises that the program is of the same installation, and that neither the working
directory nor the environment of Python decides what it imports.
"""

from __future__ import annotations

import sys
from pathlib import Path

_BOOT = """
import sys
sys.path.append(sys.argv.pop(1))
from {module} import main
main()
"""


def command_of(module: str) -> list[str]:
    """The words that run `main` of a module of ours; its own options follow."""
    package_parent = str(Path(__file__).parents[2])
    return [sys.executable, "-I", "-c", _BOOT.format(module=module), package_parent]
