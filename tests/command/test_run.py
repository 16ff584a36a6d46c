"""`python -m tests.run`: each second try is named at the end, with how it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.pages import ROOT

pytestmark = pytest.mark.command

_SUITE = """
from pathlib import Path

def test_good():
    pass

def test_disturbed():
    mark = Path("was-here")
    tried_before = mark.exists()
    mark.touch()
    assert tried_before

def test_bad():
    assert False
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """All tests in `folder`, as the project's own are run; never measured."""
    environment = {key: it for key, it in os.environ.items() if "COVERAGE" not in key}
    return subprocess.run(
        [sys.executable, "-m", "tests.run", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_second_tries_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(_SUITE)
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    first, *rest = done.stdout.splitlines()[-3:]
    assert first == "second tries: 2, failed again: 1"
    assert sorted(rest) == [
        "  failed again: test_suite.py::test_bad",
        "  passed: test_suite.py::test_disturbed",
    ]


def test_a_second_try_that_passes_counts(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(_SUITE)
    done = run(tmp_path, "-k", "not bad")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2] == "second tries: 1, failed again: 0"


def test_none_is_said_too(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text("def test_good():\n    pass\n")
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "second tries: 0, failed again: 0"
