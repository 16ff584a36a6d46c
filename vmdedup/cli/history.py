"""`vmdedup history`: the savings over time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.completion import vm_names
from vmdedup.cli.options import AsJson, RuntimeDir, StateDir, chosen_format, make_settings
from vmdedup.cli.outcome import DONE, FAILURE, complain, put
from vmdedup.cli.service import daemon_if_running
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.report.files import write_bytes

if TYPE_CHECKING:
    from vmdedup.models import History

FORMATS = ("table", "csv", "json", "parquet")
KEPT_BY = "`vmdedup run` keeps one (--state-dir DIR)"
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
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help=f"{', '.join(FORMATS)}; table by default.",
            show_default=False,
        ),
    ] = None,
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
    vm: Annotated[
        str | None,
        typer.Option(
            "--vm",
            metavar="NAME",
            help="One VM instead of all together.",
            autocompletion=vm_names,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write csv, json or parquet to this file; its ending chooses.",
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

    wanted = _format(form, output, as_json)
    since_s = seconds(since)
    if max_points is not None and max_points > MAX_POINTS:
        raise UsageError(f"--max-points {max_points}: write at most {MAX_POINTS}")
    points = _TABLE_POINTS if wanted == "table" else max_points or MAX_POINTS
    found = _found(since_s, points, vm, state_dir, runtime_dir)
    _deliver(found, wanted, output, since_s, max_points)
    if not found.samples:
        of_vm = "" if vm is None else f" of {vm}"
        complain(f"no sample{of_vm} of the last {since}")
    return DONE if found.samples else FAILURE


def seconds(text: str, option: str = "--since") -> int:
    """`90s`, `30m`, `1h`, `7d` or `2w` in seconds. Raises UsageError."""
    from vmdedup.history.series import LONGEST_S

    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip())
    since_s = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < since_s <= LONGEST_S:
        raise UsageError(
            f"{option} {text}: write a time up to {LONGEST_S // 86_400}d,"
            " for instance 30m, 1h or 7d"
        )
    return since_s


def _deliver(
    found: History, wanted: str, output: Path | None, since_s: int, rows: int | None
) -> None:
    if wanted == "json":
        put(f"{found.model_dump_json(indent=2)}\n", output)
        return
    from vmdedup.report.history import as_csv, as_parquet, show_history

    if wanted == "csv":
        put(as_csv(found), output)
    elif wanted == "parquet":
        assert output is not None
        write_bytes(output, as_parquet(found))
    elif found.samples:
        show_history(found, since_s, rows=rows)


def _format(form: str | None, output: Path | None, as_json: bool) -> str:
    wanted = chosen_format(form, output, as_json, FORMATS, {f".{each}": each for each in FORMATS})
    if wanted == "parquet" and output is None:
        raise UsageError("parquet is no text: name a file with -o FILE")
    if wanted == "table" and output is not None:
        raise UsageError(f"-o {output}: choose --format csv, json or parquet")
    return wanted


def _found(
    since_s: int,
    max_points: int,
    vm: str | None,
    state_dir: Path | None,
    runtime_dir: Path | None,
) -> History:
    service = daemon_if_running(runtime_dir) if state_dir is None else None
    if service is not None:
        with service:
            return service.history(since_s, max_points=max_points, vm=vm)
    from vmdedup.history.offline import read_offline
    from vmdedup.history.place import FILE_NAME, default_directory

    settings = make_settings(state_dir=state_dir)
    path = (settings.state_dir or default_directory()) / FILE_NAME
    found = read_offline(path, since_s, max_points, settings.history_interval_s, vm)
    if found is None:
        which = "there is no" if state_dir else "no daemon runs, and there is no"
        raise VmdedupError(f"{which} history at {path}: {KEPT_BY}")
    return found
