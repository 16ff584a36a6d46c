"""The sharing report as Markdown, for a CI job's summary or a merge request.

Owns the layout: tables of GitHub and GitLab, and nothing that one of them does
not show. Promises that names and reasons from outside are text: they cannot
open a table cell, a tag or a link.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vmdedup.models import ContentSources, KsmComparison, MemoryPlace, SharingReport, VmReport
from vmdedup.report import memory
from vmdedup.report.baseline import Comparison
from vmdedup.report.sources import MOST_PAIRS, pair_sources, source_name
from vmdedup.report.words import cold_words, count, milliseconds, number_of, page_size, share, size

_MATRIX_VMS = 12
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")


def as_markdown(report: SharingReport, comparison: Comparison | None = None) -> str:
    """The report, ending in a newline."""
    blocks = [_headline(report), _vm_table(report.vms), *_notes(report.vms)]
    if comparison is not None:
        blocks.append(_comparison(comparison))
    if report.ksm is not None:
        blocks.append(_ksm(report.ksm))
    blocks.append(_counters(report))
    if len(report.matrix.vms) > 1 and len(report.matrix.vms) <= _MATRIX_VMS:
        blocks.append(_matrix(report))
    if report.sources is not None:
        blocks.append(_sources(report.sources))
    if report.contents:
        blocks.append(_contents(report))
    return "\n\n".join(blocks) + "\n"


def escaped(text: str) -> str:
    """`text` as Markdown that shows exactly that, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())) or "-"


def table_of(columns: Sequence[str], rows: Iterable[Iterable[str]], *, texts: int = 1) -> str:
    """A table of cells that are Markdown, of which the first `texts` of each row are text."""
    rule = ["---" if number < texts else "---:" for number in range(len(columns))]
    lines = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _headline(report: SharingReport) -> str:
    host = report.host
    present = sum(vm.present_bytes for vm in report.vms)
    line = (
        f"**{size(host.saved_bytes)} saved** of {size(present)} held by"
        f" {number_of(len(report.vms), 'VM')} ({share(host.saved_bytes, present)})"
    )
    if report.converged is not None:
        line += "; converged" if report.converged else "; not converged yet"
    if cold := cold_words(host):
        line += f"; {cold}"
    lines = [line, *(_memory_line(place) for place in memory.shown(report.memory))]
    return "### vmdedup\n\n" + "\n\n".join(lines)


def _memory_line(place: MemoryPlace) -> str:
    text = escaped(memory.line(place))
    return f"**{text}**" if place.is_lacking else text


def _vm_table(vms: Sequence[VmReport]) -> str:
    columns = ["VM", "status", "RAM", "held", "merged", "zero", "broken", "waiting", "saved", ""]
    rows = [
        [
            escaped(vm.name),
            vm.status,
            size(vm.ram_bytes),
            size(vm.present_bytes),
            count(vm.merged_pages),
            count(vm.zero_pages),
            count(vm.cow_broken_pages),
            count(vm.deferred_pages),
            size(vm.saved_bytes),
            share(vm.saved_bytes, vm.present_bytes),
        ]
        for vm in vms
    ]
    known = [vm.deferred_pages for vm in vms if vm.deferred_pages is not None]
    present, saved = sum(vm.present_bytes for vm in vms), sum(vm.saved_bytes for vm in vms)
    total = [
        "all",
        "",
        size(sum(vm.ram_bytes for vm in vms)),
        size(present),
        count(sum(vm.merged_pages for vm in vms)),
        count(sum(vm.zero_pages for vm in vms)),
        count(sum(vm.cow_broken_pages for vm in vms)),
        count(sum(known)) if known else "-",
        size(saved),
        share(saved, present),
    ]
    bold = [f"**{cell}**" if cell else "" for cell in total]
    return table_of(columns, [*rows, bold] if len(vms) > 1 else rows, texts=2)


def _notes(vms: Sequence[VmReport]) -> list[str]:
    lines = [
        f"- **{escaped(vm.name)}**: {escaped(text)}"
        for vm in vms
        for text in (vm.reason, vm.hint)
        if text
    ]
    return ["\n".join(lines)] if lines else []


def _comparison(comparison: Comparison) -> str:
    rows = [
        [
            escaped(each.name) + (" (shares less)" if each.shares_less else ""),
            f"{each.before.percent:.1f}%",
            f"{each.now.percent:.1f}%",
            f"{each.points:+.1f}",
            size(each.now.saved_bytes - each.before.saved_bytes),
        ]
        for each in (*comparison.vms, comparison.host)
    ]
    lines = [table_of(["against the baseline", "before", "now", "points", "saved"], rows)]
    if comparison.missing:
        lines.append("not there any more: " + ", ".join(map(escaped, comparison.missing)))
    if comparison.new:
        lines.append("new: " + ", ".join(map(escaped, comparison.new)))
    return "\n\n".join(lines)


def _ksm(ksm: KsmComparison) -> str:
    rows = [
        [
            escaped(vm.name),
            count(vm.scanned_pages),
            count(vm.merging_pages),
            count(vm.zero_pages),
            size(vm.saved_bytes),
            size(vm.vmdedup_saved_bytes),
        ]
        for vm in ksm.vms
    ]
    line = f"KSM would save {size(ksm.saved_bytes)}, vmdedup {size(ksm.vmdedup_saved_bytes)}."
    columns = ["VM", "private pages", "merging", "zero", "KSM saves", "vmdedup saves"]
    return "\n\n".join([line, table_of(columns, rows), *map(escaped, ksm.notes)])


def _counters(report: SharingReport) -> str:
    host = report.host
    rows = [
        ["pages\\_shared", count(host.pages_shared)],
        ["pages\\_sharing", count(host.pages_sharing)],
        ["zero\\_pages", count(host.zero_pages)],
        ["cow\\_broken\\_pages", count(host.cow_broken_pages)],
        ["pages\\_unshared", count(host.pages_unshared)],
        ["pages\\_volatile", count(host.pages_volatile)],
        ["full\\_scans", count(host.full_scans)],
        ["gates", f"{host.gate_ms.count:,}, p99 {milliseconds(host.gate_ms.p99)}"],
        ["VMs paused for", milliseconds(host.stopped_ms)],
    ]
    return _folded("Counters", table_of(["counter", ""], rows))


def _matrix(report: SharingReport) -> str:
    matrix = report.matrix
    numbers = [str(number + 1) for number in range(len(matrix.vms))]
    rows = [
        [f"{number} {escaped(name)}", *map(count, row)]
        for number, name, row in zip(numbers, matrix.vms, matrix.pages, strict=True)
    ]
    return _folded("Distinct contents that both VMs map", table_of(["", *numbers], rows))


def _sources(found: ContentSources) -> str:
    rows = [
        [
            escaped(vm.name),
            escaped(source_name(row)),
            page_size(row.shared_pages),
            page_size(row.unique_pages),
        ]
        for vm in found.vms
        for row in vm.sources
    ]
    part = share(found.explained_pages, found.shared_pages)
    table = table_of(["VM", "content from", "has an equal", "unique"], rows, texts=2)
    pairs = [
        [escaped(" and ".join(pair.vms)), escaped(pair_sources(pair))]
        for pair in found.pairs[:MOST_PAIRS]
    ]
    if pairs:
        table += "\n\n" + table_of(["VMs", "contents that both have"], pairs, texts=2)
    return _folded(f"Where contents come from ({part} explained)", table)


def _contents(report: SharingReport) -> str:
    rows = [
        [escaped(each.what or "-"), count(each.pages), count(each.store_pages), count(each.vms)]
        for each in report.contents
    ]
    table = table_of(["content", "guest pages", "store pages", "VMs"], rows)
    return _folded("Most repeated contents", table)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
