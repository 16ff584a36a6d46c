"""The coverage table: counts are added up by package."""

from __future__ import annotations

import pytest

from tests.branch_coverage import table

pytestmark = pytest.mark.unit


def summary(statements: int, missed: int, branches: int, missed_branches: int) -> dict[str, int]:
    return {
        "num_statements": statements,
        "missing_lines": missed,
        "num_branches": branches,
        "missing_branches": missed_branches,
    }


def test_a_line_a_package_and_one_for_all() -> None:
    report = {
        "files": {
            "vmdedup/remap/gate.py": {"summary": summary(60, 10, 20, 5)},
            "vmdedup/remap/live.py": {"summary": summary(15, 0, 5, 0)},
            "vmdedup/attach/libvirt/__init__.py": {"summary": summary(0, 0, 0, 0)},
        },
        "totals": summary(75, 10, 25, 5),
    }
    assert [line.split() for line in table(report)] == [
        ["package", "statements", "missed", "branches", "missed", "covered"],
        ["vmdedup.attach.libvirt", "0", "0", "0", "0", "100.0%"],
        ["vmdedup.remap", "75", "10", "25", "5", "85.0%"],
        ["all", "75", "10", "25", "5", "85.0%"],
    ]
