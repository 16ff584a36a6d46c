"""`--help` teaches: every verb has its place, its options in full, and examples that hold."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

from vmdedup.cli.main import app
from vmdedup.cli.teach import BEGIN, CODES, EXAMPLES

pytestmark = pytest.mark.unit

GROUP: Any = get_command(app)
VERBS: dict[str, Any] = GROUP.commands
COLUMNS = 80
Help = Callable[..., str]


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Help:
    """What `--help` shows of a command, at so many columns."""
    monkeypatch.setenv("NO_COLOR", "1")

    def show(command: Any, columns: int = COLUMNS) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with command.make_context("vmdedup", [], resilient_parsing=True) as context:
            rest = command.get_help(context)
        return capsys.readouterr().out + str(rest)

    return show


def commands(text: str) -> list[str]:
    """The command lines of examples, without what explains them."""
    return [re.split(r" {2,}| [|>] ", line)[0] for line in text.splitlines() if line]


def test_the_summary_has_every_verb_on_one_line(help_of: Help) -> None:
    shown = help_of(GROUP)
    for name, command in VERBS.items():
        summary = command.help.partition("\n\n")[0]
        assert re.search(rf"^│ {name} +{re.escape(summary)} +│$", shown, re.M), name
        assert command.rich_help_panel is not None
    assert CODES in shown


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_80_columns(help_of: Help, verb: str) -> None:
    wide = [line for line in help_of(VERBS.get(verb, GROUP)).splitlines() if len(line) > COLUMNS]
    assert wide == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_loses_no_word(help_of: Help, verb: str) -> None:
    """Square brackets, for instance, would be taken for markup."""
    shown = help_of(VERBS[verb], columns=400)
    assert " ".join(VERBS[verb].help.split()) in " ".join(shown.split())
    for parameter in VERBS[verb].params:
        assert parameter.help in shown, parameter.name


def test_every_verb_has_examples() -> None:
    assert EXAMPLES.keys() == VERBS.keys()
    for verb, text in EXAMPLES.items():
        assert text.strip() in VERBS[verb].examples
        for line in commands(text):
            assert line.startswith(f"vmdedup {verb}")


@pytest.mark.parametrize("line", [*commands(BEGIN), *commands("".join(EXAMPLES.values()))])
def test_each_example_is_accepted(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    with VERBS[verb].make_context(verb, arguments):
        pass


def test_a_wrong_example_would_not_be_accepted() -> None:
    with pytest.raises(Exception, match="--sideways"):
        VERBS["run"].make_context("run", ["--sideways"])
