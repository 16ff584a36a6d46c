"""The layout is a building: each package imports only from floors below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.harness.images import REPOSITORY

pytestmark = pytest.mark.unit

FLOORS = (
    ("errors", "units", "models", "faults", "closing"),
    ("core", "settings", "history", "ipc"),
    ("linux", "client"),
    ("inject", "attach", "store", "guardian"),
    ("guest", "policy"),
    ("vm",),
    ("remap", "accounting"),
    ("engine",),
    ("deduplicator", "daemon", "report"),
    ("api", "doctor", "top", "bench"),
    ("cli",),
    ("pytest_plugin",),
)
"""From the ground up. `vmdedup` itself hands out names of all, when they are asked for."""


def modules() -> dict[str, ast.Module]:
    """Every module, by its dotted name."""
    trees = {}
    for path in sorted((REPOSITORY / "vmdedup").rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of ours that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_each_package_has_one_floor() -> None:
    found = {package_of(name) for name in modules()} - {"vmdedup"}
    standing = [package for floor in FLOORS for package in floor]
    assert sorted(standing) == sorted(found)


def test_no_import_runs_up_or_along_a_floor() -> None:
    trees = modules()
    floor = {package: number for number, floor in enumerate(FLOORS) for package in floor}
    wrong = [
        f"{name} imports {other}"
        for name, tree in trees.items()
        for other in imports(tree, set(trees))
        if other.startswith("vmdedup.")
        and name != "vmdedup"
        and package_of(other) != package_of(name)
        and floor[package_of(other)] >= floor[package_of(name)]
    ]
    assert not wrong


def test_modules_import_one_another_in_no_circle() -> None:
    trees = modules()
    arrows = {
        name: {other for other in imports(tree, set(trees)) if other in trees} - {name, "vmdedup"}
        for name, tree in trees.items()
        if name != "vmdedup"
    }
    while ends := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in ends:
            del arrows[name]
    assert not arrows, f"circles among {sorted(arrows)}"
