"""The console that tables are printed on, and how our tables look.

Owns width and style: colour only on a terminal, 100 columns without one. Names and
reasons from outside are never taken for markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vmdedup.models import VmStatus

_COLUMNS_WITHOUT_TERMINAL = 100
_WIDEST = 1000
SHORTEST_NAME = 7
"""Least columns for a name, however narrow the terminal."""
STATUS_STYLE: Mapping[VmStatus, str] = {
    "merged": "green",
    "scanning": "yellow",
    "failed": "red",
    "refused": "red",
    "gone": "red",
}


def make_console(stream: TextIO | None = None) -> Console:
    """A console on `stream`, by default stdout."""
    console = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = _COLUMNS_WITHOUT_TERMINAL
    return console


def make_table(columns: Sequence[str], *, texts: int = 1, footer: Sequence[str] = ()) -> Table:
    """A table whose first `texts` columns are text, all others numbers.

    Only the first column, the name, shrinks if there is too little room: it
    wraps, so that neither a name nor a number is ever cut off.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        show_footer=bool(footer),
        header_style="bold",
        footer_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, header in enumerate(columns):
        table.add_column(
            header,
            footer[index] if footer else "",
            justify="left" if index < texts else "right",
            no_wrap=index > 0,
            overflow="fold",
        )
    return table


def print_table(console: Console, table: Table) -> None:
    """Print it with all of its columns: a narrower terminal breaks its lines."""
    options = console.options.update(width=_WIDEST)
    needed = 2 * (len(table.columns) - 1)
    for column in table.columns:
        cells = [column.header, column.footer, *column.cells]
        longest = max(Measurement.get(console, options, cell).maximum for cell in cells)
        if not column.no_wrap:
            column.min_width = longest = min(SHORTEST_NAME, longest)
        needed += longest
    width = console.width
    console.width = max(width, needed)
    console.print(table)
    console.width = width


def print_notes(console: Console, notes: Sequence[tuple[str, str]]) -> None:
    """Lines of `name: text` below a table, the text wrapped under itself."""
    if not notes:
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=24, style="bold")
    table.add_column(overflow="fold")
    for name, note in notes:
        table.add_row(Text(name), Text(note))
    console.print(table)
