"""Man pages say what `--help` and the example settings say, and groff has nothing to add."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tests.release.man import man_pages
from tests.release.package import ROOT
from vmdedup.cli.main import app

pytestmark = pytest.mark.unit

PAGES = man_pages()
GROUP: Any = get_command(app)
Need = Callable[[str | None], None]


def missing(program: str) -> str | None:
    return None if shutil.which(program) else f"no {program} on this machine"


def rendered(source: str) -> tuple[str, str]:
    """The page as a terminal shows it, very wide, without line breaks; and groff's warnings."""
    command = ["groff", "-Kutf8", "-Tutf8", "-P-cbou", "-man", "-ww", "-rLL=4000n"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split()), done.stderr


def words(text: str) -> str:
    return " ".join(text.split())


def test_there_is_a_page_for_each_verb_and_for_the_settings() -> None:
    names = {f"vmdedup-{verb}.1" for verb in GROUP.commands}
    assert names | {"vmdedup.1", "vmdedup.toml.5"} == PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_groff_has_no_warning(name: str, need: Need) -> None:
    need(missing("groff"))
    assert rendered(PAGES[name])[1] == ""


def test_groff_looks(need: Need) -> None:
    need(missing("groff"))
    assert "nonsense" in rendered(PAGES["vmdedup.1"].replace(".SS", ".nonsense", 1))[1]


def test_mandoc_has_nothing_to_say(tmp_path: Path, need: Need) -> None:
    need(missing("mandoc"))
    for name, source in PAGES.items():
        file = tmp_path / name
        file.write_text(source)
        done = subprocess.run(
            ["mandoc", "-T", "lint", "-W", "warning", file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "", done.stdout


@pytest.mark.parametrize("verb", GROUP.commands)
def test_a_verb_s_page_loses_no_word(verb: str, need: Need) -> None:
    need(missing("groff"))
    command = GROUP.commands[verb]
    shown, _ = rendered(PAGES[f"vmdedup-{verb}.1"])
    for text in (command.help, command.examples):
        assert words(text) in shown
    for parameter in command.params:
        assert words(parameter.help) in shown, parameter.name
        for name in (*parameter.opts, *parameter.secondary_opts):
            shown_as = name if name.startswith("-") else parameter.metavar or name.upper()
            assert f" {shown_as}" in shown


def test_the_summary_has_each_verb(need: Need) -> None:
    need(missing("groff"))
    shown, _ = rendered(PAGES["vmdedup.1"])
    for verb, command in GROUP.commands.items():
        summary = command.help.partition("\n\n")[0]
        assert f"vmdedup-{verb}(1) {summary}" in shown


def test_the_settings_page_has_every_line_of_the_example(need: Need) -> None:
    need(missing("groff"))
    shown, _ = rendered(PAGES["vmdedup.toml.5"])
    text = (ROOT / "configs/default.toml").read_text()
    lines = re.findall(r"^# ?(.+)$", text, re.M)
    assert len(lines) > 100
    assert [line for line in lines if words(line) not in shown] == []
