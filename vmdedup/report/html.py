"""The sharing report as one HTML file that works offline.

Owns the page's content; its look is in `assets/`. The charts are drawn by Plotly's
JavaScript, taken from the installed `plotly` package (extra `html`) and put into the
file. Without that package every figure is there as a table, and the page says what to
install. Promises that opening the file fetches nothing (its Content-Security-Policy
forbids it) and that names and reasons from outside are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vmdedup.models import ContentSources, HistorySample, SharingReport, VmReport
from vmdedup.report.baseline import Comparison
from vmdedup.report.page import counters, facts, notes
from vmdedup.report.parts import PARTS, parts_in_use, ram_parts
from vmdedup.report.shipped import asset_path, plotly_path
from vmdedup.report.sources import pair_sources, short_source, source_name
from vmdedup.report.words import count, number_of, page_size, share, size
from vmdedup.units import PAGE_BYTES


def as_html(
    report: SharingReport,
    *,
    comparison: Comparison | None = None,
    history: Sequence[HistorySample] = (),
) -> str:
    """The page. `history`: a daemon's samples, the oldest first; without any it is left out."""
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
            facts=facts(report),
            counters=counters(report.host),
            notes=notes(report.vms),
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
    return asset_path(name).read_text("utf-8")


def plotly_script() -> str | None:
    """Plotly's JavaScript from its package; `None` if that is not installed."""
    script = plotly_path()
    return None if script is None else script.read_text("utf-8")


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
        "source_name": source_name,
        "pair_sources": pair_sources,
    }
    return environment


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _parts(vms: Sequence[VmReport]) -> list[dict[str, Any]]:
    """The parts of the RAM, each with its bytes in every VM."""
    every = [ram_parts(vm) for vm in vms]
    return [
        {"name": name, "means": PARTS[name], "bytes": [parts[name] for parts in every]}
        for name in parts_in_use(vms)
    ]


def _document(
    report: SharingReport, parts: list[dict[str, Any]], history: Sequence[HistorySample]
) -> dict[str, Any]:
    """The data that the charts are drawn from."""
    return {
        "names": [vm.name for vm in report.vms],
        "parts": parts,
        "matrix": report.matrix.model_dump(),
        "history": [sample.model_dump() for sample in history],
        "sources": None if report.sources is None else _sources(report.sources),
    }


def _sources(found: ContentSources) -> list[dict[str, Any]]:
    """The bytes of each VM by source, for the treemap."""
    return [
        {
            "name": vm.name,
            "sources": [
                {
                    "source": short_source(row.source),
                    "part": row.part,
                    "shared": row.shared_pages * PAGE_BYTES,
                    "unique": row.unique_pages * PAGE_BYTES,
                }
                for row in vm.sources
            ],
        }
        for vm in found.vms
    ]
