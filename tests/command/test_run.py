"""`python -m tests.run`: second tries are named at the end, and what workers ran is not lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from coverage import Coverage

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
    assert False, "it is\\nbad"
"""


def unmeasured() -> dict[str, str]:
    """This process's environment, without what has coverage.py measure a Python."""
    return {key: it for key, it in os.environ.items() if "COVERAGE" not in key}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """All tests in `folder`, as the project's own are run; never measured."""
    return subprocess.run(
        [sys.executable, "-m", "tests.run", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=unmeasured() | {"PYTHONPATH": str(ROOT)},
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
        "  failed again: test_suite.py::test_bad: AssertionError: it is",
        "  passed: test_suite.py::test_disturbed: assert False",
    ]


def test_a_second_try_that_passes_counts(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(_SUITE)
    done = run(tmp_path, "-k", "not bad")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2] == "second tries: 1, failed again: 0"


def test_what_gets_no_second_try_is_named_too(tmp_path: Path) -> None:
    chaos = tmp_path / "chaos"
    chaos.mkdir()
    (chaos / "test_suite.py").write_text("def test_bad():\n    assert False\n")
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "second tries: 0, failed again: 0",
        "  failed: chaos/test_suite.py::test_bad: assert False",
    ]


def test_none_is_said_too(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text("def test_good():\n    pass\n")
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "second tries: 0, failed again: 0"


def test_a_worker_that_is_killed_as_it_exits_has_written_what_it_ran(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("def ran() -> int:\n    return 1\n")
    (tmp_path / "test_it.py").write_text(
        "import atexit, os\n"
        "def test_it():\n"
        "    from module import ran\n"
        "    atexit.register(os._exit, 0)  # before coverage.py's own, as the last comes first\n"
        "    assert ran() == 1\n"
    )
    settings = tmp_path / "coveragerc"
    settings.write_text(
        f"[run]\nparallel = true\npatch = subprocess\nsource = {tmp_path}\n"
        f"data_file = {tmp_path}/data\n"
    )
    pytest_in_it = [
        *(sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"),
        *("-n", "1", "-p", "tests.worker_coverage", "-p", "no:cacheprovider"),
        *("--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path / "test_it.py")),
    ]
    subprocess.run(pytest_in_it, cwd=ROOT, env=unmeasured(), check=True, timeout=60)
    found = Coverage(data_file=str(tmp_path / "data"), config_file=False)
    found.combine()
    assert found.get_data().lines(str(tmp_path / "module.py")) == [1, 2]
