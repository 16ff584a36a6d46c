"""What remains of each test: figures in its result, artefacts, a summary, annotations.

Owns the names of the figures and of the artefacts. The figures are `user_properties` of the
test's result: so a worker of pytest-xdist hands them on, and JUnit files have them. Promises
that an artefact that cannot be written fails no test: the summary says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmdedup.models import SharingReport

_PREFIX = "vmdedup_"
_TOLD = "vmdedup: "
"""Beginning of every failure that this plugin raises."""
_LONGEST_NAME = 120


def note(item: pytest.Item, report: SharingReport, broken_pages: int | None) -> None:
    """Add the figures to the test's result, and write its artefacts."""
    from vmdedup.report.baseline import Saved

    saved, host = Saved.of(report.vms), report.host
    figures: dict[str, float | str | None] = {
        "saved_bytes": saved.saved_bytes,
        "present_bytes": saved.present_bytes,
        "gates": host.gate_ms.count,
        "gate_max_ms": host.gate_ms.max,
        "stops": sum(vm.stops or 0 for vm in report.vms),
        "broken_pages": broken_pages,
    }
    if (folder := _folder(item.config)) is not None:
        figures["artefact_problem"] = _write(folder, item.nodeid, report)
    item.user_properties += [
        (f"{_PREFIX}{name}", value) for name, value in figures.items() if value is not None
    ]


def _folder(config: pytest.Config) -> Path | None:
    if option := config.getoption("--vmdedup-artefacts"):
        return Path(config.invocation_params.dir, option)
    if given := config.getini("vmdedup_artefacts"):
        return Path(config.rootpath, given)
    return None


def _write(folder: Path, test: str, report: SharingReport) -> str | None:
    """Write the report as JSON and HTML; returns why that failed."""
    from vmdedup.errors import UsageError
    from vmdedup.report.files import as_text, write_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for form in ("json", "html"):
            write_file(folder / f"{artefact_name(test)}.{form}", as_text(report, form))
    except (OSError, UsageError) as error:
        return str(error)
    return None


def artefact_name(test: str) -> str:
    """A file name for a test's id: readable, and another one for each test."""
    words = re.sub(r"[^\w.-]+", "-", test).strip("-")[-_LONGEST_NAME:].lstrip("-.")
    return f"{words}-{blake2b(test.encode(), digest_size=4).hexdigest()}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A row for each test that merged, where the artefacts are, and annotations for GitHub."""
    reports = [
        report
        for found in terminalreporter.stats.values()
        for report in found
        if isinstance(report, pytest.TestReport)
    ]
    figures = {
        report.nodeid: found
        for report in sorted(reports, key=lambda report: report.nodeid)
        if report.when == "call" and (found := _figures(report))
    }
    if figures:
        terminalreporter.section("vmdedup")
        for line in _rows(figures):
            terminalreporter.write_line(line)
        problems = {
            str(each["artefact_problem"]) for each in figures.values() if "artefact_problem" in each
        }
        for problem in sorted(problems):
            terminalreporter.write_line(f"artefacts are missing: {problem}", yellow=True)
        if (folder := _folder(config)) is not None and not problems:
            terminalreporter.write_line(f"artefacts: {folder}")
    for line in _annotations(reports, config):
        terminalreporter.write_line(line)


def _figures(report: pytest.TestReport) -> dict[str, Any]:
    return {
        name.removeprefix(_PREFIX): value
        for name, value in report.user_properties
        if name.startswith(_PREFIX)
    }


def _rows(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table, each column as wide as it needs."""
    from vmdedup.report.words import count, milliseconds, share, size

    cells = [["saved", "of held", "gates", "longest", "pauses", "broken", "test"]]
    for test, each in figures.items():
        saved, held = each["saved_bytes"], each["present_bytes"]
        cells.append(
            [
                size(saved),
                share(saved, held),
                count(each["gates"]),
                milliseconds(each.get("gate_max_ms")),
                count(each["stops"]),
                count(each.get("broken_pages")),
                test,
            ]
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    return [
        "  ".join([*(cell.rjust(wide) for cell, wide in zip(row, widths, strict=False)), row[-1]])
        for row in cells
    ]


def _annotations(reports: list[pytest.TestReport], config: pytest.Config) -> list[str]:
    """A workflow command for each test that failed for a rule, or for merging."""
    from vmdedup.report.github import error_line, is_wanted

    if not is_wanted(os.environ):
        return []
    lines = []
    for report in reports:
        # Under pytest-xdist the worker's name stands in the first line.
        told = [line for line in report.longreprtext.splitlines() if line.startswith(_TOLD)]
        if report.failed and told:
            file, line, _ = report.location
            lines.append(
                error_line(
                    told[-1].removeprefix(_TOLD),
                    f"{_TOLD}{report.nodeid}",
                    file=_in_workspace(config.rootpath / file),
                    line=None if line is None else line + 1,
                )
            )
    return lines


def _in_workspace(path: Path) -> str:
    """The path as GitHub shows it: relative to the checkout."""
    workspace = os.environ.get("GITHUB_WORKSPACE")
    if workspace and path.is_relative_to(workspace):
        return str(path.relative_to(workspace))
    return str(path)
