"""`vmdedup assert`: rules that the sharing must keep, as a step of a shell script."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.options import AsJson, Domains, Libvirt, Qmp, RuntimeDir
from vmdedup.cli.outcome import BELOW, DONE, FAILURE, complain
from vmdedup.cli.report import is_served, read_report, sharing_now, unserved_lines
from vmdedup.errors import UsageError

if TYPE_CHECKING:
    from vmdedup.models import Judgement

RULES = "Rules"
_TITLE = "vmdedup assert"


def assert_sharing(
    min_saved: Annotated[
        str | None,
        typer.Option(
            "--min-saved",
            metavar="N%",
            help="Least saved part of the memory held before merging.",
            show_default=False,
            rich_help_panel=RULES,
        ),
    ] = None,
    max_gate_ms: Annotated[
        float | None,
        typer.Option(
            "--max-gate-ms",
            metavar="MS",
            help="Longest time that a gate may take, of the latest gates.",
            show_default=False,
            rich_help_panel=RULES,
        ),
    ] = None,
    max_stops: Annotated[
        int | None,
        typer.Option(
            "--max-stops",
            metavar="N",
            help="Most pauses of VMs since they were attached.",
            show_default=False,
            rich_help_panel=RULES,
        ),
    ] = None,
    max_broken_pages: Annotated[
        int | None,
        typer.Option(
            "--max-broken-pages",
            metavar="N",
            help="Most writes to merged pages since the report of --since.",
            show_default=False,
            rich_help_panel=RULES,
        ),
    ] = None,
    since: Annotated[
        Path | None,
        typer.Option(
            "--since",
            metavar="FILE",
            help="An earlier report in JSON, for --max-broken-pages.",
            show_default=False,
            rich_help_panel=RULES,
        ),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Judge a report in JSON; ask neither daemon nor kernel.",
            show_default=False,
        ),
    ] = None,
    qmp: Qmp = None,
    libvirt: Libvirt = None,
    domains: Domains = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Check rules for the sharing now; exit with 3 if one is broken.

    The rules are those of the pytest marker. Exit code 1 if a figure is not known.
    """
    from vmdedup.report.expectations import expectations, judge

    given = {
        "min_saved": min_saved,
        "max_gate_ms": max_gate_ms,
        "max_stops": max_stops,
        "max_broken_pages": max_broken_pages,
    }
    expected = expectations(given)
    if expected.is_empty:
        raise UsageError("no rule is given, for instance --min-saved 30%")
    if (max_broken_pages is None) != (since is None):
        raise UsageError("--max-broken-pages and --since belong together")
    if earlier is not None and (qmp or libvirt):
        raise UsageError("--from excludes --qmp and --libvirt")
    before = None if since is None else read_report("--since", since)
    if earlier is None:
        sharing = sharing_now(qmp, libvirt, domains, runtime_dir)
    else:
        sharing = read_report("--from", earlier)
    judgement = judge(expected, sharing, before)
    for line in unserved_lines(sharing):
        complain(line)
    if as_json:
        print(judgement.model_dump_json(indent=2))
    _show(judgement, as_json=as_json)
    if not is_served(sharing) or any(rule.found is None for rule in judgement.rules):
        return FAILURE
    return DONE if judgement.ok else BELOW


def _show(judgement: Judgement, *, as_json: bool) -> None:
    """The rules that hold on stdout, the others on stderr, where GitHub reads annotations too."""
    from vmdedup.report.github import error_line, is_wanted

    for rule in judgement.rules:
        line = f"{rule.rule}: {rule.message}"
        if not rule.holds:
            complain(line)
            if is_wanted(os.environ):
                print(error_line(rule.message, f"{_TITLE}: {rule.rule}"), file=sys.stderr)
        elif not as_json:
            print(line)
