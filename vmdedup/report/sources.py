"""Where contents come from, as text: by VM, by pair of VMs.

Owns the layout and the names of sources. Promises to show the largest, and to sum up the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from vmdedup.models import ContentSources, KnownSource, PairPages, PairSources, SourcePages
from vmdedup.report.console import make_console, make_table, print_table
from vmdedup.report.words import count, number_of, page_size, share

_MOST_ROWS = 12
MOST_PAIRS = 10
_LARGEST_OF_PAIR = 3
NOT_KNOWN = "in no known source"


def source_name(row: SourcePages | PairPages) -> str:
    """The source and the part of it, short enough for a table."""
    name = short_source(row.source)
    return f"{name}: {part_name(row)}" if row.part else name


def short_source(source: str | None) -> str:
    """The last name of a source's path."""
    if source is None:
        return NOT_KNOWN
    return source.rstrip("/").rpartition("/")[2] or source


def part_name(row: SourcePages | PairPages) -> str:
    """The part of the source, for people."""
    return f"{row.part}…" if row.part.endswith("/") else row.part


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
        console.print(Text(_about(each)))
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
    if found.pairs:
        console.print()
    for pair in found.pairs[:MOST_PAIRS]:
        console.print(Text(f"{' and '.join(pair.vms)}: {pair_sources(pair)}"))


def _pages(rows: Sequence[PairPages]) -> int:
    return sum(row.pages for row in rows)


def _about(known: KnownSource) -> str:
    """`/images/disk: disk image, 158,844 distinct pages, 5,678 files`."""
    names = number_of(known.parts, "name") + " inside" if known.parts else "no names inside"
    return f"{known.path}: {known.kind}, {count(known.pages)} distinct pages, {names}"


def pair_sources(pair: PairSources) -> str:
    """`120.0 MiB in common: 41.0% disk (usr/bin/python3.11 12.0%, …), 33.0% vmlinuz (…), …`."""
    everything = _pages(pair.sources)
    by_source: dict[str | None, list[PairPages]] = {}
    for row in pair.sources:
        by_source.setdefault(row.source, []).append(row)
    ordered = sorted(by_source.values(), key=lambda some: -_pages(some))
    parts = [_of_source(some, everything) for some in ordered]
    return f"{page_size(everything)} in common{': ' if parts else ''}{', '.join(parts)}"


def _of_source(rows: Sequence[PairPages], everything: int) -> str:
    named = [
        f"{part_name(row)} {share(row.pages, everything)}"
        for row in rows[:_LARGEST_OF_PAIR]
        if row.part
    ]
    inside = f" ({', '.join(named)})" if named else ""
    return f"{share(_pages(rows), everything)} {short_source(rows[0].source)}{inside}"
