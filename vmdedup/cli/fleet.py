"""`vmdedup fleet`: one question to many hosts, and where VMs should run to share most."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.options import AsJson, Output, ReportFormat, report_format
from vmdedup.cli.outcome import DONE, FAILURE, complain, put
from vmdedup.errors import UsageError
from vmdedup.units import DEFAULT_RATE, require_rate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from vmdedup.hosts.ask import Answer
    from vmdedup.hosts.documents import HostRow
    from vmdedup.hosts.grouping import Grouper
    from vmdedup.hosts.inventory import Inventory
    from vmdedup.hosts.show import Document
    from vmdedup.hosts.sketch_table import SketchTable
    from vmdedup.report.files import Format

ACTIONS = ("report", "similar", "plan", "place")
RULES = ("proxmox", "kubevirt", "nova")


def fleet(
    action: Annotated[
        str,
        typer.Argument(
            metavar="ACTION",
            help="report: the savings; similar: which VMs are alike; plan: where they should run;"
            " place: the best host for one more.",
        ),
    ],
    like: Annotated[
        str | None,
        typer.Argument(metavar="VM", help="For place: a VM like the new one, or HOST/VM."),
    ] = None,
    hosts: Annotated[
        Path | None,
        typer.Option(
            "--hosts",
            metavar="FILE",
            help="The hosts, as TOML (*.toml), or an inventory as Ansible has it (*.yml, or INI).",
            show_default=False,
        ),
    ] = None,
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", metavar="S", min=1, max=3600, help="Longest wait for a host."),
    ] = 60.0,
    rate: Annotated[
        int,
        typer.Option("--rate", metavar="N", help="Compare one content in N: 16, 32, … 4096."),
    ] = DEFAULT_RATE,
    alike_percent: Annotated[
        float,
        typer.Option(
            "--alike",
            metavar="N",
            min=1,
            max=100,
            help="VMs are of one kind if they have N% of the contents in common.",
        ),
    ] = 50.0,
    most_pairs: Annotated[
        int, typer.Option("--pairs", metavar="N", min=0, help="Show the N pairs with most.")
    ] = 20,
    worth_percent: Annotated[
        float,
        typer.Option(
            "--worth",
            metavar="N",
            min=0,
            help="A move has to save N% of the memory that it carries over.",
        ),
    ] = 10.0,
    rules: Annotated[
        str | None,
        typer.Option(
            "--rules",
            metavar="FORM",
            help="For plan: print its groups as rules for proxmox, kubevirt or nova.",
            show_default=False,
        ),
    ] = None,
    sketches: Annotated[
        Path | None,
        typer.Option(
            "--sketches",
            metavar="FILE",
            help="Also write the sketches, as Parquet.",
            show_default=False,
        ),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="For similar: sketches in Parquet; ask no host.",
            show_default=False,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="URL",
            help="Compare on this Dask cluster, tcp://host:port, not in this process.",
            show_default=False,
        ),
    ] = None,
    form: ReportFormat = None,
    output: Output = None,
    as_json: AsJson = False,
) -> int:
    """Ask many hosts: the savings, VMs that are alike, placement.

    Nothing is started or moved. similar, plan and place need the extra `fleet`.
    """
    _require_sense(action, like, hosts, earlier, rate)
    if rules is not None and (action != "plan" or rules not in RULES):
        raise UsageError(f"--rules {rules}: for plan, choose one of {', '.join(RULES)}")
    if scheduler is not None and action == "report":
        raise UsageError("--scheduler is for similar, plan and place: a report compares nothing")
    wanted = report_format(form, output, as_json)
    with _grouping(scheduler) as group:
        if earlier is not None:
            from vmdedup.hosts.sketch_table import SketchTable, read_parquet

            read = SketchTable(read_parquet(earlier), group)
            document = _similar(read, [], alike_percent, most_pairs)
            return _deliver(document, wanted, output, None, served=len(read) > 0)
        from vmdedup.hosts.ask import ask_all
        from vmdedup.hosts.inventory import read_inventory
        from vmdedup.hosts.rows import fleet_report, host_rows

        assert hosts is not None
        inventory = read_inventory(hosts)
        needs_sketches = action != "report" or sketches is not None
        answers = ask_all(inventory, timeout_s=timeout_s, rate=rate if needs_sketches else None)
        rows = host_rows(answers)
        table = _table(answers, sketches, group) if needs_sketches else None
        for row in rows:
            if row.reason:
                complain(f"{row.host}: {row.reason}")
        if table is None or action == "report":
            document = fleet_report(answers)
        elif action == "similar":
            document = _similar(table, rows, alike_percent, most_pairs)
        else:
            document = _placed(action, like, table, inventory, answers, rows, worth_percent)
    served = any(each.report for each in answers)
    return _deliver(document, wanted, output, rules, served=served)


def _grouping(scheduler: str | None) -> AbstractContextManager[Grouper | None]:
    """What groups the marks: a Dask cluster, or `None` for this process."""
    if scheduler is None:
        return nullcontext()
    from vmdedup.hosts.cluster import grouped_on

    return grouped_on(scheduler)


def _require_sense(
    action: str, like: str | None, hosts: Path | None, earlier: Path | None, rate: int
) -> None:
    if action not in ACTIONS:
        raise UsageError(f"fleet {action}: choose one of {', '.join(ACTIONS)}")
    if (like is not None) != (action == "place"):
        raise UsageError("fleet place needs a VM like the new one, and only place takes one")
    if earlier is not None and action != "similar":
        raise UsageError("--from is for similar: a plan needs the hosts' present state")
    if (hosts is None) == (earlier is None):
        raise UsageError("name the hosts with --hosts FILE (or, for similar, --from FILE)")
    try:
        require_rate(rate)
    except ValueError as error:
        raise UsageError(f"--rate {rate}: {error}") from error


def _table(answers: Sequence[Answer], sketches: Path | None, group: Grouper | None) -> SketchTable:
    from vmdedup.hosts.sketch_table import SketchTable, as_table, write_parquet

    table = as_table([vm for answer in answers for vm in answer.vms])
    if sketches is not None:
        write_parquet(table, sketches)
    return SketchTable(table, group)


def _similar(
    table: SketchTable, rows: Sequence[HostRow], alike_percent: float, most_pairs: int
) -> Document:
    from vmdedup.hosts.alike import similarity

    return similarity(table, rows, alike=alike_percent / 100, most_pairs=most_pairs)


def _placed(
    action: str,
    like: str | None,
    table: SketchTable,
    inventory: Inventory,
    answers: Sequence[Answer],
    rows: Sequence[HostRow],
    worth_percent: float,
) -> Document:
    from vmdedup.hosts.planning import candidates, plan

    if action == "place":
        assert like is not None
        return candidates(table, like, answers, rows)
    return plan(table, inventory, answers, rows, worth_percent=worth_percent)


def _deliver(
    document: Document, form: Format, output: Path | None, rules: str | None, *, served: bool
) -> int:
    from vmdedup.hosts.documents import FleetPlan
    from vmdedup.hosts.rules import as_rules
    from vmdedup.hosts.show import as_text

    if rules is not None and isinstance(document, FleetPlan):
        text = as_rules(document.groups, rules)
    else:
        text = as_text(document, form)
    put(text, output)
    return DONE if served else FAILURE
