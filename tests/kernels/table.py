"""The table in docs/kernels.md: one row a series of kernels."""

from __future__ import annotations

from collections.abc import Mapping

_COLUMNS = {
    "release": "kernel",
    "live": "live",
    "incremental": "incremental",
    "pauses": "in pauses",
    "unit": "under systemd",
    "process": "process tests",
    "qemu": "QEMU",
    "commit": "commit",
    "date": "date",
}
FAILED = "**failed**"
_NOT_TRIED = "not tried"
HEAD = "| series | " + " | ".join(_COLUMNS.values()) + " |"
RULE = "|" + "---|" * (len(_COLUMNS) + 1)


def replace_row(text: str, series: str, facts: Mapping[str, str]) -> str:
    """The document with the row of `series` made anew, or added at the end of the table."""
    row = f"| {series} | " + " | ".join(facts.get(key, _NOT_TRIED) for key in _COLUMNS) + " |"
    lines = text.splitlines()
    first = lines.index(RULE) + 1
    last = next(
        (at for at, line in enumerate(lines[first:], first) if not line.startswith("|")),
        len(lines),
    )
    rows = [line for line in lines[first:last] if not line.startswith(f"| {series} |")]
    return "\n".join([*lines[:first], *rows, row, *lines[last:]]) + "\n"
