"""Standard streams that work whatever started this process.

Owns three cases. A closed stream, which nobody reads, goes to /dev/null; otherwise the next
file opened would get a standard stream's number, and receive its output. Characters that a
stream's encoding lacks are escaped, as in JSON. A write that fails raises an OSError that
names the stream.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import Any, TextIO

_ESCAPED = "vmdedup-escaped"


def prepare_streams() -> None:
    """Make all three streams usable, before anything is opened or printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number, which is this one
    codecs.register_error(_ESCAPED, _escaped)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    # Replacements for them are left alone.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, "stdout", sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, "stderr", sys.stderr)


def give_up(number: int) -> None:
    """Discard output that is still buffered for that stream, so that exit does not raise."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), number)


class _Named(io.FileIO):
    """Names the stream in the errors of its writes."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number, "wb", closefd=False)
        self._called = name

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            # The class follows from the number: BrokenPipeError stays one.
            raise OSError(error.errno, error.strerror, self._called) from None


def _stream(number: int, name: str, found: TextIO | None) -> TextIO:
    """The stream again, in UTF-8, or in ASCII, which every other encoding contains."""
    is_unicode = found is None or codecs.lookup(found.encoding).name == "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(_Named(number, name)),
        encoding="utf-8" if is_unicode else "ascii",
        errors=_ESCAPED,
        line_buffering=os.isatty(number) or name == "stderr",
    )


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
