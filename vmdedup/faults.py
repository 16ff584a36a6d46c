"""Fault points: named steps at which a test can make the engine die or hang.

Owns one hook, unset except in tests. Production code calls `reached` at the
steps whose loss matters. A test process sets `hook` to kill or stop itself
there; the test then examines the state left behind.
"""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def reached(step: str) -> None:
    """Tell the hook, if there is one, that `step` has just been done."""
    if hook is not None:
        hook(step)
