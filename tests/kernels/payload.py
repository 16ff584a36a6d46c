"""What the process tests need in a host: the tests, a pytest, and the victims they look at.

Owns the copy of pytest of the Python that runs this, which is pure Python and so runs on the
host's Python too: the host's image knows nothing of tests.
"""

from __future__ import annotations

import shutil
from importlib.metadata import distribution
from pathlib import Path

from tests.harness.images import REPOSITORY
from tests.process.victims import build

_PURE = ("pytest", "pluggy", "iniconfig", "packaging", "pytest-timeout")
_FOLDER = "process"

RUN = (
    "cd /payload/process && PYTHONPATH=/payload/process/site PYTHONDONTWRITEBYTECODE=1"
    " VMDEDUP_VICTIMS=/payload/process/victims"
    " python3 -m pytest -q -p no:cacheprovider --basetemp=/run/pytest"
)
"""Begins a command that runs tests in the host."""


def add_process_tests(content: Path) -> None:
    """Put them into the folder of a payload."""
    folder = content / _FOLDER
    (folder / "victims").mkdir(parents=True)
    build(folder / "victims")
    shutil.copytree(
        REPOSITORY / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy2(REPOSITORY / "pyproject.toml", folder)
    for name in _PURE:
        found = distribution(name)
        for file in found.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                target = folder / "site" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(found.locate_file(file)), target)
