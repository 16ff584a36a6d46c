"""The coverage table: counts are added up by package; what is named as uncovered is told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.branch_coverage import named, table

pytestmark = pytest.mark.unit


def summary(statements: int, missed: int, branches: int, missed_branches: int) -> dict[str, int]:
    return {
        "num_statements": statements,
        "missing_lines": missed,
        "num_branches": branches,
        "missing_branches": missed_branches,
    }


def test_a_line_a_package_and_one_for_all() -> None:
    report: dict[str, Any] = {
        "files": {
            "vmdedup/remap/gate.py": {"summary": summary(60, 10, 20, 5)},
            "vmdedup/remap/live.py": {"summary": summary(15, 0, 5, 0)},
            "vmdedup/attach/libvirt/__init__.py": {"summary": summary(0, 0, 0, 0)},
        },
        "totals": summary(75, 10, 25, 5),
    }
    uncovered = dict.fromkeys(report["files"], 0) | {
        "vmdedup/remap/gate.py": 2,
        "vmdedup/remap/live.py": 1,
    }
    assert [line.split() for line in table(report, uncovered)] == [
        ["package", "statements", "missed", "named", "branches", "missed", "covered"],
        ["vmdedup.attach.libvirt", "0", "0", "0", "0", "0", "100.0%"],
        ["vmdedup.remap", "75", "10", "3", "25", "5", "85.0%"],
        ["all", "75", "10", "3", "25", "5", "85.0%"],
    ]


def test_a_comment_with_a_reason_names_a_statement_or_all_that_it_heads(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import Protocol\n"
        "class Shape(Protocol):\n"
        "    def area(self) -> int: ...\n"  # left out by coverage.py itself
        "def value(number: int) -> int:\n"
        "    if number < 0:\n"
        "        raise ValueError  # uncovered: no kernel of ours answers so\n"
        "    try:\n"
        "        return 1 // number\n"
        "    except ZeroDivisionError:  # uncovered: a race\n"
        "        number += 1\n"
        "        return number\n"
        "    return 3  # uncovered:\n"  # no reason, so not named
    )
    assert named([str(file)]) == {str(file): 4}
