"""The HTML report in a real browser: the charts are drawn, offline, and nothing complains."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.skips import require
from tests.unit.test_report import sharing, vm_report
from vmdedup.models import HistorySample
from vmdedup.report.html import as_html, plotly_script

pytestmark = pytest.mark.command

_LIMIT_S = 120


def browser() -> str:
    """Chromium; without it (or without plotly) the test is skipped, or fails where it must work."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    missing = "no Chromium here" if found is None else None
    if plotly_script() is None:
        missing = "plotly is not installed"
    require(missing)
    assert found is not None
    return found


def dom(page: Path, tmp_path: Path, *options: str) -> tuple[str, str]:
    """The page as it is once its scripts have run, and what the browser logged."""
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging"]
    command += ["--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000"]
    done = subprocess.run(
        [*command, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=_LIMIT_S,
    )
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(logged)


@pytest.mark.parametrize("size", ["1200,900", "500,900"])
def test_charts_are_drawn(tmp_path: Path, size: str) -> None:
    evil = "<img src=x onerror=document.title='owned'>"
    vms = [vm_report("web", "merged", None), vm_report(evil, "merged", None)]
    samples = [
        HistorySample(unix_s=1_790_000_000 + at, saved_bytes=at << 20, present_bytes=1 << 30, vms=2)
        for at in range(5)
    ]
    page = tmp_path / "report.html"
    page.write_text(as_html(sharing(vms), history=samples))
    shown, logged = dom(page, tmp_path, f"--window-size={size}")
    assert logged == ""
    for name in ("bars", "heat-map", "time-line"):
        drawn = shown.partition(f'id="{name}"')[2].partition("<details")[0]
        assert "main-svg" in drawn, name
    bars = shown.partition('id="bars"')[2].partition("<details")[0]
    assert len(re.findall(r'class="point"', bars)) >= 2 * len(vms)
    assert "<title>owned" not in shown
    assert "<img" not in re.sub(r"<script.*?</script>", "", shown, flags=re.S)
