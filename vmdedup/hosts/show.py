"""The fleet's documents as text: a table, Markdown, a page, JSON.

Owns the layout: one list of tables for all formats. Promises that names and reasons from
other hosts are text wherever they are shown.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from vmdedup.hosts.documents import (
    FleetCandidates,
    FleetPlan,
    FleetReport,
    FleetSimilarity,
    HostRow,
    VmPlace,
)
from vmdedup.report.files import Format
from vmdedup.report.words import count, number_of, share, size

Document = FleetReport | FleetSimilarity | FleetPlan | FleetCandidates

_SHOWN_VMS = 8
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>vmdedup fleet</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
table {{ border-collapse: collapse; display: block; margin: 1em 0; overflow-x: auto }}
td, th {{ border-bottom: 1px solid #8885; padding: .2em .8em; text-align: right }}
td:first-child, th:first-child, .text {{ text-align: left }}
</style></head><body><h1>{headline}</h1>
{tables}
</body></html>
"""


@dataclass(frozen=True)
class _Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    """How many of the first columns are text."""


def as_text(document: Document, form: Format) -> str:
    """The document in this format, ending in a newline."""
    if form == "json":
        return document.model_dump_json(indent=2) + "\n"
    headline, tables = _laid_out(document)
    headline = _line(headline)
    tables = [_shown(table) for table in tables if table.rows]
    if form == "markdown":
        return "\n\n".join([f"**{headline}**", *map(_markdown, tables)]) + "\n"
    if form == "html":
        return _PAGE.format(headline=escape(headline), tables="\n".join(map(_html, tables)))
    return _plain(headline, tables)


def _laid_out(document: Document) -> tuple[str, list[_Table]]:
    match document:
        case FleetReport():
            return _report(document)
        case FleetSimilarity():
            return _similarity(document)
        case FleetPlan():
            return _plan(document)
        case FleetCandidates():
            return _candidates(document)


def _report(report: FleetReport) -> tuple[str, list[_Table]]:
    headline = (
        f"{size(report.saved_bytes)} saved of {size(report.present_bytes)} held by"
        f" {number_of(report.vms, 'VM')} on {number_of(len(report.hosts), 'host')}"
        f" ({share(report.saved_bytes, report.present_bytes)})"
    )
    rows = [
        [
            each.host,
            count(each.vms),
            size(each.present_bytes),
            size(each.saved_bytes),
            share(each.saved_bytes, each.present_bytes),
        ]
        for each in report.hosts
    ]
    return headline, [_Table(["host", "VMs", "held", "saved", "%"], rows), _reasons(report.hosts)]


def _similarity(found: FleetSimilarity) -> tuple[str, list[_Table]]:
    headline = (
        f"{number_of(len(found.kinds), 'kind')} of VMs that are alike"
        f" (one content in {found.rate} compared)"
    )
    kinds = [
        [str(number), each.trust_domain, _names(each.vms), count(len(each.vms))]
        for number, each in enumerate(found.kinds, 1)
    ]
    pairs = [
        [
            _name(each.one),
            _name(each.other),
            f"{size(each.shared_bytes)} ± {size(each.error_bytes)}",
            f"{100 * each.of_one:.0f}%",
            f"{100 * each.of_other:.0f}%",
        ]
        for each in found.pairs
    ]
    return headline, [
        _Table(["kind", "trust domain", "VMs", "number"], kinds, texts=3),
        _Table(["VM", "and VM", "both have", "of one", "of other"], pairs, texts=2),
        _reasons(found.hosts),
    ]


def _plan(plan: FleetPlan) -> tuple[str, list[_Table]]:
    headline = (
        f"{number_of(len(plan.moves), 'move')} of {size(plan.moved_bytes)} would save"
        f" {size(plan.saved_bytes)} ± {size(plan.error_bytes)} more"
    )
    moves = [[each.vm, each.source, each.target, size(each.moved_bytes)] for each in plan.moves]
    others = [
        ["this plan", size(plan.saved_bytes)],
        ["no placement more than", size(plan.most_bytes)],
        ["by name", size(plan.by_name_bytes)],
        ["at random", size(plan.random_bytes)],
    ]
    return headline, [
        _Table(["VM", "from", "to", "moved"], moves, texts=3),
        _Table(["placement", "saves more"], others),
        _reasons(plan.hosts),
    ]


def _candidates(found: FleetCandidates) -> tuple[str, list[_Table]]:
    rows = [
        [
            each.host,
            "yes" if each.has_room else "no",
            f"{size(each.shared_bytes)} ± {size(each.error_bytes)}",
        ]
        for each in found.candidates
    ]
    headline = f"Hosts for one more VM like {_name(found.like)}"
    return headline, [
        _Table(["host", "room", "shared there"], rows, texts=2),
        _reasons(found.hosts),
    ]


def _reasons(hosts: Sequence[HostRow]) -> _Table:
    rows = [[each.host, each.reason] for each in hosts if each.reason]
    return _Table(["host", "not counted because"], rows, texts=2)


def _name(vm: VmPlace) -> str:
    return f"{vm.host}/{vm.vm}"


def _names(vms: Sequence[VmPlace]) -> str:
    shown = [_name(vm) for vm in vms[:_SHOWN_VMS]]
    rest = len(vms) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _plain(headline: str, tables: Sequence[_Table]) -> str:
    from rich.text import Text

    from vmdedup.report.console import make_console, make_table, print_table

    out = io.StringIO()
    console = make_console(out)
    console.print(Text(headline))
    for each in tables:
        table = make_table(each.columns, texts=each.texts)
        for row in each.rows:
            table.add_row(*map(Text, row))
        console.print()
        print_table(console, table)
    return out.getvalue()


def _shown(table: _Table) -> _Table:
    return _Table(table.columns, [list(map(_line, row)) for row in table.rows], table.texts)


def _line(text: str) -> str:
    """The text on one line, without what a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in text)


def _markdown(table: _Table) -> str:
    from vmdedup.report.markdown import escaped, table_of

    return table_of(table.columns, [map(escaped, row) for row in table.rows], texts=table.texts)


def _html(table: _Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        shown = [
            f'<{tag} class="text">{escape(cell)}</{tag}>'
            if number < table.texts
            else f"<{tag}>{escape(cell)}</{tag}>"
            for number, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(shown)}</tr>"

    return "\n".join(
        ["<table>", row(table.columns, "th"), *(row(each, "td") for each in table.rows), "</table>"]
    )
