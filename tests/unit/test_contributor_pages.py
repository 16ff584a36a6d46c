"""The pages for contributors name files, functions and packages that exist.

A path in code stands relative to the repository, to the package, or to the page's own
folder; `remap/merge.py:VmMerger.merge` names a function or class in that file as well.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.harness.pages import ROOT, Page, page
from tests.unit.test_floors import FLOORS

pytestmark = pytest.mark.unit

ARCHITECTURE, TESTS = "docs/architecture.md", "tests/README.md"
RECORDS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/decisions/[0-9]*.md"))
PAGES = [ARCHITECTURE, "CONTRIBUTING.md", TESTS, *RECORDS]
PATH = re.compile(
    r"(?<![\w/.~*{}-])"  # not in the middle of another path
    r"((?:[\w*.-]+/)*[\w*.-]+(?:\.(?:c|env|ini|json|md|pml|py|S|sh|toml)\b|/(?![\w*.])))"
    r"(?::([A-Za-z_][\w.]*))?"
)
TOP = re.compile(r"(?<![\w/.*-])((?:\.ci|configs|docs|images|tests|vmdedup)/[\w/-]*\w)(?![\w./*])")
"""A file or folder without an ending, below one of the top folders."""
MADE_HERE = (".venv/", ".cache/", ".tox/")
"""What a checkout has only after a set-up."""


def named(each: Page) -> list[tuple[str, str]]:
    """Every path in the page's code, and what of it is named ("" for all of it)."""
    return [
        (path, name)
        for text in each.code
        for path, name in [*PATH.findall(text), *((path, "") for path in TOP.findall(text))]
        if not path.startswith(MADE_HERE)
    ]


def places(path: str, each: Page) -> list[Path]:
    """The files or folders that a path, which may be a pattern, stands for."""
    folders = (ROOT, ROOT / "vmdedup", each.path.parent)
    return [found for folder in folders for found in folder.glob(path.rstrip("/"))]


def defines(file: Path, name: str) -> bool:
    """Whether a module has that function or class; `Class.method` is one of the class."""
    inside: list[ast.stmt] = ast.parse(file.read_text()).body
    for part in name.split("."):
        found = [
            node
            for node in inside
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name == part
        ]
        if not found:
            return any(_assigns(node, part) for node in inside)
        inside = found[0].body
    return True


def _assigns(node: ast.stmt, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def missing(each: Page) -> list[str]:
    """What a page names and does not exist."""
    return [
        f"{path}:{name}" if name else path
        for path, name in named(each)
        if not any(not name or defines(file, name) for file in places(path, each))
    ]


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name: str) -> None:
    assert named(page(name))
    assert missing(page(name)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "core/nowhere.py",
        "nowhere/",
        "tests/unit/test_n*w.py",
        "tests/nowhere",
        "units.py:none",
        "units.py:pages.none",
    ],
)
def test_what_does_not_exist_is_noticed(wrong: str, tmp_path: Path) -> None:
    """The check itself."""
    file = tmp_path / "page.md"
    file.write_text(f"`core/scan.py`, `units.py:pages`, `{wrong}`\n")
    assert missing(page(file)) == [wrong]


def test_the_floors_are_those_of_the_test() -> None:
    rows = [row for row in page(ARCHITECTURE).rows if row[0].isdecimal()]
    told = [tuple(re.findall(r"`(\w+)`", row[1])) for row in rows]
    assert told == list(FLOORS)


def test_threads_are_named_where_the_page_says() -> None:
    rows = [row for row in page(ARCHITECTURE).rows if row[0].startswith("`vmdedup-")]
    assert rows
    for row in rows:
        text = (ROOT / "vmdedup" / row[1].strip("`")).read_text()
        assert [name for name in re.findall("`(.+?)`", row[0]) if f'"{name}"' not in text] == []


def test_every_package_has_its_tests_named() -> None:
    packages = {package for floor in FLOORS for package in floor}
    assert packages <= page(TESTS).named()


def test_every_suite_is_told_of() -> None:
    suites = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert suites - {"harness"} <= page(TESTS).named()


def test_the_readme_leads_to_the_pages_of_the_top_folder() -> None:
    linked = {(ROOT / link).resolve() for link in page("README.md").links}
    assert set(ROOT.glob("*.md")) - {ROOT / "README.md"} <= linked


def test_the_list_of_records_is_whole() -> None:
    index = page("docs/decisions/README.md")
    linked = {str((index.path.parent / link).relative_to(ROOT)) for link in index.links}
    assert set(RECORDS) == linked
