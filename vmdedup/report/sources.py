"""Where contents come from, as text: by VM, by pair of VMs.

Owns the layout and the names of sources. Promises to show the largest, and to sum up the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from vmdedup.models import ContentSources, PairPages, SourcePages
from vmdedup.report.console import make_console, make_table, print_table
from vmdedup.report.words import count, page_size, share

_MOST_ROWS = 12
_MOST_PAIRS = 10
_LARGEST_OF_PAIR = 3
NOT_KNOWN = "in no known source"


def source_name(row: SourcePages | PairPages) -> str:
    """The source and the part of it, short enough for a table."""
    if row.source is None:
        return NOT_KNOWN
    name = row.source.rstrip("/").rpartition("/")[2] or row.source
    return f"{name}: {row.part}" if row.part else name


def show_sources(found: ContentSources, console: Console | None = None) -> None:
    """How much is explained, a table for each VM, and a line for each pair."""
    console = console or make_console()
    console.print(
        Text.assemble(
            (share(found.explained_pages, found.shared_pages), "bold"),
            f" of the {page_size(found.shared_pages)} that have an equal page are explained;"
            " zero pages do not count",
        )
    )
    for each in found.known:
        console.print(Text(f"{each.path}: {each.kind}, {count(each.pages)} distinct pages"))
    for vm in found.vms:
        console.print()
        console.print(Text(f"{vm.name}: zero {page_size(vm.zero_pages)}", "bold"))
        table = make_table(["content from", "has an equal", "unique"])
        for row in vm.sources[:_MOST_ROWS]:
            sizes = page_size(row.shared_pages), page_size(row.unique_pages)
            table.add_row(Text(source_name(row)), *sizes)
        if rest := vm.sources[_MOST_ROWS:]:
            shared = sum(row.shared_pages for row in rest)
            unique = sum(row.unique_pages for row in rest)
            table.add_row("other sources", page_size(shared), page_size(unique))
        print_table(console, table)
    pairs = sorted(found.pairs, key=lambda pair: -_pages(pair.sources))
    if pairs:
        console.print()
    for pair in pairs[:_MOST_PAIRS]:
        console.print(Text(f"{' and '.join(pair.vms)}: {_of_pair(pair.sources)}"))


def _pages(rows: Sequence[PairPages]) -> int:
    return sum(row.pages for row in rows)


def _of_pair(rows: Sequence[PairPages]) -> str:
    """`120.0 MiB in common: 41.0% disk, 12.0% vmlinuz: kernel, as loaded, …`."""
    everything = _pages(rows)
    some = [f"{share(row.pages, everything)} {source_name(row)}" for row in rows[:_LARGEST_OF_PAIR]]
    return f"{page_size(everything)} in common{': ' if some else ''}{', '.join(some)}"
