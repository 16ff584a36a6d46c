"""The controls: defaults, KSM's rules, refusals in one line, all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vmdedup.controls import (
    COUNTERS_OF_2009,
    ControlError,
    ControlFacts,
    Controls,
    ControlStateError,
    as_table,
    change,
    initial,
)
from vmdedup.errors import UsageError
from vmdedup.policy.invalidation import REDONE, Redo, redone_by

pytestmark = pytest.mark.unit

NOTHING_SHARED = ControlFacts(pages_shared=0)
SHARED = ControlFacts(pages_shared=3)
BY_HAND = Controls(advisor_mode="none")

KSM_DEFAULTS = {
    "run": 0,
    "pages_to_scan": 100,
    "sleep_millisecs": 20,
    "max_page_sharing": 256,
    "merge_across_nodes": 1,
    "use_zero_pages": 0,
    "smart_scan": 1,
    "advisor_mode": "none",
    "advisor_target_scan_time": 200,
    "advisor_max_cpu": 70,
    "advisor_min_pages_to_scan": 500,
    "advisor_max_pages_to_scan": 30_000,
}
"""From mm/ksm.c."""


def apply(request_: dict[str, Any], *, at_start: bool) -> Controls:
    return initial(request_) if at_start else change(Controls(), request_, NOTHING_SHARED)


def test_every_control_of_ksm_is_here_with_its_default_told() -> None:
    told = {
        name: schema["ksm_default"]
        for name, schema in Controls.model_json_schema()["properties"].items()
    }
    assert {name: told[name] for name in KSM_DEFAULTS} == KSM_DEFAULTS
    assert "max_kernel_pages" in told


def test_where_our_default_is_not_ksms_the_reason_is_told() -> None:
    for name, schema in Controls.model_json_schema()["properties"].items():
        if schema["ksm_default"] not in (None, schema["default"]):
            assert schema["differs"], name


def test_our_defaults() -> None:
    controls = Controls()
    assert (controls.run, controls.use_zero_pages, controls.smart_scan) == (1, 1, 1)
    assert (controls.max_kernel_pages, controls.max_page_sharing) == (0, 256)
    assert controls.advisor_mode == "scan-time"
    assert controls.pressure_threshold_percent == 0
    assert controls.vma_budget == 0
    assert initial({}) == controls


def test_controls_are_immutable_and_closed() -> None:
    with pytest.raises(ValidationError):
        Controls().__setattr__("run", 2)
    with pytest.raises(ValidationError):
        Controls.model_validate({"no_such": 1})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("run", "2", 2),
        ("run", " 0\n", 0),
        ("sleep_millisecs", "0", 0),
        ("max_kernel_pages", 2000, 2000),
        ("max_page_sharing", "2", 2),
        ("use_zero_pages", "off", 0),
        ("use_zero_pages", False, 0),
        ("smart_scan", "N", 0),
        ("merge_across_nodes", "on", 1),
        ("advisor_mode", "none", "none"),
        ("advisor_target_scan_time", "0200", 200),
        ("vma_budget", "64", 64),
        ("pressure_threshold_percent", "20", 20),
    ],
)
def test_values_as_they_come_from_shell_file_and_api(name: str, text: Any, value: Any) -> None:
    assert getattr(change(Controls(), {name: text}, NOTHING_SHARED), name) == value
    assert getattr(initial({name: text}), name) == value


@pytest.mark.parametrize(
    ("request_", "named", "says"),
    [
        ({"pages_to_scn": 5}, "pages_to_scn", "did you mean pages_to_scan"),
        ({"": 5}, "", "no such control"),
        ({"qqq": 5}, "qqq", "use one of run, pages_to_scan"),
        ({"pages_shared": 5}, "pages_shared", "counter"),
        ({"kernel_pages_allocated": 5}, "kernel_pages_allocated", "counter"),
        ({"stable_node_chains_prune_millisecs": 5}, "stable_node_chains_prune_millisecs", "chains"),
        ({"run": 3}, "run", "use 0 to 2"),
        ({"run": "-1"}, "run", "use 0 to 2"),
        ({"run": "one"}, "run", "not a decimal number"),
        ({"run": True}, "run", "not a decimal number"),
        ({"run": "0x1"}, "run", "not a decimal number"),
        ({"run": "1_0"}, "run", "not a decimal number"),
        ({"run": "٢"}, "run", "not a decimal number"),
        ({"run": "9" * 5000}, "run", "not a decimal number"),
        ({"run": 1.0}, "run", "not a decimal number"),
        ({"run": None}, "run", "not a decimal number"),
        ({"sleep_millisecs": ""}, "sleep_millisecs", "not a decimal number"),
        ({"sleep_millisecs": "20\n30"}, "sleep_millisecs", "not a decimal number"),
        ({"max_page_sharing": 1}, "max_page_sharing", "use 2 to"),
        ({"smart_scan": 2}, "smart_scan", "use 0 or 1"),
        ({"advisor_mode": "fast"}, "advisor_mode", "use none or scan-time"),
        ({"advisor_target_scan_time": 0}, "advisor_target_scan_time", "use 1 to"),
        ({"advisor_max_cpu": 101}, "advisor_max_cpu", "use 1 to 100"),
        ({"advisor_max_pages_to_scan": 499}, "advisor_max_pages_to_scan", "minimum would be 500"),
        ({"advisor_min_pages_to_scan": 30001}, "advisor_min_pages_to_scan", "in one request"),
        ({"vma_budget": 63}, "vma_budget", "use 0, or 64"),
        ({"gate_deadline_ms": 4}, "gate_deadline_ms", "use 5 to"),
        ({"pressure_threshold_percent": 95}, "pressure_threshold_percent", "never pause"),
    ],
)
def test_a_refusal_is_one_line_that_names_control_value_and_remedy(
    request_: dict[str, Any], named: str, says: str
) -> None:
    for at_start in (True, False):
        with pytest.raises(ControlError) as raised:
            apply(request_, at_start=at_start)
        error = raised.value
        assert isinstance(error, UsageError)
        line = str(error)
        assert line.startswith(f"{named}=")
        assert says in line
        assert line.isprintable()
        assert len(line) < 500
        assert (error.control, error.value) == (named, request_[named])
        assert error.why
        assert error.remedy


def test_one_refused_value_refuses_all() -> None:
    current = Controls(sleep_millisecs=7)
    with pytest.raises(ControlError, match=r"^run=7"):
        change(current, {"sleep_millisecs": 1, "run": 7, "smart_scan": 0}, NOTHING_SHARED)
    assert current == Controls(sleep_millisecs=7)


def test_pages_to_scan_belongs_to_the_advisor_while_it_is_on() -> None:
    for value in (5, Controls().pages_to_scan):
        with pytest.raises(ControlStateError, match="advisor_mode=none"):
            change(Controls(), {"pages_to_scan": value}, NOTHING_SHARED)
    assert change(BY_HAND, {"pages_to_scan": 5}, SHARED).pages_to_scan == 5

    both = {"pages_to_scan": "5", "advisor_mode": "none"}
    assert change(Controls(), both, SHARED) == Controls(pages_to_scan=5, advisor_mode="none")
    with pytest.raises(ControlError, match="pages_to_scan") as contradiction:
        change(BY_HAND, {"pages_to_scan": 5, "advisor_mode": "scan-time"}, NOTHING_SHARED)
    assert not isinstance(contradiction.value, ControlStateError)
    assert change(BY_HAND, {"advisor_mode": "scan-time"}, SHARED).advisor_mode == "scan-time"


def test_a_file_may_name_pages_to_scan_beside_the_advisor() -> None:
    assert initial({"pages_to_scan": 5}).pages_to_scan == 5
    assert initial(Controls().model_dump()) == Controls()


@pytest.mark.parametrize(("name", "other"), [("merge_across_nodes", 0), ("max_page_sharing", 64)])
def test_some_change_only_while_nothing_is_shared(name: str, other: int) -> None:
    with pytest.raises(ControlStateError, match=r"3 pages are shared; set run=2 first"):
        change(Controls(), {name: other}, SHARED)
    with pytest.raises(ControlError) as never:
        change(Controls(), {name: -1}, SHARED)
    assert not isinstance(never.value, ControlStateError)
    same = getattr(Controls(), name)
    assert change(Controls(), {name: same}, SHARED) == Controls()
    assert getattr(change(Controls(), {name: other}, NOTHING_SHARED), name) == other
    # Unmerging takes time: the same request cannot do both.
    with pytest.raises(ControlError, match=name):
        change(Controls(), {"run": 2, name: other}, SHARED)


def test_limits_that_hang_together_may_move_together() -> None:
    moved = {"advisor_min_pages_to_scan": 40_000, "advisor_max_pages_to_scan": 50_000}
    assert change(Controls(), moved, SHARED).advisor_min_pages_to_scan == 40_000


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(Controls.model_fields)), st.text(max_size=8)),
        st.one_of(st.integers(), st.integers(0, 100), st.text(max_size=8), st.booleans()),
        max_size=4,
    ),
    st.integers(0, 2),
)
@settings(deadline=None)
def test_any_request_is_applied_whole_or_refused(
    requested: dict[str, Any], pages_shared: int
) -> None:
    current = Controls()
    refused: ControlError | None = None
    changed = current
    try:
        changed = change(current, requested, ControlFacts(pages_shared))
    except ControlError as error:
        refused = error
    if refused is not None:
        assert refused.control in requested
        assert str(refused).isprintable()
    assert Controls.model_validate(changed.model_dump()) == changed
    for name, value in changed.model_dump().items():
        assert name in requested or value == getattr(current, name)
    assert current == Controls()


def test_the_counters_of_2009_have_their_names_of_today() -> None:
    assert COUNTERS_OF_2009 == {
        "kernel_pages_allocated": "pages_shared",
        "pages_shared": "pages_sharing",
    }


def test_the_table_has_a_row_for_every_control() -> None:
    head, rule, *rows = as_table().splitlines()
    columns = head.count("|")
    assert rule.count("|") == columns
    assert [row.split("`")[1] for row in rows] == list(Controls.model_fields)
    for row in rows:
        assert row.count("|") == columns, row
        name, default = row.split("|")[1].strip(" `"), row.split("|")[2].strip()
        assert default == str(getattr(Controls(), name))


def test_it_is_written_down_for_every_control_what_a_change_makes_void() -> None:
    assert REDONE.keys() == Controls.model_fields.keys()


@pytest.mark.parametrize(
    ("changed", "redo"),
    [
        ([], Redo.NOTHING),
        (["sleep_millisecs", "gate_deadline_ms"], Redo.NOTHING),
        (["sleep_millisecs", "max_page_sharing"], Redo.NOMINATION),
        (["vma_budget", "merge_across_nodes"], Redo.DIGESTS),
        (["vma_headroom"], Redo.NOMINATION),
    ],
)
def test_the_most_that_a_change_makes_void_counts(changed: list[str], redo: Redo) -> None:
    assert redone_by(changed) is redo
