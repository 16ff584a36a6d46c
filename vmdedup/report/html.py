"""The sharing report as one HTML file that works offline.

Owns the page's content; its look is in `assets/`. The charts are drawn by
Plotly's JavaScript, taken from the installed `plotly` package (extra `html`) and
put into the file. Without that package every figure is there as a table, and
the page says what to install. Promises that nothing is fetched when the file is
opened (its Content-Security-Policy forbids it) and that names and reasons from
outside are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vmdedup.models import HistorySample, HostReport, SharingReport, VmReport
from vmdedup.report.baseline import Comparison
from vmdedup.report.parts import PARTS, parts_in_use, ram_parts
from vmdedup.report.words import count, milliseconds, number_of, page_size, share, size


def as_html(
    report: SharingReport,
    *,
    comparison: Comparison | None = None,
    history: Sequence[HistorySample] = (),
) -> str:
    """The page. `history`: what a daemon has noted, the oldest first; none leaves it out."""
    present_bytes = sum(vm.present_bytes for vm in report.vms)
    parts = _parts(report.vms)
    plotly = plotly_script()
    page: str = (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            comparison=comparison,
            history=history,
            parts=parts,
            saved=size(report.host.saved_bytes),
            present=size(present_bytes),
            percent=share(report.host.saved_bytes, present_bytes),
            vm_number=number_of(len(report.vms), "VM"),
            facts=_facts(report.host),
            counters=_counters(report.host),
            notes=_notes(report.vms),
            document=_document(report, parts, history),
            css=Markup(asset("page.css")),
            figures=Markup(asset("figures.js")),
            plotly=None if plotly is None else Markup(plotly),
            version=version("vmdedup"),
            made=_moment(datetime.now(UTC).timestamp()) + " UTC",
        )
    )
    return page


def asset(name: str) -> str:
    """A file of `assets/`, ours and therefore trusted."""
    return resources.files(__package__).joinpath("assets", name).read_text("utf-8")


def plotly_script() -> str | None:
    """Plotly's JavaScript from its package, without importing that; None when not installed."""
    from importlib.util import find_spec

    found = find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        return None
    script = resources.files("plotly").joinpath("package_data", "plotly.min.js")
    return script.read_text("utf-8") if script.is_file() else None


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vmdedup.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "size": size,
        "count": count,
        "share": share,
        "page_size": page_size,
        "moment": _moment,
    }
    return environment


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _parts(vms: Sequence[VmReport]) -> list[dict[str, Any]]:
    """The parts that RAM is in, each with its bytes in every VM."""
    every = [ram_parts(vm) for vm in vms]
    return [
        {"name": name, "means": PARTS[name], "bytes": [parts[name] for parts in every]}
        for name in parts_in_use(vms)
    ]


def _document(
    report: SharingReport, parts: list[dict[str, Any]], history: Sequence[HistorySample]
) -> dict[str, Any]:
    """What the charts are drawn from."""
    return {
        "names": [vm.name for vm in report.vms],
        "parts": parts,
        "matrix": report.matrix.model_dump(),
        "history": [sample.model_dump() for sample in history],
    }


def _facts(host: HostReport) -> list[tuple[str, str]]:
    facts = [
        ("pages saved by sharing", count(host.pages_sharing)),
        ("pages saved as zero", count(host.zero_pages)),
        ("store pages", count(host.pages_shared)),
        ("broken by writes", count(host.cow_broken_pages)),
    ]
    if host.overhead_bytes is not None:
        facts.append(("overhead", size(host.overhead_bytes)))
    if host.gate_ms.count:
        facts.append((f"p99 of {host.gate_ms.count:,} gates", milliseconds(host.gate_ms.p99)))
    if host.stopped_ms is not None:
        facts.append(("VMs paused for", milliseconds(host.stopped_ms)))
    return facts


def _counters(host: HostReport) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in HostReport.model_fields.items():
        value = getattr(host, name)
        if name.endswith("_bytes"):
            shown = "-" if value is None else size(value)
        elif value is None or isinstance(value, int):
            shown = count(value)
        elif isinstance(value, float):
            shown = milliseconds(value)
        else:
            marks = f"p50 {milliseconds(value.p50)}, p99 {milliseconds(value.p99)}"
            shown = f"{value.count:,}: {marks}" if value.count else "-"
        rows.append((name, shown, field.description or ""))
    return rows


def _notes(vms: Sequence[VmReport]) -> list[tuple[VmReport, str, str]]:
    rows: list[tuple[VmReport, str, str]] = []
    for vm in vms:
        if vm.reason:
            kind = vm.status if vm.status in ("refused", "gone") else "waiting"
            rows.append((vm, kind, vm.reason))
        if vm.hint:
            rows.append((vm, "hint", vm.hint))
    return rows
