"""The views of a source in a terminal, with textual.

Owns the screen and its keys. The source is asked in a thread, one question at a
time: a daemon that is busy or gone never freezes the keys. Promises to go on
when the daemon ends and to find it again when it is back.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import ClassVar

from rich.console import JustifyMethod
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Static
from textual.worker import get_current_worker

from vmdedup.errors import VmdedupError
from vmdedup.report.console import STATUS_STYLE
from vmdedup.report.words import count, milliseconds, number_of, share, size
from vmdedup.top.view import COLUMNS, Row, View, ViewSource, ordered, orders

_FIRST_TO_GO = ("gates/s", "zero", "waiting", "VMAs", "merged", "%", "held")
"""Columns left out, in this order, if the terminal is too narrow for all."""
_SHORTEST_NAME = 16
_PADDING = 2
"""Columns that a cell takes beside its text."""

_HELP = """\
[b]Keys[/b]
 s  n  b  h  w  v   sort by saved, name, breaks/s, held, waiting, VMAs
 r                  reverse the order
 + -                update less, more often
 space              pause, go on
 left right         pause, one sample back or on (--replay)
 ?                  this help
 q                  quit

[b]Columns[/b]
 held      memory that the VM would hold without vmdedup
 saved     its fair share; all VMs' sum is the host's
 merged    pages on store pages       zero      pages on the zero page
 broken    merged, written since      breaks/s  such writes a second
 gates/s   batches merged or unmerged a second
 waiting   mergeable pages that wait for VMAs

[b]Top[/b]
 scan      pages looked at a second   CPU  engine, guardian, API server
 p99 gate  time a writer is held, 99th percentile of the latest gates
"""


class Help(ModalScreen[None]):
    """The keys and the columns."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q,enter,space", "app.pop_screen", "close")
    ]

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(_HELP)


class TopApp(App[None]):
    """`vmdedup top`."""

    CSS = """
    #head { height: auto; padding: 0 1; }
    DataTable { height: 1fr; }
    #note { height: auto; padding: 0 1; color: $text-warning; }
    Help { align: center middle; }
    Help VerticalScroll { width: 76; max-width: 100%; height: auto; max-height: 100%;
        background: $surface; border: round $primary; padding: 0 1; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "order('saved')", "saved"),
        Binding("n", "order('name')", "name"),
        Binding("b", "order('breaks')", "breaks"),
        Binding("h", "order('held')", "held", show=False),
        Binding("w", "order('waiting')", "waiting", show=False),
        Binding("v", "order('vmas')", "VMAs", show=False),
        Binding("r", "reverse", "reverse"),
        Binding("plus,equals_sign", "interval(2.0)", "slower", show=False),
        Binding("minus", "interval(0.5)", "faster", show=False),
        Binding("space", "pause", "pause"),
        # Before the table, which would scroll.
        Binding("left", "step(-1)", "back", priority=True),
        Binding("right", "step(1)", "on", priority=True),
        Binding("question_mark", "help", "help", key_display="?"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(
        self, source: ViewSource, *, interval_s: float = 2.0, order: str = "saved"
    ) -> None:
        super().__init__()
        self.source = source
        self.interval_s = interval_s
        self.order = order
        self.is_reversed = False
        self.is_paused = False
        self.view: View | None = None
        self.trouble: str | None = None
        self._ended = threading.Event()
        self._steps: queue.SimpleQueue[int] = queue.SimpleQueue()
        """Steps that a key asks of the thread; 0 makes it wait anew, by the present interval."""

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield DataTable(id="vms", cursor_type="row", zebra_stripes=True)
        yield Static(id="note")
        yield Footer()

    def on_mount(self) -> None:
        self._follow()

    def on_unmount(self) -> None:
        self._ended.set()
        self._steps.put(0)

    @work(thread=True, exclusive=True)
    def _follow(self) -> None:
        """Ask the source until the end, in a thread of its own."""
        worker = get_current_worker()
        steps = 1
        while not (worker.is_cancelled or self._ended.is_set()):
            began = time.monotonic()
            if steps:
                try:
                    shown = self.source.look(steps)
                except VmdedupError as error:
                    self._tell(None, str(error))
                else:
                    self._tell(shown, None)
            try:
                rest_s = self.interval_s - (time.monotonic() - began)
                steps = self._steps.get(timeout=max(0.1, rest_s))
            except queue.Empty:
                steps = 0 if self.is_paused else 1

    def _tell(self, shown: View | None, trouble: str | None) -> None:
        if not self._ended.is_set():
            self.call_from_thread(self._show, shown, trouble)

    def _show(self, shown: View | None, trouble: str | None) -> None:
        """Take over a look; after a failed one the last stays on the screen."""
        self.view = shown or self.view
        self.trouble = trouble
        self.redraw()

    def on_resize(self) -> None:
        self.call_after_refresh(self.redraw)

    def redraw(self) -> None:
        """Draw the last look, in the present width and order."""
        if not self.is_running or not self.screen_stack:
            return
        main = self.screen_stack[0]
        head, note = main.query_one("#head", Static), main.query_one("#note", Static)
        note.update(self._note())
        note.display = bool(self._note())
        if self.view is None:
            head.update(f"vmdedup top: {self.source.title}")
            return
        head.update(_head(self.view, self.order, self.is_reversed, self.interval_s))
        self._fill(main.query_one("#vms", DataTable), self.view)

    def _note(self) -> str:
        if self.trouble is not None:
            return f"{self.trouble} (trying again)"
        if self.view is not None and self.view.is_last:
            return "this is the last sample"
        return "paused: space goes on" if self.is_paused else ""

    def _fill(self, table: DataTable[Text], shown: View) -> None:
        rows = [_cells(row) for row in ordered(shown.rows, self.order, reverse=self.is_reversed)]
        columns = [name for name in COLUMNS if name in self.source.columns]
        headers = {name: name + self._mark(name) for name in columns}
        widths = _fitting(headers, rows, self.size.width)
        cursor, scrolled = table.cursor_row, table.scroll_y
        table.clear(columns=True)
        for name, width in widths.items():
            side: JustifyMethod = "left" if name == "VM" else "right"
            table.add_column(Text(headers[name], justify=side), width=width)
        for cells in rows:
            for name, width in widths.items():
                cells[name].truncate(width, overflow="ellipsis")
            table.add_row(*(cells[name] for name in widths))
        table.move_cursor(row=cursor, animate=False)
        table.scroll_to(y=scrolled, animate=False)

    def _mark(self, column: str) -> str:
        if COLUMNS[column] != self.order:
            return ""
        return "▲" if self.is_reversed else "▼"

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """A click on a column sorts by it."""
        order = COLUMNS.get(event.label.plain.rstrip("▲▼"))
        if order is not None:
            self.action_order(order)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Whether a key has an effect with this source."""
        if action == "step":
            return self.source.has_steps and len(self.screen_stack) == 1
        if action == "order":
            return parameters[0] in orders(self.source.columns)
        return True

    def action_order(self, order: str) -> None:
        """Sort by `order`; a second time, in reverse."""
        self.is_reversed = not self.is_reversed if order == self.order else False
        self.order = order
        self.redraw()

    def action_reverse(self) -> None:
        """Reverse the order."""
        self.is_reversed = not self.is_reversed
        self.redraw()

    def action_interval(self, factor: float) -> None:
        """Multiply the interval between looks by `factor`, within limits."""
        self.interval_s = min(60.0, max(self.source.shortest_s, self.interval_s * factor))
        self._steps.put(0)
        self.redraw()

    def action_pause(self) -> None:
        """Stop looking, or go on."""
        self.is_paused = not self.is_paused
        self._steps.put(0 if self.is_paused else 1)
        self.redraw()

    def action_step(self, steps: int) -> None:
        """Show the sample so many steps on, or back, and stay there."""
        self.is_paused = True
        self._steps.put(steps)

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Help())


def _head(shown: View, order: str, is_reversed: bool, interval_s: float) -> Text:
    saved_bytes, held_bytes, rates = shown.saved_bytes, shown.held_bytes, shown.rates
    first = Text.assemble(
        (f"{size(saved_bytes)} saved", "bold green" if saved_bytes else "bold"),
        f" of {size(held_bytes)} ({share(saved_bytes, held_bytes)}),"
        f" {number_of(len(shown.rows), 'VM')}; {shown.when}",
    )
    scan = ""
    if shown.full_scans is not None:
        scan = f"scan {_per_second(rates.scanned)} pages/s, {count(shown.full_scans)} full scans; "
    overhead = "" if shown.overhead_bytes is None else f"; overhead {size(shown.overhead_bytes)}"
    second = (
        f"{scan}breaks {_per_second(rates.breaks)}/s; gates {_per_second(rates.gates)}/s,"
        f" p99 gate {milliseconds(shown.gate_p99_ms)}{overhead}"
    )
    way = ", reversed" if is_reversed else ""
    third = f"sorted by {order}{way}; every {interval_s:g} s; ? is help"
    return Text("\n").join([first, Text(second), Text(third, style="dim")])


def _fitting(headers: dict[str, str], rows: list[dict[str, Text]], width: int) -> dict[str, int]:
    """The columns that fit, with their widths: the name gives way first, then whole columns."""
    widths = {
        name: max([len(header), *(cells[name].cell_len for cells in rows)])
        for name, header in headers.items()
    }
    longest = widths.pop("VM")
    for column in _FIRST_TO_GO:
        if _room(widths, width) >= min(longest, _SHORTEST_NAME):
            break
        widths.pop(column, None)
    return {"VM": max(4, min(longest, _room(widths, width))), **widths}


def _room(widths: dict[str, int], width: int) -> int:
    """Columns left for the name, beside a scroll bar."""
    return width - sum(widths.values()) - _PADDING * (len(widths) + 1) - 2


def _cells(row: Row) -> dict[str, Text]:
    numbers = {
        "held": size(row.held_bytes),
        "saved": size(row.saved_bytes),
        "%": share(row.saved_bytes, row.held_bytes),
        "merged": count(row.merged_pages),
        "zero": count(row.zero_pages),
        "broken": count(row.broken_pages),
        "breaks/s": _per_second(row.breaks),
        "gates/s": _per_second(row.gates),
        "waiting": count(row.waiting_pages),
        "VMAs": count(row.vmas),
    }
    cells = {column: Text(number, justify="right") for column, number in numbers.items()}
    style = STATUS_STYLE[row.status] if row.status else ""
    status = Text(row.status or "-", style=style, justify="right")
    return {"VM": Text(row.name), "status": status, **cells}


def _per_second(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:,.0f}" if rate >= 10 or rate == 0 else f"{rate:.1f}"
