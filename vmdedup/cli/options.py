"""Options that several verbs share, and the way from options to `Settings`.

Owns the option names. Refuses any value that `Settings` refuses, from an option or from a
`VMDEDUP_*` variable, with a usage error of one line that names the setting.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmdedup.cli.completion import formats, sockets
from vmdedup.errors import UsageError
from vmdedup.report.files import ENDINGS, FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import ValidationError

    from vmdedup.report.files import Format
    from vmdedup.settings import Settings

WHICH = "Which VMs"
STOP = "When to stop"
DAEMON = "Daemon and settings"
TUNING = "Tuning"
OUTPUT = "Output"

Qmp = Annotated[
    list[str] | None,
    typer.Option(
        "--qmp",
        metavar="PATH",
        help="QMP socket of a VM, or a glob; repeatable. Without --qmp: all QEMUs on this host.",
        show_default=False,
        rich_help_panel=WHICH,
        autocompletion=sockets,
    ),
]
Libvirt = Annotated[
    str | None,
    typer.Option(
        "--libvirt",
        metavar="URI",
        help="Use the domains of this libvirt (qemu:///system), by its own monitor;"
        " with --qmp also those VMs, without it no others.",
        show_default=False,
        rich_help_panel=WHICH,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT),
]
ReportFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}; table by default, or by the ending of -o.",
        show_default=False,
        rich_help_panel=OUTPUT,
        autocompletion=formats,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write to this file, not to stdout.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domain",
        metavar="PATTERN=DOMAIN",
        help="Trust domain of the VMs whose name matches; repeatable, the first match wins.",
        show_default=False,
        rich_help_panel=WHICH,
    ),
]
Mask = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        metavar="FEATURE",
        help="Treat a kernel feature as absent (userfaultfd-wp, wp-unpopulated, wp-async,"
        " pagemap-scan, stub); repeatable.",
        show_default=False,
        rich_help_panel=TUNING,
    ),
]
RuntimeDir = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir",
        metavar="DIR",
        help="Directory of the daemon's lock and socket (else VMDEDUP_RUNTIME_DIR,"
        " else /run/vmdedup).",
        show_default=False,
        rich_help_panel=DAEMON,
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        help="Directory of the daemon's history (else VMDEDUP_STATE_DIR, else /var/lib/vmdedup).",
        show_default=False,
        rich_help_panel=DAEMON,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="File of settings in TOML (see configs/).",
        show_default=False,
        rich_help_panel=DAEMON,
    ),
]
ControlValues = Annotated[
    list[str] | None,
    typer.Option(
        "--controls",
        metavar="NAME=VALUE",
        help="Start value of a control of the daemon; repeatable.",
        show_default=False,
        rich_help_panel=DAEMON,
    ),
]
ShowProgress = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show progress on stderr; by default if that is a terminal.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


def make_settings(
    *,
    config: Path | None = None,
    domains: list[str] | None = None,
    mask: list[str] | None = None,
    libvirt: str | None = None,
    controls: list[str] | None = None,
    **given: object,
) -> Settings:
    """Settings from the options given (not `None`), over the environment, over `config`.

    Raises UsageError.
    """
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from vmdedup.controls import initial
    from vmdedup.settings import Settings

    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if domains:
        chosen["domains"] = [_domain_rule(rule) for rule in domains]
    if mask:
        chosen["mask"] = mask
    try:
        settings = Settings(**chosen) if config is None else Settings.load(config, **chosen)
    except ValidationError as error:
        raise UsageError(_first_problem(error)) from error
    except SettingsError as error:
        raise UsageError(f"environment: {error} (lists are written as JSON)") from error
    if libvirt:
        section = settings.libvirt.model_copy(update={"uri": libvirt})
        settings = settings.model_copy(update={"libvirt": section})
    if controls:
        named = settings.controls.model_dump(include=settings.controls.model_fields_set)
        together = initial({**named, **assignments(controls)})
        settings = settings.model_copy(update={"controls": together})
    return settings


def report_format(form: str | None, output: Path | None, as_json: bool) -> Format:
    """The format that the options ask for, or the ending of `output`. Raises UsageError."""
    return chosen_format(form, output, as_json, FORMATS, ENDINGS)  # type: ignore[return-value]


def chosen_format(
    form: str | None,
    output: Path | None,
    as_json: bool,
    known: Sequence[str],
    endings: Mapping[str, str],
) -> str:
    """The same, of the formats `known`; table if nothing asks for another."""
    if form is not None and form not in known:
        raise UsageError(f"--format {form}: choose one of {', '.join(known)}")
    if as_json:
        if form not in (None, "json"):
            raise UsageError(f"--json and --format {form} exclude each other")
        return "json"
    if form is None and output is not None:
        return endings.get(output.suffix, "table")
    return form or "table"


def known_files(paths: list[Path] | None) -> list[str]:
    """The files of `--known`, before any work begins. Raises UsageError.

    Those of another host are only looked for there.
    """
    for path in paths or ():
        if not os.environ.get("VMDEDUP_HOST") and not path.exists():
            raise UsageError(f"--known {path}: there is no such file")
    return [str(path) for path in paths or ()]


def assignments(words: list[str]) -> dict[str, str]:
    """`NAME=VALUE` words by name. Raises UsageError."""
    values: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not name:
            raise UsageError(f"{word}: write NAME=VALUE, for instance sleep_millisecs=100")
        if name in values:
            raise UsageError(f"{word}: {name} is given twice")
        values[name] = value
    return values


def _domain_rule(rule: str) -> dict[str, str]:
    pattern, separator, domain = rule.rpartition("=")
    if not separator or not pattern or not domain:
        raise UsageError(f"--domain {rule}: write PATTERN=DOMAIN, for instance 'web*=shop'")
    return {"name": pattern, "domain": domain}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"setting {name}: {message} (given: {problem['input']!r})"
