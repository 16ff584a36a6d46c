"""Annotations of GitHub Actions: lines that a runner shows beside the code.

Owns the syntax of workflow commands. Promises one line, whatever the text; only where a
runner reads it (`is_wanted`).
"""

from __future__ import annotations

from collections.abc import Mapping

_IN_TEXT = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_PROPERTY = {**_IN_TEXT, ":": "%3A", ",": "%2C"}


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether a runner of GitHub Actions reads what this process prints."""
    return environment.get("GITHUB_ACTIONS") == "true"


def error_line(
    message: str, title: str, *, file: str | None = None, line: int | None = None
) -> str:
    """The workflow command for an error; `line` counts from 1."""
    properties = {"file": file, "line": line, "title": title}
    given = [
        f"{name}={_escaped(str(value), _IN_PROPERTY)}"
        for name, value in properties.items()
        if value is not None
    ]
    return f"::error {','.join(given)}::{_escaped(message, _IN_TEXT)}"


def _escaped(text: str, table: Mapping[str, str]) -> str:
    return "".join(table.get(character, character) for character in text)
