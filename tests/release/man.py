"""Man pages, made from what `--help` and the example settings say.

`python -m tests.release.man FOLDER` writes vmdedup(1), a page for each verb and
vmdedup.toml(5). No text is written here that the command has: a page can not differ from it.
(click-man does this for click's own commands; typer has a click of its own inside.)
Promises pages that groff and mandoc read without a warning, dated by SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from tests.release.package import ROOT, project
from vmdedup.cli.main import app
from vmdedup.cli.teach import BEGIN, CODES

_SETTINGS = ROOT / "configs/default.toml"
_FILES = {
    "/etc/vmdedup.toml": "the settings of the service: vmdedup.toml(5)",
    "/run/vmdedup": "the daemon's lock and socket, notes of VMs that it has paused",
    "/dev/shm/vmdedup": "the shared pages",
    "/var/lib/vmdedup": "the history",
}


def man_pages() -> dict[str, str]:
    """Each page's file name and source."""
    group: Any = get_command(app)
    pages = {"vmdedup.1": _summary(group), "vmdedup.toml.5": _settings()}
    for name, command in group.commands.items():
        pages[f"vmdedup-{name}.1"] = _verb(name, command)
    return pages


def _summary(group: Any) -> str:
    lines = [*_head("vmdedup", 1, group.help)]
    lines += [".B vmdedup", "[\\fIOPTIONS\\fR] \\fIVERB\\fR [\\fIARGUMENTS\\fR]"]
    lines += [".SH DESCRIPTION", *_text(group.help), *_options(group.params), ".SH VERBS"]
    panels: dict[str, list[Any]] = {}
    for command in group.commands.values():
        panels.setdefault(command.rich_help_panel, []).append(command)
    for panel, commands in panels.items():
        lines.append(f".SS {panel}")
        for command in commands:
            what = command.help.partition("\n\n")[0]
            lines += [".TP", f".BR vmdedup\\-{command.name} (1)", *_text(what)]
    lines += [".SH FILES"]
    for path, what in _FILES.items():
        lines += [".TP", f".I {_escaped(path)}", *_text(what)]
    lines += [*_examples("Where to begin", BEGIN), *_end("vmdedup.toml(5)")]
    return "\n".join(lines) + "\n"


def _verb(name: str, command: Any) -> str:
    what, _, more = command.help.partition("\n\n")
    lines = [*_head(f"vmdedup-{name}", 1, what), f".B vmdedup {name}", "[\\fIOPTIONS\\fR]"]
    arguments = [each for each in command.params if each.opts[0][0] != "-"]
    for each in arguments:
        shown = f"\\fI{_escaped(_metavar(each))}\\fR" + ("..." if each.nargs == -1 else "")
        lines.append(shown if each.required else f"[{shown}]")
    lines += [".SH DESCRIPTION", *_text(f"{what}\n\n{more}")]
    if arguments:
        lines.append(".SH ARGUMENTS")
        for each in arguments:
            lines += [".TP", f"\\fI{_escaped(_metavar(each))}\\fR", *_text(each.help)]
    lines += [*_options([each for each in command.params if each not in arguments])]
    lines += [*_examples("Examples", command.examples), *_end("vmdedup(1)", "vmdedup.toml(5)")]
    return "\n".join(lines) + "\n"


def _settings() -> str:
    """The example file's comments, each with the setting below it."""
    head, *blocks = _SETTINGS.read_text().replace("\n#[", "\n\n#[").split("\n\n")
    lines = [*_head("vmdedup.toml", 5, "settings of the vmdedup daemon"), ".I /etc/vmdedup.toml"]
    lines += [".SH DESCRIPTION", *_text(_uncommented(head)), ".SH SETTINGS"]
    text: list[str] = []
    for line in "\n".join(blocks).splitlines():
        if line.startswith("# "):
            text.append(line[2:])
        elif match := re.fullmatch(r"#(\[.+\])", line):
            lines += [f".SS {match[1]}", *_text("\n".join(text))]
            text = []
        elif line:
            lines += [".TP" if text else ".PP", f"\\fB{_escaped(line[1:])}\\fR"]
            lines += _text("\n".join(text))
            text = []
    lines += [*_end("vmdedup(1)", "vmdedup-run(1)", "vmdedup-set(1)", codes="")]
    return "\n".join(lines) + "\n"


def _uncommented(text: str) -> str:
    return re.sub(r"^# ?", "", text, flags=re.M)


def _head(name: str, section: int, what: str) -> Iterator[str]:
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(epoch))
    title = _escaped(name.upper())
    yield f'.TH {title} {section} {date} "vmdedup {project()["version"]}" vmdedup'
    yield ".SH NAME"
    yield f"{_escaped(name)} \\- {_escaped(what[0].lower() + what[1:].rstrip('.'))}"
    yield ".SH SYNOPSIS"


def _options(parameters: list[Any]) -> Iterator[str]:
    """By the panels of the help."""
    panels: dict[str, list[Any]] = {}
    for each in parameters:
        if not each.hidden:
            panels.setdefault(each.rich_help_panel or "Options", []).append(each)
    yield ".SH OPTIONS"
    for panel, options in panels.items():
        if panel != "Options":
            yield f".SS {panel}"
        for each in options:
            names = ", ".join(f"\\fB{_escaped(name)}\\fR" for name in _spellings(each))
            yield ".TP"
            yield names if each.is_flag else f"{names} \\fI{_escaped(_metavar(each))}\\fR"
            yield from _text(each.help)
            if each.show_default and not each.is_flag and each.default is not None:
                yield f"Default: {_escaped(str(each.default))}."


def _spellings(option: Any) -> list[str]:
    return sorted([*option.opts, *option.secondary_opts], key=lambda name: name.startswith("--"))


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _examples(title: str, text: str) -> Iterator[str]:
    yield from (f".SH {title.upper()}", ".EX")
    yield from map(_escaped, text.strip().splitlines())
    yield ".EE"


def _end(*also: str, codes: str = CODES) -> Iterator[str]:
    if codes:
        yield from (".SH EXIT STATUS", *_text(codes.partition(": ")[2]))
    yield ".SH SEE ALSO"
    yield _escaped(", ".join(also))
    yield ".PP"
    yield "The whole documentation is in /usr/share/doc/vmdedup, and in docs/ of the source."


def _text(text: str) -> list[str]:
    """Paragraphs of plain text."""
    lines: list[str] = []
    for number, paragraph in enumerate(each for each in text.split("\n\n") if each.strip()):
        if number:
            lines.append(".PP")
        lines += [_escaped(line.strip()) for line in paragraph.splitlines()]
    return lines


def _escaped(text: str) -> str:
    """As roff takes it literally."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text.startswith(".") else text


def write_man_pages(folder: Path) -> None:
    """Write all of them into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in man_pages().items():
        (folder / name).write_text(source)


if __name__ == "__main__":
    write_man_pages(Path(sys.argv[1]))
