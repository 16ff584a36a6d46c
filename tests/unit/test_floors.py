"""The layout is a building: each package imports only from floors below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from functools import cache

import pytest

from tests.harness.images import REPOSITORY

pytestmark = pytest.mark.unit

FLOORS = (
    ("errors", "units", "models", "faults", "closing"),
    ("core", "controls", "history", "ipc", "ssh", "tls"),
    ("settings", "linux", "client"),
    ("inject", "attach", "store", "guardian", "known"),
    ("guest", "policy"),
    ("vm",),
    ("remap", "accounting"),
    ("engine",),
    ("deduplicator", "daemon", "report"),
    ("api", "doctor", "top", "hosts"),
    ("cli",),
    ("pytest_plugin",),
)
"""From the ground up. `vmdedup` itself hands out names of all, when they are asked for."""


@cache
def modules() -> Mapping[str, ast.Module]:
    """Every module by its dotted name; parsing them takes a second."""
    trees = {}
    for path in sorted((REPOSITORY / "vmdedup").rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text())
    return trees


@cache
def imports_of_modules() -> Mapping[str, frozenset[str]]:
    """The modules that each module imports, by dotted names."""
    trees = modules()
    return {name: frozenset(imports(tree, trees.keys())) for name, tree in trees.items()}


def imports(tree: ast.Module, known: Set[str]) -> Iterator[str]:
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
    found = {package_of(name) for name in imports_of_modules()} - {"vmdedup"}
    standing = [package for floor in FLOORS for package in floor]
    assert sorted(standing) == sorted(found)


def test_no_import_runs_up_or_along_a_floor() -> None:
    floor = {package: number for number, floor in enumerate(FLOORS) for package in floor}
    wrong = [
        f"{name} imports {other}"
        for name, others in imports_of_modules().items()
        for other in sorted(others)
        if other.startswith("vmdedup.")
        and name != "vmdedup"
        and package_of(other) != package_of(name)
        and floor[package_of(other)] >= floor[package_of(name)]
    ]
    assert not wrong


def test_modules_import_one_another_in_no_circle() -> None:
    known = imports_of_modules()
    arrows = {
        name: (others & known.keys()) - {name, "vmdedup"}
        for name, others in known.items()
        if name != "vmdedup"
    }
    while ends := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in ends:
            del arrows[name]
    assert not arrows, f"circles among {sorted(arrows)}"


def test_a_class_name_stands_for_one_class() -> None:
    found: dict[str, list[str]] = {}
    for name, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    assert not {name: where for name, where in found.items() if len(where) > 1}
