"""`vmdedup set NAME=VALUE…`: steer the daemon, all of it or nothing."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vmdedup.cli.completion import control_values
from vmdedup.cli.get import chosen
from vmdedup.cli.options import AsJson, RuntimeDir, assignments
from vmdedup.cli.outcome import DONE
from vmdedup.cli.service import daemon


def set_controls(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE",
            help="Controls and their new values.",
            autocompletion=control_values,
        ),
    ],
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Change controls of the daemon: all that are named, or none."""
    wanted = assignments(words)
    with daemon(runtime_dir) as service:
        values = service.set(**wanted).values
    if as_json:
        print(json.dumps(values, indent=2))
    else:
        for name, value in chosen(values, list(wanted)).items():
            print(f"{name}={value}")
    return DONE
