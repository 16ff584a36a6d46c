"""Starting the real daemon also where the host is too busy for it to answer soon."""

from __future__ import annotations

from contextlib import suppress

from tests.service.daemon import Daemon, Directories

_STARTS = 6


def patiently(directories: Directories, *arguments: str) -> Daemon:
    """A daemon that answers; one that did not in time is ended, and another started."""
    for _ in range(_STARTS):
        with suppress(AssertionError):
            return Daemon(directories, *arguments)
    raise TimeoutError(f"no daemon answered: {directories.log.read_text()[-1500:]}")
