"""`vmdedup top`: the daemon's VMs in the terminal, live or from its history."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.history import KEPT_BY, seconds
from vmdedup.cli.options import RuntimeDir, StateDir, make_settings
from vmdedup.cli.outcome import DONE
from vmdedup.cli.service import daemon, daemon_if_running, place
from vmdedup.errors import UsageError, VmdedupError

if TYPE_CHECKING:
    from vmdedup.settings import Settings
    from vmdedup.top.view import ViewSource


def top(
    interval_s: Annotated[
        float,
        typer.Option("--interval", "-i", metavar="S", help="Seconds between two updates."),
    ] = 2.0,
    sort: Annotated[
        str,
        typer.Option(
            "--sort", metavar="ORDER", help="Order: saved, name, breaks, held, waiting or vmas."
        ),
    ] = "saved",
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar="FROM",
            help="Play the history back from that time on: 90s, 30m, 1h, 7d, 2w and the like ago.",
            show_default=False,
        ),
    ] = None,
    state_dir: StateDir = None,
    runtime_dir: RuntimeDir = None,
) -> int:
    """Watch the daemon's VMs live in the terminal.

    Shows saved memory, writes to merged pages, scan rate, CPU, gates. ? has the keys.
    With --replay it shows the history instead, and needs no daemon.
    """
    from vmdedup.top.replay import ReplaySource
    from vmdedup.top.sample import LiveSource
    from vmdedup.top.view import orders

    kind = LiveSource if replay is None else ReplaySource
    if sort not in (known := orders(kind.columns)):
        raise UsageError(f"--sort {sort}: choose one of {', '.join(known)}")
    if not kind.shortest_s <= interval_s <= 60:
        raise UsageError(f"--interval {interval_s:g}: write {kind.shortest_s:g} to 60 seconds")
    since_s = None if replay is None else seconds(replay, "--replay")
    if state_dir is not None and since_s is None:
        raise UsageError(f"--state-dir {state_dir}: only --replay reads the history")
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise UsageError("top needs a terminal; for scripts: vmdedup report --format json")
    try:
        from vmdedup.top.app import TopApp
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("textual"):
            raise
        raise VmdedupError("top needs textual: pip install 'vmdedup[top]'") from error
    source: ViewSource
    if since_s is None:
        with daemon(runtime_dir) as service:
            service.health()
        source = LiveSource(place(runtime_dir))
    else:
        source = _recorded(since_s, make_settings(state_dir=state_dir), state_dir, runtime_dir)
    TopApp(source, interval_s=interval_s, order=sort).run()
    return DONE


def _recorded(
    since_s: int, settings: Settings, state_dir: Path | None, runtime_dir: Path | None
) -> ViewSource:
    """What the history's file has of the last `since_s` seconds. Raises VmdedupError."""
    from vmdedup.history.offline import read_each_offline
    from vmdedup.history.place import FILE_NAME, default_directory
    from vmdedup.history.series import MAX_POINTS
    from vmdedup.top.replay import ReplaySource

    directory = settings.state_dir or default_directory()
    if state_dir is None:
        directory = _daemons_directory(runtime_dir) or directory
    path = directory / FILE_NAME
    found = read_each_offline(path, since_s, MAX_POINTS, settings.history_interval_s)
    if found is None:
        raise VmdedupError(f"there is no history at {path}: {KEPT_BY}")
    if not found.together.samples or not found.vms:
        what = "VM" if found.together.samples else "sample"
        raise VmdedupError(f"{path} has no {what} of that time: choose an earlier --replay")
    return ReplaySource(found.together, found.vms)


def _daemons_directory(runtime_dir: Path | None) -> Path | None:
    """Where the daemon keeps its history; `None` if none runs. Raises VmdedupError."""
    service = daemon_if_running(runtime_dir)
    if service is None:
        return None
    with service:
        kept = service.health().history
    if kept is None or kept.directory is None:
        raise VmdedupError("the daemon keeps no history on disk: set history_days, or --state-dir")
    return Path(kept.directory)
