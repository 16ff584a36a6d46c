"""A report as text of a given format, and its way into a file.

Owns the names of the formats. Promises that a file is complete or absent: it is
written beside its place and renamed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from vmdedup.errors import UsageError

if TYPE_CHECKING:
    from vmdedup.models import HistorySample, SharingReport
    from vmdedup.report.baseline import Comparison

Format = Literal["table", "json", "markdown", "html"]
FORMATS: tuple[str, ...] = get_args(Format)
ENDINGS: Mapping[str, Format] = {".json": "json", ".md": "markdown", ".html": "html"}
"""The formats that the ending of a file's name asks for."""


def as_text(
    report: SharingReport,
    form: Format,
    *,
    comparison: Comparison | None = None,
    history: Sequence[HistorySample] = (),
) -> str:
    """The report in this format, without colour, ending in a newline."""
    if form == "json":
        return report.model_dump_json(indent=2) + "\n"
    if form == "markdown":
        from vmdedup.report.markdown import as_markdown

        return as_markdown(report, comparison)
    if form == "html":
        from vmdedup.report.html import as_html

        return as_html(report, comparison=comparison, history=history)
    from vmdedup.report.console import make_console
    from vmdedup.report.table import show_report

    out = io.StringIO()
    show_report(report, make_console(out), comparison)
    return out.getvalue()


def write_file(path: Path, text: str) -> None:
    """As `write_bytes`. Raises UsageError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path`; write into a device or a pipe. Raises UsageError."""
    if path.exists() and not path.is_file():
        _write_through(path, content)
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UsageError(f"{path}: {error.strerror or error}") from error


def _write_through(path: Path, content: bytes) -> None:
    try:
        with path.open("wb") as stream:
            stream.write(content)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
