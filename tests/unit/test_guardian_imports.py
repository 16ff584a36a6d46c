"""The guardian starts without installed packages: it must resume VMs whatever else is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vmdedup

pytestmark = pytest.mark.unit

_MODULES = ("process", "resume", "runtime_dir")
"""Modules of `vmdedup.guardian` that run in its process."""


def test_it_imports_the_standard_library_alone() -> None:
    root = Path(vmdedup.__file__).parent.parent
    imports = "".join(f"import vmdedup.guardian.{name}\n" for name in _MODULES)
    code = f"import sys\nsys.path.insert(0, {str(root)!r})\n{imports}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
