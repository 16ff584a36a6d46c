"""`vmdedup get`: the controls, under KSM's names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.completion import control_names
from vmdedup.cli.options import AsJson, RuntimeDir
from vmdedup.cli.outcome import DONE
from vmdedup.cli.service import daemon
from vmdedup.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmdedup.ipc.protocol import ControlValue


def get(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Names of controls; without: all.",
            autocompletion=control_names,
        ),
    ] = None,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> int:
    """Print the daemon's controls, named as KSM's.

    One name gives its value, several or none give NAME=VALUE lines.
    """
    with daemon(runtime_dir) as service:
        values = chosen(service.controls().values, names or [])
    if as_json:
        print(json.dumps(values, indent=2))
    elif len(names or []) == 1:
        print(*values.values())
    else:
        for name, value in values.items():
            print(f"{name}={value}")
    return DONE


def chosen(values: Mapping[str, ControlValue], names: list[str]) -> dict[str, ControlValue]:
    """These values by name; all if none is named. Raises UsageError for an unknown name."""
    for name in names:
        if name not in values:
            from difflib import get_close_matches

            near = get_close_matches(name, values, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else "`vmdedup get` lists them"
            raise UsageError(f"{name}: no such control; {remedy}")
    return {name: values[name] for name in names} if names else dict(values)
