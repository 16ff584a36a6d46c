"""What a user expects of a report: rules with limits, and whether they hold.

Owns the rules that `vmdedup assert` and the pytest marker share, and their wording. Pure.
Promises one checked rule for each that is given, and one line that says what was found.
A figure that the report does not know never holds: only an engine that merges counts
gates and pauses. Refuses a rule that it does not know, and a limit that makes no sense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from vmdedup.errors import UsageError
from vmdedup.models import CheckedRule, Judgement, Model, SharingReport, VmReport
from vmdedup.report.baseline import Saved
from vmdedup.report.words import milliseconds, number_of, size

_NOT_COUNTED = (
    "not known: only an engine that merges counts it; ask the daemon, or judge the report of"
    " the run that merged"
)


def _percent(value: object) -> object:
    """`30%` as 30. A bare number is refused: 0.3 could mean 30%."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return value.strip().removesuffix("%")
    raise ValueError("write a percentage, for instance 30%")


class Expectations(Model):
    """The rules that a user gave; `None` asks for nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_saved: Annotated[float, Field(ge=0, le=100), BeforeValidator(_percent)] | None = Field(
        default=None,
        description="least part of the memory held before merging that is saved, percent",
    )
    max_gate_ms: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="longest time for which a gate may hold a writer, milliseconds"
    )
    max_stops: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="most pauses of VMs, over all of them"
    )
    max_broken_pages: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="most writes to merged pages between two reports, over all VMs",
    )

    @property
    def is_empty(self) -> bool:
        """Whether no rule is given."""
        return all(limit is None for _, limit in self)


def expectations(given: Mapping[str, object]) -> Expectations:
    """The rules by their names. Raises UsageError with one line."""
    try:
        return Expectations.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = problem["loc"][0]
        if problem["type"] == "extra_forbidden":
            known = ", ".join(Expectations.model_fields)
            raise UsageError(f"{name}: no such rule (there are: {known})") from error
        text = problem["msg"].removeprefix("Value error, ")
        raise UsageError(f"{name}={problem['input']}: {text[:1].lower()}{text[1:]}") from error


def judge(
    expected: Expectations, now: SharingReport, before: SharingReport | None = None
) -> Judgement:
    """Whether each rule holds of `now`; `max_broken_pages` counts since `before`.

    Raises UsageError if a rule needs `before` and there is none.
    """
    rules = list(_checked(expected, now, before))
    return Judgement(ok=all(rule.holds for rule in rules), rules=rules)


def _checked(
    expected: Expectations, now: SharingReport, before: SharingReport | None
) -> Iterator[CheckedRule]:
    if expected.min_saved is not None:
        yield _saved(expected.min_saved, Saved.of(now.vms))
    if expected.max_gate_ms is not None:
        longest_ms = _longest_gate_ms(now)
        text = f"the longest gate took {milliseconds(longest_ms)}"
        yield _at_most("max_gate_ms", expected.max_gate_ms, longest_ms, text)
    if expected.max_stops is not None:
        stops = _by_name((vm.name, vm.stops or 0) for vm in now.vms)
        total = sum(stops.values())
        text = f"{number_of(total, 'pause')}{_named(stops)}"
        known = None if now.host.stopped_ms is None else total
        yield _at_most("max_stops", expected.max_stops, known, text)
    if expected.max_broken_pages is not None:
        if before is None:
            raise UsageError("max_broken_pages counts since an earlier report: none is given")
        broken = broken_pages(before, now)
        total = sum(broken.values())
        text = f"{number_of(total, 'write')} to merged pages{_named(broken)}"
        yield _at_most("max_broken_pages", expected.max_broken_pages, total, text)


def _saved(least_percent: float, saved: Saved) -> CheckedRule:
    held = f"{size(saved.saved_bytes)} of {size(saved.present_bytes)}"
    holds = saved.present_bytes > 0 and saved.percent >= least_percent
    return CheckedRule(
        rule="min_saved",
        limit=least_percent,
        found=saved.percent if saved.present_bytes else None,
        holds=holds,
        message=f"{saved.percent:.1f}% saved ({held}), {_side(holds, 'below')} {least_percent:g}%",
    )


def _longest_gate_ms(report: SharingReport) -> float | None:
    """The longest of the latest gates in milliseconds; `None` if they were not counted."""
    if report.host.stopped_ms is None:
        return None
    return report.host.gate_ms.max or 0.0


def _at_most(rule: str, limit: float, found: float | None, text: str) -> CheckedRule:
    holds = found is not None and found <= limit
    told = _NOT_COUNTED if found is None else f"{text}, {_side(holds)} {limit:g}"
    return CheckedRule(rule=rule, limit=limit, found=found, holds=holds, message=told)


def _side(holds: bool, missed: str = "above") -> str:
    return "within" if holds else missed


def _by_name(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The sum for each name: two VMs may share one."""
    found: dict[str, int] = {}
    for name, number in counts:
        found[name] = found.get(name, 0) + number
    return found


def _named(counts: Mapping[str, int]) -> str:
    """` (web 3, db 1)`: the VMs that have any."""
    some = [f"{name} {number:,}" for name, number in counts.items() if number]
    return f" ({', '.join(some)})" if some else ""


def broken_pages(before: SharingReport, now: SharingReport) -> dict[str, int]:
    """Writes to merged pages of each VM that is in both reports, by its name.

    Where both reports are an engine's that merges, each write counts. Else these are the
    pages that are broken now and were not: a page that was merged again does not count.
    """
    earlier = {(vm.name, vm.pid): vm for vm in before.vms}
    both = ((vm, earlier.get((vm.name, vm.pid))) for vm in now.vms)
    return _by_name((vm.name, _broken(then, vm)) for vm, then in both if then is not None)


def _broken(then: VmReport, now: VmReport) -> int:
    if then.cow_breaks is not None and now.cow_breaks is not None:
        return max(0, now.cow_breaks - then.cow_breaks)
    return max(0, now.cow_broken_pages - then.cow_broken_pages)
