"""Rules for a report: which hold, what is said of those that do not, and GitHub's lines."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_report import sharing, vm_report
from vmdedup.errors import UsageError
from vmdedup.models import CheckedRule, Durations, SharingReport
from vmdedup.pytest_plugin.summary import artefact_name
from vmdedup.report.expectations import broken_pages, expectations, judge
from vmdedup.report.github import error_line

pytestmark = pytest.mark.unit


def report(
    *, stops: int = 0, gate_max_ms: float | None = 4.0, merging: bool = True
) -> SharingReport:
    """Two VMs of which 40% is saved; `merging`: the report of an engine that merges."""
    vms = [
        vm_report(name, "merged", None).model_copy(
            update={
                "pid": pid,
                "present_bytes": 1000,
                "saved_bytes": 400,
                "stops": stops if merging else None,
                "cow_breaks": 10 if merging else None,
                "cow_broken_pages": 5,
            }
        )
        for pid, name in enumerate(("web", "db"), 7)
    ]
    given = sharing(vms)
    host = given.host.model_copy(
        update={
            "stopped_ms": 2.5 * stops if merging else None,
            "gate_ms": Durations(count=1, max=gate_max_ms) if gate_max_ms else Durations(),
        }
    )
    return given.model_copy(update={"host": host})


def later(then: SharingReport, **changed: int) -> SharingReport:
    """The same with fields of the first VM changed."""
    first, *rest = then.vms
    return then.model_copy(update={"vms": [first.model_copy(update=changed), *rest]})


def checked(given: SharingReport, before: SharingReport | None = None, **rules: Any) -> CheckedRule:
    judgement = judge(expectations(rules), given, before)
    (rule,) = judgement.rules
    assert judgement.ok == rule.holds
    return rule


@pytest.mark.parametrize(
    ("rules", "holds", "said"),
    [
        ({"min_saved": "40%"}, True, "40.0% saved (800 B of 2.0 KiB), within 40%"),
        ({"min_saved": "40.1%"}, False, "40.0% saved (800 B of 2.0 KiB), below 40.1%"),
        ({"max_gate_ms": 4}, True, "the longest gate took 4.00 ms, within 4"),
        ({"max_gate_ms": 3.5}, False, "the longest gate took 4.00 ms, above 3.5"),
        ({"max_stops": 4}, True, "4 pauses (web 2, db 2), within 4"),
        ({"max_stops": 3}, False, "4 pauses (web 2, db 2), above 3"),
    ],
)
def test_each_rule_at_its_limit(rules: dict[str, Any], holds: bool, said: str) -> None:
    rule = checked(report(stops=2), **rules)
    assert (rule.holds, rule.message) == (holds, said)


def test_no_gate_is_within_every_limit() -> None:
    assert checked(report(gate_max_ms=None), max_gate_ms=0).holds


@pytest.mark.parametrize("rule", ["max_gate_ms", "max_stops"])
def test_what_nobody_counted_does_not_hold(rule: str) -> None:
    limit: dict[str, Any] = {rule: 1000}
    found = checked(report(merging=False, gate_max_ms=None), **limit)
    assert (found.holds, found.found) == (False, None)
    assert "ask the daemon" in found.message


def test_nothing_held_is_not_a_saving() -> None:
    rule = checked(report().model_copy(update={"vms": []}), min_saved="0%")
    assert (rule.holds, rule.found) == (False, None)


def test_broken_pages_are_writes_since_the_earlier_report() -> None:
    before = report()
    now = later(before, cow_breaks=13, cow_broken_pages=0)
    assert checked(now, before, max_broken_pages=3).holds
    rule = checked(now, before, max_broken_pages=2)
    assert rule.message == "3 writes to merged pages (web 3), above 2"
    with pytest.raises(UsageError, match="none is given"):
        judge(expectations({"max_broken_pages": 2}), now)


def test_without_an_engine_broken_pages_are_those_of_the_page_tables() -> None:
    before = report(merging=False)
    assert broken_pages(before, later(before, cow_broken_pages=9)) == {"web": 4, "db": 0}
    assert broken_pages(before, later(before, cow_broken_pages=1)) == {"web": 0, "db": 0}


def test_a_vm_that_is_another_process_now_is_left_out() -> None:
    before = report()
    assert broken_pages(before, later(before, pid=99, cow_breaks=99)) == {"db": 0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"min_saved": 0.3}, "min_saved=0.3: write a percentage, for instance 30%"),
        ({"min_saved": "half"}, "min_saved=half: write a percentage"),
        ({"min_saved": "130%"}, "min_saved=130: "),
        ({"max_stops": -1}, "max_stops=-1: "),
        ({"max_gate_ms": float("nan")}, "max_gate_ms=nan: "),
        ({"min_save": "3%"}, r"min_save: no such rule \(there are: min_saved, "),
    ],
)
def test_limits_that_make_no_sense_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        expectations(given)


def test_an_annotation_is_one_line_that_nothing_ends_early() -> None:
    line = error_line("50% of\r\nall", "a: b, c", file="x,y.py", line=3)
    assert line == "::error file=x%2Cy.py,line=3,title=a%3A b%2C c::50%25 of%0D%0Aall"


def test_artefacts_of_different_tests_have_different_names() -> None:
    names = {artefact_name(test) for test in ("t.py::a[x-y]", "t.py::a[x y]", "t.py::" + "a" * 300)}
    assert len(names) == 3
    assert all("/" not in name and len(name) < 140 for name in names)
