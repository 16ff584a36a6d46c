"""`python -m tests.kernels [SERIES…]`: tries each kernel, and writes what was found in the docs.

A series is `6.1`, for instance, or `newest` of what Debian's suites offer; without any it is
DEFAULT. Rows of other series in docs/kernels.md stay as they are. Exits with 1 where a test
has failed; its row then says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.harness.images import REPOSITORY
from tests.kernels.conftest import FOUND, SERIES
from tests.kernels.table import replace_row

DEFAULT = ("6.1", "6.12", "newest")
_DOCUMENT = REPOSITORY / "docs" / "kernels.md"


def _try(series: str) -> tuple[dict[str, str], int]:
    """What was found on this kernel, and pytest's exit code."""
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        found = Path(folder) / "found"
        os.environ |= {SERIES: series, FOUND: str(found)}
        command = ["-m", "pytest", "-n", "0", "-m", "kernels", "tests/kernels"]
        code = subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=False).returncode
        return json.loads(found.read_text()) if found.exists() else {}, code


def main() -> int:
    """Try all; the exit code."""
    codes = []
    for series in sys.argv[1:] or DEFAULT:
        facts, code = _try(series)
        codes.append(code)
        if "release" in facts:
            commit = subprocess.run(
                ["git", "describe", "--always", "--dirty"],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip()
            facts |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit}
            _DOCUMENT.write_text(replace_row(_DOCUMENT.read_text(), series, facts))
    return int(any(code not in (pytest.ExitCode.OK,) for code in codes))


if __name__ == "__main__":
    sys.exit(main())
