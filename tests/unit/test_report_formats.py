"""Markdown, HTML and comparisons: whole, escaped, and with the same figures everywhere."""

from __future__ import annotations

import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_report import GIB, sharing, vm_report
from vmdedup.core.content_kinds import describe
from vmdedup.errors import UsageError
from vmdedup.models import (
    ContentSources,
    HistorySample,
    KnownSource,
    KsmComparison,
    KsmVm,
    PairPages,
    PairSources,
    RepeatedContent,
    SharingReport,
    SourcePages,
    VmSources,
)
from vmdedup.report import html
from vmdedup.report.baseline import compare
from vmdedup.report.console import make_console
from vmdedup.report.files import FORMATS, as_text, write_file
from vmdedup.report.html import as_html
from vmdedup.report.markdown import as_markdown, escaped
from vmdedup.report.parts import PARTS, parts_in_use, ram_parts
from vmdedup.report.table import show_report

pytestmark = pytest.mark.unit

EVIL = "<script>alert(1)</script> | `a` [b](c) {{ 7*7 }}"


@pytest.fixture
def report() -> SharingReport:
    vms = [
        vm_report("web", "merged", "345,678 mergeable pages wait for VMAs"),
        vm_report(EVIL, "refused", f"reason {EVIL}"),
    ]
    zero = RepeatedContent(pages=1000, store_pages=0, vms=2, what="zero")
    other = RepeatedContent(pages=500, store_pages=3, vms=1, what=None)
    return sharing(vms).model_copy(update={"contents": [zero, other]})


class Page(HTMLParser):
    """The tags of a page, its text, and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in = tag
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.text += data


def test_markdown_is_tables_that_nothing_breaks(report: SharingReport) -> None:
    text = as_markdown(report)
    assert "<script>" not in text
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1
    assert "| **all** |" in text
    assert "90.0 GiB saved" in text
    assert "345,678 mergeable pages" in text


def test_markdown_escapes_to_one_line() -> None:
    assert escaped("a\n| b") == r"a \| b"
    assert escaped("") == "-"


def test_html_shows_outside_text_as_text(report: SharingReport) -> None:
    page = Page(as_html(report))
    assert page.text.count(EVIL) >= 2
    assert page.links == []
    assert "alert(1)" not in "".join(page.scripts[1:])
    assert "Content-Security-Policy" in as_html(report)


def test_html_has_everything(report: SharingReport) -> None:
    samples = [
        HistorySample(unix_s=1_790_000_000 + at, saved_bytes=at << 20, present_bytes=GIB, vms=2)
        for at in range(3)
    ]
    document = as_html(report, history=samples, comparison=compare(report, report, 5))
    page = Page(document)
    for words in ("Where each VM's RAM is", "Which VMs share", "Most repeated contents"):
        assert words in page.text
    for words in ("Refused", "Saved memory over time", "Against the baseline", "All counters"):
        assert words in page.text
    for name in SharingReport.model_fields["host"].annotation.model_fields:  # type: ignore[union-attr]
        assert name in page.text
    shown = json.loads(page.scripts[0])
    assert shown["names"] == ["web", EVIL]
    assert [part["name"] for part in shown["parts"]] == parts_in_use(report.vms)
    assert len(shown["history"]) == 3
    assert "Plotly" in page.scripts[1]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_shows_what_a_look_at_contents_adds(report: SharingReport, form: str) -> None:
    ksm = KsmComparison(
        max_page_sharing=256,
        use_zero_pages=False,
        pages_shared=1,
        pages_sharing=2,
        zero_pages=0,
        saved_bytes=7 << 20,
        general_profit=6 << 20,
        vmdedup_saved_bytes=8 << 20,
        vms=[
            KsmVm(
                name=EVIL,
                pid=1,
                scanned_pages=1234,
                merging_pages=3,
                zero_pages=0,
                saved_bytes=7 << 20,
                vmdedup_saved_bytes=8 << 20,
            )
        ],
        notes=["only a bound"],
    )
    libc = SourcePages(source="/images/disk", part="lib/libc", shared_pages=256, unique_pages=512)
    evil = SourcePages(source="/images/disk", part=f"{EVIL}/", shared_pages=1, unique_pages=0)
    unknown = SourcePages(source=None, part="", shared_pages=0, unique_pages=768)
    common = PairPages(source="/images/disk", part="lib/libc", pages=100)
    sources = ContentSources(
        known=[KnownSource(path="/images/disk", kind="disk image", pages=9999, parts=2)],
        shared_pages=256,
        explained_pages=256,
        vms=[VmSources(name=EVIL, pid=1, zero_pages=5, sources=[libc, unknown, evil])],
        pairs=[PairSources(vms=["web", EVIL], sources=[common])],
    )
    whole = report.model_copy(update={"ksm": ksm, "sources": sources})
    text = as_text(whole, form)  # type: ignore[arg-type]
    assert "<script>alert" not in (text if form in ("html", "markdown") else "")
    if form == "json":
        assert SharingReport.model_validate_json(text) == whole
        return
    for words in (
        "7.0 MiB",
        "8.0 MiB",
        "1,234",
        "only a bound",
        "disk: lib/libc",
        "400.0 KiB",
        "1.0 MiB",
        "3.0 MiB",
    ):
        assert words in text


def test_html_without_plotly_has_open_tables(
    report: SharingReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "plotly_script", lambda: None)
    document = as_html(report)
    page = Page(document)
    assert page.scripts == []
    assert "pip install 'vmdedup[html]'" in page.text
    assert "<details open>" in document
    assert "7,654,321" in page.text


def test_html_of_nothing() -> None:
    assert "0 VMs" in Page(as_html(sharing([]))).text


def test_ram_is_the_sum_of_its_parts(report: SharingReport) -> None:
    vm = report.vms[0].model_copy(
        update={"unique_pages": 7, "volatile_pages": 5, "swapped_pages": 3, "absent_pages": 11}
    )
    parts = ram_parts(vm)
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == vm.ram_bytes
    assert parts["absent"] == 11 * 4096
    unknown = ram_parts(report.vms[0])
    assert unknown["unique"] == 0
    assert sum(unknown.values()) == vm.ram_bytes


def saved(report: SharingReport, **percent: int) -> SharingReport:
    """The report with VMs of these names, each with so much saved of 100 MiB."""
    vms = [
        vm_report(name, "merged", None).model_copy(
            update={"present_bytes": 100 << 20, "saved_bytes": share << 20}
        )
        for name, share in percent.items()
    ]
    return report.model_copy(update={"vms": vms})


def test_a_baseline_names_those_that_share_less(report: SharingReport) -> None:
    now, before = saved(report, a=50, b=44, c=10), saved(report, a=30, b=50, d=50)
    comparison = compare(now, before, 5)
    assert [each.name for each in comparison.worse] == ["b", "all VMs"]
    assert comparison.missing == ("d",)
    assert comparison.new == ("c",)
    assert compare(now, before, 10).worse == []
    assert compare(before, before, 0).worse == []
    out = make_console(io.StringIO())
    show_report(now, out, comparison)
    assert isinstance(out.file, io.StringIO)
    assert re.search(r"b +shares less +50\.0% +44\.0% +-6\.0 +-6\.0 MiB", out.file.getvalue())
    assert "d not there any more" in out.file.getvalue()
    assert r"b (shares less) | 50.0%" in as_markdown(now, comparison)


def test_vms_of_one_name_are_compared_together(report: SharingReport) -> None:
    twins = saved(report, a=20).vms + saved(report, a=60).vms
    both = report.model_copy(update={"vms": twins})
    (difference,) = compare(both, saved(report, a=40), 0).vms
    assert difference.points == 0


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits(report: SharingReport, width: int) -> None:
    out = make_console(io.StringIO())
    out.width = width
    show_report(report, out)
    assert isinstance(out.file, io.StringIO)
    shown = out.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "24,691,356" in shown
    assert "\x1b[" not in shown


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_ends_in_one_newline(report: SharingReport, form: str) -> None:
    text = as_text(report, form)  # type: ignore[arg-type]
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_json_is_read_back(report: SharingReport) -> None:
    assert SharingReport.model_validate_json(as_text(report, "json")) == report


def test_a_file_is_replaced_whole_and_a_pipe_written_to(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    file.write_text("old")
    write_file(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.md"]
    with pytest.raises(UsageError, match="No such file or directory"):
        write_file(tmp_path / "nowhere" / "report.md", "x")
    read_end, write_end = os.pipe()
    try:
        write_file(Path(f"/proc/self/fd/{write_end}"), "through")
        assert os.read(read_end, 100) == b"through"
    finally:
        os.close(read_end)
        os.close(write_end)


def page_of(unit: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(unit * (4096 // len(unit)), dtype=np.uint8)


@pytest.mark.parametrize(
    ("page", "what"),
    [
        (page_of(b"\0"), "zero"),
        (page_of(b"\xcc"), "0xCC fill (x86 int3)"),
        (page_of(b"\x17"), "0x17 fill"),
        (page_of(b"\x01\x02"), "2-byte word 0x0201 fill"),
        (page_of(b"\xef\xbe\xad\xde"), "4-byte word 0xDEADBEEF fill"),
        (page_of(bytes(range(8))), "8-byte word 0x0706050403020100 fill"),
        (page_of(b"Hello, world!\n\n\n"), "text"),
        (page_of(b"\x7fELF\2\1\1\0" + bytes(4088)), "begin of an ELF file"),
        (page_of(bytes(4095) + b"\1"), "zero but for 1 byte"),
        (page_of(bytes(range(256))), None),
    ],
)
def test_what_a_page_is(page: np.ndarray[tuple[int], np.dtype[np.uint8]], what: str | None) -> None:
    assert describe(page) == what
