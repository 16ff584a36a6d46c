"""What README and docs/ say of verbs, settings, counters and files is what the code has."""

from __future__ import annotations

import re
import shlex
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer

from tests.harness.pages import ROOT, Page, page, pages
from tests.unit.test_monitoring import served
from vmdedup.cli.main import app
from vmdedup.controls import as_table
from vmdedup.linux.capabilities import PURPOSE
from vmdedup.models import Funnel, HostReport, VmReport
from vmdedup.policy.hazards import as_markdown
from vmdedup.settings import Settings

pytestmark = pytest.mark.unit

README = page("README.md")
COMMAND: Any = typer.main.get_command(app)
SHELL = {"sh", "bash", "console"}


@pytest.mark.parametrize("each", pages(), ids=lambda each: each.name)
def test_links_lead_somewhere(each: Page) -> None:
    """Files are there, and so are the headings in them."""
    for link in each.links:
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            continue
        target = (each.path.parent / unquote(parts.path)).resolve() if parts.path else each.path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if parts.fragment:
            assert parts.fragment in page(target).anchors, link


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / urlsplit(link).path).resolve() for link in README.links}
    assert {each.path for each in pages() if each.path.parent.name == "docs"} <= linked


def test_no_page_is_a_wall() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_drawings_are_drawings() -> None:
    """Well-formed, with a title for who cannot see them, and nothing from elsewhere."""
    drawings = sorted((ROOT / "docs").glob("*.svg"))
    assert drawings
    for drawing in drawings:
        root = ET.parse(drawing).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{*}title") is not None
        assert root.find("{*}desc") is not None
        assert not re.search(r'(href|src)="(?!#)|url\((?!#)|@import', drawing.read_text())


def test_the_hazard_table_is_the_codes() -> None:
    assert as_markdown() in (ROOT / "docs/hazards.md").read_text()


def test_the_control_table_is_the_codes() -> None:
    assert as_table() in (ROOT / "docs/settings.md").read_text()


def test_every_setting_is_explained_with_its_description() -> None:
    described = {row[0]: row[2] for row in page("docs/settings.md").rows if len(row) == 3}
    for name, field in Settings.model_fields.items():
        assert described.get(f"`{name}`") == field.description


def test_the_settings_defaults_are_the_codes() -> None:
    written = {row[0]: row[1] for row in page("docs/settings.md").rows if len(row) == 3}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, bool | int | Path):
            assert written[f"`{name}`"] == str(field.default).lower()


def test_every_counter_is_explained() -> None:
    named = page("docs/counters.md").named()
    for model in (HostReport, VmReport):
        assert model.model_fields.keys() <= named
    parts = {name for name in Funnel.model_fields if name.endswith("_pages")}
    assert parts - {"ram_pages"} <= named


def test_every_metric_is_explained_and_exists() -> None:
    named = {name.partition("{")[0] for name in page("docs/reports.md").named()}
    metrics = {name for name in named if name.startswith(("_", "vmdedup_"))}
    explained = {f"vmdedup{name}" if name.startswith("_") else name for name in metrics}
    samples = {re.sub(r"_(bucket|count|sum)$", "", name) for name in served()}
    assert explained == samples


def test_every_capability_is_explained() -> None:
    assert {capability.label for capability in PURPOSE} <= page("docs/security.md").named()


# ---- the command line ----


def options(verb: str) -> set[str]:
    """All spellings of a verb's options."""
    found = {"--help"}
    for parameter in COMMAND.commands[verb].params:
        found |= {word for word in [*parameter.opts, *parameter.secondary_opts] if word[0] == "-"}
    return found


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every call of vmdedup in a block of shell, as words, with where it stands."""
    for each in pages():
        for block in each.blocks:
            if block.language not in SHELL:
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from calls(line, f"{each.name}:{block.line}: {line}")


def calls(line: str, where: str) -> Iterator[tuple[str, list[str]]]:
    """The calls in one line of shell."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.commenters = "#"
    words = list(lexer)
    for at, word in enumerate(words):
        first = at == 0 or words[at - 1] in SEPARATORS or "=" in words[at - 1]
        if first and (word == "vmdedup" or word.endswith("/bin/vmdedup")):
            end = next((n for n in range(at, len(words)) if words[n] in SEPARATORS), len(words))
            yield where, words[at + 1 : end]


SEPARATORS = {"&", "&&", "|", "||", ";", ">", ">>", "2>", "(", ")"}


def test_shell_examples_are_calls_that_exist() -> None:
    """Verbs and options of every example; what they do is for the tests that run them."""
    seen = set()
    for where, words in command_lines():
        verb, *rest = words or [""]
        if verb.startswith("-"):
            continue  # the command's own options, as --version
        assert verb in COMMAND.commands, where
        for word in rest:
            if word.startswith("-") and not re.fullmatch(r"-\d+", word):
                assert word.partition("=")[0] in options(verb), f"{where}: {word}"
        seen.add(verb)
    assert {"run", "report", "merge", "doctor", "unmerge"} <= seen


def test_the_table_of_verbs_has_every_verb_and_only_its_options() -> None:
    listed: set[str] = set()
    for row in page("docs/cli.md").rows:
        verbs = re.findall(r"(?:`|, `)(?:vmdedup )?([a-z]+)[ `\[]", row[0])
        if "vmdedup" not in row[0]:
            continue
        assert set(verbs) <= COMMAND.commands.keys(), row[0]
        allowed = set().union(*map(options, verbs))
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(row)):
            assert option in allowed, f"{verbs}: {option}"
        listed |= set(verbs)
    assert listed == COMMAND.commands.keys()


# ---- settings ----


def test_settings_examples_are_valid(tmp_path: Path) -> None:
    blocks = [(each, block) for each in pages() for block in each.blocks]
    found = [(each, block) for each, block in blocks if block.language == "toml"]
    assert found
    for each, block in found:
        file = tmp_path / "vmdedup.toml"
        file.write_text(block.text)
        assert Settings.load(file) != Settings(), f"{each.name}:{block.line}"
        assert tomllib.loads(block.text)


def test_the_example_environment_names_every_setting() -> None:
    named = set(re.findall(r"^#(VMDEDUP_\w+)=", (ROOT / "configs/vmdedup.env").read_text(), re.M))
    assert named == {f"VMDEDUP_{name.upper()}" for name in Settings.model_fields}


def test_the_example_environment_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in (ROOT / "configs/vmdedup.env").read_text().splitlines():
        if match := re.match(r"#(VMDEDUP_\w+)=(.*)", line):
            monkeypatch.setenv(match[1], match[2].strip("'"))
    settings = Settings()
    assert settings.domains[0].domain == "ci"


def test_the_environment_of_the_page_is_that_of_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocks = [block for block in page("docs/settings.md").blocks if block.section == "Settings"]
    (file,) = (block.text for block in blocks if block.language == "toml")
    (exports,) = (block.text for block in blocks if block.language == "sh")
    (tmp_path / "vmdedup.toml").write_text(file)
    loaded = Settings.load(tmp_path / "vmdedup.toml")
    for line in exports.splitlines():
        _, assignment = shlex.split(line)
        name, _, value = assignment.partition("=")
        monkeypatch.setenv(name, value)
    by_environment = Settings()
    for name in ("qmp", "domains", "controls"):
        assert getattr(by_environment, name) == getattr(loaded, name)
