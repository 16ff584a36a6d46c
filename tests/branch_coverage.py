"""Which statements and branches of the package the tests run, in every process that they start.

Owns the measurement while tests run, and the table by package at its end. Engine, API
server and verbs measure themselves: coverage.py starts in each Python that sees its
environment, and [tool.coverage] in pyproject.toml says what. Promises to go on when a
process is killed: it writes nothing, or a file that is left out and counted. Leaves out
the guardian process, which starts without site-packages to stay small. Statements that a
comment `# uncovered: REASON` names are not counted as missed, but told in a column.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, cast

from coverage import Coverage

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Counts:
    """How many statements and branches there are, and how many of them no test ran.

    `named_statements`: those that are left out of all other counts, with a reason beside them.
    """

    statements: int = 0
    missed_statements: int = 0
    named_statements: int = 0
    branches: int = 0
    missed_branches: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.statements + other.statements,
            self.missed_statements + other.missed_statements,
            self.named_statements + other.named_statements,
            self.branches + other.branches,
            self.missed_branches + other.missed_branches,
        )

    @property
    def covered_percent(self) -> float:
        """The share of statements and branches together that ran; 100 where there are none."""
        total = self.statements + self.branches
        missed = self.missed_statements + self.missed_branches
        return 100 * (total - missed) / total if total else 100.0


@contextmanager
def measured() -> Iterator[None]:
    """Measure this process and those that it starts; print the table when they have ended."""
    own = _coverage()
    data = Path(own.config.data_file).absolute()
    shutil.rmtree(data.parent, ignore_errors=True)
    data.parent.mkdir()
    own.start()
    try:
        yield
    finally:
        own.stop()
        own.save()
        _report(data.with_name("report.json"))


def _coverage() -> Coverage:
    return Coverage(config_file=str(_ROOT / "pyproject.toml"))


def _report(file: Path) -> None:
    """Join what all processes wrote, for `coverage report` too, and print the table of it."""
    joined = _coverage()
    with warnings.catch_warnings(record=True) as unreadable:
        warnings.simplefilter("always")
        joined.combine()
    joined.json_report(outfile=str(file))
    report = json.loads(file.read_text())
    print("", *table(report, named(report["files"])), sep="\n")
    print(f"processes killed while they wrote what they had run: {len(unreadable)}", flush=True)


def named(files: Iterable[str]) -> dict[str, int]:
    """How many statements of each file are left out by our own rule, not by coverage.py's."""
    own = _coverage()
    own.clear_exclude()
    for rule in cast(list[str], own.get_option("report:exclude_also")):
        own.exclude(rule)
    return {file: len(own.analysis2(file)[2]) for file in files}


def table(report: Mapping[str, Any], named: Mapping[str, int]) -> Iterator[str]:
    """The lines of a table, one a package and one for all, of coverage.py's JSON report.

    `named`: how many statements of each file are named as uncovered.
    """
    packages: dict[str, Counts] = {}
    for file, found in report["files"].items():
        package = ".".join(PurePath(file).parent.parts)
        packages[package] = packages.get(package, Counts()) + _counts(found["summary"], named[file])
    width = max(map(len, ["package", *packages]))
    yield f"{'package':{width}} statements missed  named branches missed covered"
    total = _counts(report["totals"], sum(named.values()))
    for name, counts in [*sorted(packages.items()), ("all", total)]:
        yield (
            f"{name:{width}} {counts.statements:10} {counts.missed_statements:6}"
            f" {counts.named_statements:6} {counts.branches:8} {counts.missed_branches:6}"
            f" {counts.covered_percent:6.1f}%"
        )


def _counts(summary: Mapping[str, int], named_statements: int) -> Counts:
    return Counts(
        summary["num_statements"],
        summary["missing_lines"],
        named_statements,
        summary["num_branches"],
        summary["missing_branches"],
    )
