"""The controls: those that KSM has in /sys/kernel/mm/ksm/, and ours beside them.

Owns names, defaults, limits, the rules by which a control may change, and the
table of them in docs/settings.md. Promises all or nothing: a request with one
refused value changes none. Refuses in one line that names the control, the
value, why, and what to do. Pure: facts about the host are arguments.

Names and meanings are those of Documentation/admin-guide/mm/ksm.rst (Linux 6.18)
and `mm/ksm.c`; `max_kernel_pages` is from the first KSM (Documentation/vm/ksm.txt
of 2.6.32), which lost it in 2.6.33 when KSM pages became swappable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from vmdedup.errors import UsageError

AdvisorMode = Literal["none", "scan-time"]

INT32_MAX: Final = 2**31 - 1

COUNTERS_OF_2009: Final[Mapping[str, str]] = {
    "kernel_pages_allocated": "pages_shared",
    "pages_shared": "pages_sharing",
}
"""Today's names (since 2.6.32) of the counters of the first KSM patches (2009).

`pages_shared` has changed its meaning: it always has today's one here.
"""

_COUNTERS: Final = frozenset(
    {
        "pages_shared",
        "pages_sharing",
        "pages_unshared",
        "pages_volatile",
        "pages_scanned",
        "pages_skipped",
        "full_scans",
        "ksm_zero_pages",
        "stable_node_chains",
        "stable_node_dups",
        "general_profit",
        "kernel_pages_allocated",
    }
)
_NOT_HERE: Final[Mapping[str, str]] = {
    "stable_node_chains_prune_millisecs": "stable nodes have no chains here, nothing goes stale",
}
_SWITCHES: Final = frozenset(
    {
        "merge_across_nodes",
        "use_zero_pages",
        "smart_scan",
        "shortage_say",
        "shortage_page_out",
        "shortage_hook",
        "shortage_pause",
    }
)
_SWITCH_WORDS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("0", "off", "n", "no", "false"), 0),
    **dict.fromkeys(("1", "on", "y", "yes", "true"), 1),
}
_NAMED: Final = 8
"""So many controls are named to somebody who asks for one that does not exist."""
_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,18}")
ONLY_UNSHARED: Final = ("merge_across_nodes", "max_page_sharing")


class ControlError(UsageError):
    """A control cannot be set to this value; no control has changed.

    `control` and `value` as requested, `why`, and `remedy`: what to do instead.
    """

    def __init__(self, control: str, value: object, why: str, remedy: str) -> None:
        super().__init__(f"{_one_line(control)}={_one_line(value)}: {why}; {remedy}")
        self.control = control
        self.value = value
        self.why = why
        self.remedy = remedy


class ControlStateError(ControlError):
    """The value is possible, but not in the present state; no control has changed."""


@dataclass(frozen=True, slots=True)
class ControlFacts:
    """The facts about the present state that the rules need."""

    pages_shared: int
    has_hook: bool = False
    """Whether the settings name a program for short memory."""


def _control(
    default: int | str,
    meaning: str,
    *,
    ksm: int | str | None,
    differs: str = "",
    ge: int | None = None,
    le: int | None = None,
) -> Any:
    """A field. `ksm` is KSM's default (`None`: KSM has no such control)."""
    extra: dict[str, Any] = {"ksm_default": ksm, "differs": differs}
    return Field(default=default, description=meaning, ge=ge, le=le, json_schema_extra=extra)


class Controls(BaseModel):
    """All controls; immutable once made. Switches are 0 or 1, as in sysfs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: int = _control(
        1,
        "`0` stops scanning and keeps the merges, `1` runs, `2` stops and unmerges everything, "
        "also in VMs that come later, but keeps the registrations",
        ksm=0,
        differs="a user who starts `vmdedup run` wants it to run",
        ge=0,
        le=2,
    )
    pages_to_scan: int = _control(
        1000,
        "pages to look at before the scan sleeps; the advisor sets it while it is on",
        ksm=100,
        differs="KSM's is for demonstration; ours is at most 195 MiB/s. "
        "`0` is refused: that is `run=0`. Turning the advisor off brings back "
        "the value set by hand, not the default",
        ge=1,
        le=INT32_MAX,
    )
    sleep_millisecs: int = _control(
        20, "milliseconds to sleep after pages_to_scan pages", ksm=20, ge=0, le=3_600_000
    )
    max_kernel_pages: int = _control(
        0,
        "most store pages; at the limit no new one is made, existing ones still gain sharers; "
        "`0` is no limit",
        ksm="a quarter of memory (2.6.32 only)",
        differs="KSM limited memory that could not be swapped; store pages can be",
        ge=0,
        le=INT32_MAX,
    )
    max_page_sharing: int = _control(
        256,
        "most guest pages that share one store page; then a copy of it is begun. "
        "Changes only while nothing is shared",
        ksm=256,
        ge=2,
        le=INT32_MAX,
    )
    merge_across_nodes: int = _control(
        1,
        "`1` merges pages of different NUMA nodes, `0` only within a node. "
        "Changes only while nothing is shared",
        ksm=1,
        differs="one tree and one store in both cases: digests differ by node, "
        "store pages lie on their sharers' node",
        ge=0,
        le=1,
    )
    use_zero_pages: int = _control(
        1,
        "`1` merges pages full of zeroes onto the kernel's zero page",
        ksm=0,
        differs="most of an idle guest is zeroes; merging them so takes no store page",
        ge=0,
        le=1,
    )
    smart_scan: int = _control(
        1,
        "`1` looks ever more rarely at pages that stay unique",
        ksm=1,
        differs="a skipped page that was not written stays a possible partner. On the same"
        " schedule vmdedup asks which pages were written, so most passes cost next to nothing",
        ge=0,
        le=1,
    )
    advisor_mode: AdvisorMode = _control(
        "scan-time",
        "`scan-time` sets pages_to_scan so that a scan takes advisor_target_scan_time; "
        "`none` leaves it to you",
        ksm="none",
        differs="no tuning by hand on a host whose VMs come and go",
    )
    advisor_target_scan_time: int = _control(
        20,
        "seconds from the begin of one full scan to the next",
        ksm=200,
        differs="dirty tracking makes a scan cheap, so it can come ten times as often. "
        "After an early end the engine pauses; much new memory is read as fast as "
        "advisor_max_cpu allows",
        ge=1,
        le=86_400,
    )
    advisor_max_cpu: int = _control(
        70,
        "most CPU time of the engine, percent of one CPU",
        ksm=70,
        differs="it holds over scan and pause together, also if pages_to_scan is at its minimum",
        ge=1,
        le=100,
    )
    advisor_min_pages_to_scan: int = _control(
        500,
        "least pages_to_scan the advisor sets",
        ksm=500,
        differs="our advisor never sets less; KSM's only starts there",
        ge=1,
        le=INT32_MAX,
    )
    advisor_max_pages_to_scan: int = _control(
        30_000, "most pages_to_scan the advisor sets", ksm=30_000, ge=1, le=INT32_MAX
    )
    vma_budget: int = _control(
        0,
        "most VMAs a VM may have, 64 or more; `0` is vm.max_map_count less vma_headroom",
        ksm=None,
        ge=0,
        le=INT32_MAX,
    )
    gate_deadline_ms: int = _control(
        100,
        "milliseconds after which a gate that is not done is opened and its pages are retried",
        ksm=None,
        ge=5,
        le=1000,
    )
    huge_page_density: int = _control(
        0,
        "pages of a huge page of 2 MiB that must be savable for it to be split; what could be "
        "saved in others waits (`pages_kept_in_huge`). It falls as memory gets short: "
        "half below pressure_threshold_percent (20% if that is `0`), a quarter below half of "
        "that, `0` below a quarter of it. `0` splits every huge page, `512` only those saved whole",
        ksm=None,
        differs="KSM splits every huge page",
        ge=0,
        le=512,
    )
    pressure_threshold_percent: int = _control(
        0,
        "merge only while available memory is below this percentage of all; `0` is always",
        ksm=None,
        differs="ksmtuned's KSM_THRES_COEF (20 there)",
        ge=0,
        le=99,
    )
    pressure_hysteresis_percent: int = _control(
        5,
        "percentage points above the threshold at which merging pauses",
        ksm=None,
        differs="ksmtuned has none",
        ge=0,
        le=50,
    )
    reserve_bytes: int = _control(
        0,
        "memory that must stay free for bursts of writes, bytes, of the host and of each memory"
        " cgroup of VMs; below it the steps for short memory begin, merging goes on",
        ksm=None,
        ge=0,
        le=2**50,
    )
    reserve_percent: int = _control(
        5,
        "the same as a percentage of the host's memory, or of the cgroup's limit; the larger"
        " of both counts",
        ksm=None,
        ge=0,
        le=90,
    )
    shortage_say: int = _control(
        1,
        "`1` makes an event when memory becomes short, and when it suffices again",
        ksm=None,
        ge=0,
        le=1,
    )
    shortage_page_out: int = _control(
        0,
        "`1` pages cold memory out to zram at once while the host's memory is short: what is unique"
        " and was not written for cold_after_s, or for 60 seconds if that is `0`",
        ksm=None,
        ge=0,
        le=1,
    )
    shortage_hook: int = _control(
        0,
        "`1` runs the program of the setting memory_hook when memory becomes short, and when it"
        " suffices again",
        ksm=None,
        ge=0,
        le=1,
    )
    shortage_pause: int = _control(
        0,
        "`1` pauses VMs below half of the reserve, the lowest priority first, until there is"
        " memory",
        ksm=None,
        ge=0,
        le=1,
    )

    cold_after_s: int = _control(
        0,
        "page out pages that are unique and were not written for so many seconds; `0` is off."
        " Looks tell of writes, so it takes at least four passes",
        ksm=None,
        ge=0,
        le=604_800,
    )
    cold_max_refaults: int = _control(
        50,
        "pages a second that may come back to a VM within a minute after they were paged out;"
        " above that the pace is halved",
        ksm=None,
        ge=1,
        le=1_000_000,
    )
    cold_max_cpu: int = _control(
        5,
        "most CPU time for paging out, compression included, percent of one CPU",
        ksm=None,
        ge=1,
        le=100,
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        least, most = self.advisor_min_pages_to_scan, self.advisor_max_pages_to_scan
        if least > most:
            raise _misfit(
                ("advisor_min_pages_to_scan", "advisor_max_pages_to_scan"),
                f"the minimum would be {least} and the maximum {most}",
                "give both in one request",
            )
        if 0 < self.vma_budget < 64:
            raise _misfit(("vma_budget",), "too few to merge anything", "use 0, or 64 and more")
        threshold, above = self.pressure_threshold_percent, self.pressure_hysteresis_percent
        if threshold and threshold + above >= 100:
            raise _misfit(
                ("pressure_threshold_percent", "pressure_hysteresis_percent"),
                f"{threshold}% and {above}% above it: merging would never pause",
                "keep the sum of both below 100",
            )
        return self


def _misfit(controls: tuple[str, ...], why: str, remedy: str) -> PydanticCustomError:
    """The error for values that are each possible, but not together."""
    facts = {"controls": " and ".join(controls), "why": why, "remedy": remedy}
    return PydanticCustomError("misfit", "{controls}: {why}; {remedy}", facts)


def initial(values: Mapping[str, str | int]) -> Controls:
    """Controls at start, from a file or the command line; defaults for those not named.

    Limits hold as in `change`; the rules about a running state do not apply.
    """
    return _built({}, values)


def change(current: Controls, requested: Mapping[str, str | int], facts: ControlFacts) -> Controls:
    """`current` with `requested` applied, or ControlError and nothing applied.

    Raises ControlStateError for values that are possible, but not now.
    KSM's rules are judged on the outcome: `pages_to_scan` may come together with
    `advisor_mode=none`. `max_page_sharing` and `merge_across_nodes` may always be set
    to their present values.
    """
    changed = _built(current.model_dump(), requested)
    if "pages_to_scan" in requested and changed.advisor_mode != "none":
        # Both in one request contradict each other at any time.
        refusal = ControlError if "advisor_mode" in requested else ControlStateError
        raise refusal(
            "pages_to_scan",
            requested["pages_to_scan"],
            "the advisor sets it while advisor_mode is scan-time",
            "set advisor_mode=none with it, or change advisor_target_scan_time",
        )
    if "shortage_hook" in requested and changed.shortage_hook and not facts.has_hook:
        raise ControlStateError(
            "shortage_hook",
            requested["shortage_hook"],
            "there is no program to run",
            "name it as memory_hook in the settings file, and reload",
        )
    for name in ONLY_UNSHARED:
        if facts.pages_shared and getattr(changed, name) != getattr(current, name):
            raise ControlStateError(
                name,
                requested[name],
                f"cannot change while {facts.pages_shared} pages are shared",
                "set run=2 first, then this, then run=1",
            )
    return changed


def _built(base: Mapping[str, Any], requested: Mapping[str, str | int]) -> Controls:
    values = {name: _parsed(name, value) for name, value in requested.items()}
    try:
        return Controls.model_validate({**base, **values})
    except ValidationError as error:
        raise _refusal(error.errors()[0], requested, {**base, **values}) from error


def _one_line(text: object) -> str:
    """The text as given if it is short and printable, otherwise quoted and cut."""
    plain = str(text)
    return plain if plain.isprintable() and len(plain) <= 60 else f"{plain[:60]!r}"


def _parsed(name: str, value: str | int) -> str | int:
    """The value as the control's type. Numbers are decimal, switches also on and off."""
    if name not in Controls.model_fields:
        raise _unknown(name, value)
    if name == "advisor_mode":
        return str(value).strip()
    if isinstance(value, bool):
        if name in _SWITCHES:
            return int(value)
    elif isinstance(value, int):
        return value
    elif isinstance(value, str):
        text = value.strip()
        if name in _SWITCHES and text.lower() in _SWITCH_WORDS:
            return _SWITCH_WORDS[text.lower()]
        if _NUMBER.fullmatch(text):
            return int(text)
    raise ControlError(name, value, "not a decimal number", f"use {_limits(name)}")


def _unknown(name: str, value: object) -> ControlError:
    if name in _COUNTERS:
        return ControlError(name, value, "a counter cannot be set", "read it in the report")
    if name in _NOT_HERE:
        return ControlError(name, value, _NOT_HERE[name], "leave it out")
    near = get_close_matches(name, Controls.model_fields, n=1, cutoff=0.5)
    some = ", ".join(list(Controls.model_fields)[:_NAMED])
    remedy = f"did you mean {near[0]}?" if near else f"use one of {some}, …: `vmdedup get` has all"
    return ControlError(name, value, "no such control", remedy)


def _refusal(
    found: ErrorDetails, requested: Mapping[str, str | int], values: Mapping[str, Any]
) -> ControlError:
    """Pydantic's first finding as our one line."""
    if found["type"] == "misfit":
        facts = found["ctx"]
        names = facts["controls"].split(" and ")
        name = next((name for name in names if name in requested), names[0])
        return ControlError(name, values.get(name, _default(name)), facts["why"], facts["remedy"])
    name = str(found["loc"][0])
    why = "no such mode" if name == "advisor_mode" else "out of range"
    return ControlError(name, requested[name], why, f"use {_limits(name)}")


def _default(name: str) -> int | str:
    default: int | str = Controls.model_fields[name].default
    return default


def _limits(name: str) -> str:
    if name == "advisor_mode":
        return "none or scan-time"
    schema = Controls.model_json_schema()["properties"][name]
    low, high = schema["minimum"], schema["maximum"]
    return f"{low} or {high}" if high - low == 1 else f"{low} to {high}"


def as_table() -> str:
    """All controls as a Markdown table, for docs/settings.md."""
    lines = [
        "| control | default | KSM's default | meaning | where ours differs |",
        "|---|---|---|---|---|",
    ]
    for name, schema in Controls.model_json_schema()["properties"].items():
        ksm = "(ours)" if schema["ksm_default"] is None else schema["ksm_default"]
        cells = (f"`{name}`", _default(name), ksm, schema["description"], schema["differs"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
