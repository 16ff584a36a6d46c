"""The marker: rules for the merged VMs, checked before and after the test's own code.

Owns what `@pytest.mark.vmdedup(…)` means. The VMs of a marked test are merged, also if it
does not ask for the fixture. `min_saved`, `max_gate_ms` and `max_stops` are checked on the
report after merging, before the test's code runs; `max_broken_pages` counts while it runs.
Promises that a broken rule fails the test, not its set-up.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

from vmdedup.pytest_plugin.fixtures import MERGED, Merged, require
from vmdedup.pytest_plugin.summary import note

if TYPE_CHECKING:
    from vmdedup.report.expectations import Expectations

MARKER = (
    "vmdedup(min_saved=None, max_gate_ms=None, max_stops=None, max_broken_pages=None): merge"
    " the VMs of vmdedup_vms, and fail if a rule is broken"
)


_EXPECTED = pytest.StashKey["Expectations"]()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have the VMs of a marked test merged after all that it asks for by itself."""
    if (
        isinstance(item, pytest.Function)
        and item.get_closest_marker("vmdedup")
        and MERGED not in item.fixturenames
    ):
        item.fixturenames.append(MERGED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Read the test's markers: a wrong one fails it before any VM is merged."""
    if isinstance(item, pytest.Function) and MERGED in item.fixturenames:
        item.stash[_EXPECTED] = _expected(list(item.iter_markers("vmdedup")))


def _expected(marks: list[pytest.Mark]) -> Expectations:
    """The rules of all its markers; that closest to the test wins."""
    from vmdedup.errors import UsageError
    from vmdedup.report.expectations import expectations

    given: dict[str, object] = {}
    for mark in reversed(marks):
        if mark.args:
            pytest.fail('vmdedup: marker: write NAME=LIMIT, as min_saved="30%"', pytrace=False)
        given |= mark.kwargs
    try:
        return expectations(given)
    except UsageError as error:
        raise pytest.fail.Exception(f"vmdedup: marker: {error}", pytrace=False) from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Check the rules around the test's own code; note what was found."""
    expected = item.stash.get(_EXPECTED, None)
    if expected is None or not isinstance(item, pytest.Function):
        return (yield)
    from vmdedup.report.expectations import Expectations, broken_pages, judge

    merged = item.funcargs[MERGED]
    assert isinstance(merged, Merged)
    limit, broken = expected.max_broken_pages, None
    try:
        require(judge(expected.model_copy(update={"max_broken_pages": None}), merged.report))
        before = None if limit is None else merged.look()
        result = yield
        if before is not None:
            now = merged.look()
            broken = sum(broken_pages(before, now).values())
            require(judge(Expectations(max_broken_pages=limit), now, before))
        return result
    finally:
        note(item, merged.report, broken)
