"""`vmdedup assert` as a shell script meets it: its exit codes and its two streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command.test_cli import vmdedup
from tests.unit.test_expectations import later, report

pytestmark = pytest.mark.command


def test_the_verbs_exit_codes(tmp_path: Path) -> None:
    before, now = tmp_path / "before.json", tmp_path / "now.json"
    before.write_text(report().model_dump_json())
    now.write_text(later(report(stops=1), cow_breaks=13).model_dump_json())

    def code(*words: str, source: Path = now) -> int:
        return vmdedup("assert", "--from", str(source), *words, GITHUB_ACTIONS="").returncode

    since = ("--since", str(before))
    assert code("--min-saved", "40%", "--max-stops", "2", "--max-broken-pages", "3", *since) == 0
    assert code("--max-broken-pages", "2", *since) == 3
    assert code("--min-saved", "41%") == 3
    now.write_text(report(merging=False).model_dump_json())
    assert code("--max-stops", "2") == 1
    for words in ([], ["--max-broken-pages", "2"], ["--min-saved", "40"], ["--max-stops", "-1"]):
        assert code(*words) == 2


def test_the_verb_says_what_holds_and_annotates_what_does_not(tmp_path: Path) -> None:
    file = tmp_path / "now.json"
    file.write_text(report().model_dump_json())
    words = ["assert", "--from", str(file), "--max-stops", "0", "--min-saved", "50%"]
    done = vmdedup(*words, GITHUB_ACTIONS="true")
    assert done.stdout == "max_stops: 0 pauses, within 0\n"
    said = "40.0% saved (800 B of 2.0 KiB), below 50%"
    assert done.stderr.splitlines() == [
        f"vmdedup: min_saved: {said}",
        f"::error title=vmdedup assert%3A min_saved::{said.replace('%', '%25')}",
    ]
    document = json.loads(vmdedup(*words, "--json", GITHUB_ACTIONS="").stdout)
    assert document["ok"] is False
    assert [rule["holds"] for rule in document["rules"]] == [False, True]
