"""`vmdedup history`: the savings over time."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.options import AsJson, RuntimeDir, StateDir, make_settings
from vmdedup.cli.outcome import DONE, FAILURE, complain
from vmdedup.cli.service import daemon_if_running
from vmdedup.errors import UsageError, VmdedupError

if TYPE_CHECKING:
    from vmdedup.models import History

FORMATS = ("table", "csv", "json")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_TABLE_POINTS = 500
"""Samples that the line above the table is drawn from."""


def history(
    since: Annotated[
        str,
        typer.Option(
            "--since", metavar="TIME", help="Time back from now: 90s, 30m, 1h, 7d, 2w and the like."
        ),
    ] = "1h",
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help=", ".join(FORMATS) + ".")
    ] = "table",
    max_points: Annotated[
        int | None,
        typer.Option(
            "--max-points",
            metavar="N",
            min=1,
            help="Average evenly into at most N samples (by default a table of 20; csv and json"
            " have all, up to 6000).",
            show_default=False,
        ),
    ] = None,
    state_dir: StateDir = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Show the savings over time, as the daemon has noted them.

    Asks the daemon if one runs. Otherwise, and with --state-dir, reads its file.
    """
    from vmdedup.history.series import MAX_POINTS

    wanted = _format(form, as_json)
    since_s = seconds(since)
    if max_points is not None and max_points > MAX_POINTS:
        raise UsageError(f"--max-points {max_points}: write at most {MAX_POINTS}")
    points = _TABLE_POINTS if wanted == "table" else max_points or MAX_POINTS
    found = _found(since_s, points, state_dir, runtime_dir)
    if wanted == "json":
        print(found.model_dump_json(indent=2))
    elif wanted == "csv":
        from vmdedup.report.history import as_csv

        sys.stdout.write(as_csv(found))
    elif found.samples:
        from vmdedup.report.history import show_history

        show_history(found, since_s, rows=max_points)
    if not found.samples:
        complain(f"no sample of the last {since}")
    return DONE if found.samples else FAILURE


def seconds(text: str) -> int:
    """`90s`, `30m`, `1h`, `7d` or `2w` in seconds. Raises UsageError."""
    from vmdedup.history.series import LONGEST_S

    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip())
    since_s = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < since_s <= LONGEST_S:
        raise UsageError(
            f"--since {text}: write a time up to {LONGEST_S // 86_400}d, for instance 30m, 1h or 7d"
        )
    return since_s


def _format(form: str, as_json: bool) -> str:
    if form not in FORMATS:
        raise UsageError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    if as_json and form == "csv":
        raise UsageError("--json and --format csv exclude each other")
    return "json" if as_json else form


def _found(
    since_s: int, max_points: int, state_dir: Path | None, runtime_dir: Path | None
) -> History:
    service = daemon_if_running(runtime_dir) if state_dir is None else None
    if service is not None:
        with service:
            return service.history(since_s, max_points=max_points)
    from vmdedup.history.offline import read_offline
    from vmdedup.history.place import FILE_NAME, default_directory

    settings = make_settings(state_dir=state_dir)
    path = (settings.state_dir or default_directory()) / FILE_NAME
    found = read_offline(path, since_s, max_points, settings.history_interval_s)
    if found is None:
        which = "there is no" if state_dir else "no daemon runs, and there is no"
        raise VmdedupError(f"{which} history at {path}: `vmdedup run` keeps one (--state-dir DIR)")
    return found
