"""One line of progress on stderr.

Owns the bar. It is written by hand and not with rich, because it lives in the
engine's process: no import of its own, no thread that would compete with a gate
for the interpreter. It is updated between batches, never inside a gate, so a
terminal that blocks holds no guest. On a terminal each line overwrites the last; elsewhere,
if asked for, it prints one line for each stage or every few seconds.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from vmdedup.engine.progress import PassProgress

_REDRAW_S = 0.1
_NEXT_LINE_S = 5.0
_BAR_COLUMNS = 24
_STAGES = {"scan": "scanning", "merge": "merging", "unmerge": "unmerging", "idle": "waiting"}


class ProgressLine:
    """The place for progress. `enabled` False discards it all."""

    def __init__(self, stream: TextIO, *, enabled: bool, terminal: bool) -> None:
        self._stream = stream
        self._enabled = enabled
        self._terminal = terminal
        self._said = ""
        self._said_at = float("-inf")
        self._drawn = False

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """Say that `what` has done `done` of `total` pages; drawn at most ten times a second."""
        if not self._enabled:
            return
        now = time.monotonic()
        is_new = what != self._said
        pause_s = _REDRAW_S if self._terminal else _NEXT_LINE_S
        is_end = self._terminal and done >= total
        if not (is_new or is_end) and now - self._said_at < pause_s:
            return
        self._said, self._said_at = what, now
        self._write(_line(what, done, total, note))

    def show_pass(self, progress: PassProgress) -> None:
        """Show the progress of a pass of the engine."""
        # `passes` counts those that are done; waiting belongs to the last of them.
        number = progress.passes + (progress.stage != "idle")
        what = f"pass {number}: {_STAGES.get(progress.stage, progress.stage)}"
        if progress.vm is not None:
            what += f" {progress.vm}"
        merged = f"{progress.merged_pages:,} pages merged" if progress.merged_pages else ""
        self.update(what, progress.done_pages, progress.total_pages, merged)

    def close(self) -> None:
        """Leave the terminal's line empty for the next output."""
        if self._drawn:
            with suppress(OSError):
                self._stream.write("\r\x1b[K")
                self._stream.flush()
            self._drawn = False

    def _write(self, line: str) -> None:
        with suppress(OSError):
            if self._terminal:
                columns = shutil.get_terminal_size().columns
                self._stream.write(f"\r\x1b[K{line[: columns - 1]}")
                self._drawn = True
            else:
                self._stream.write(f"{line}\n")
            self._stream.flush()


def _line(what: str, done: int, total: int, note: str) -> str:
    parts = [what]
    if total:
        filled = _BAR_COLUMNS * min(done, total) // total
        bar = "#" * filled + "." * (_BAR_COLUMNS - filled)
        parts = [f"[{bar}] {100 * min(done, total) // total:3d}%", what]
    return "  ".join([*parts, note] if note else parts)


@contextmanager
def progress_line(wanted: bool | None) -> Iterator[ProgressLine]:
    """A line on stderr; `wanted` `None` means only if that is a terminal."""
    terminal = sys.stderr.isatty()
    line = ProgressLine(
        sys.stderr, enabled=terminal if wanted is None else wanted, terminal=terminal
    )
    try:
        yield line
    finally:
        line.close()
