"""Which QMP sockets of a command line to use, and what to do where there is none.

Pure. Owns the order of a VM's sockets and the reasons that name a remedy. A monitor cannot be
added to a running QEMU: `chardev-add` makes the socket, but nothing makes a monitor on it
(tried with QEMU 7.2 and 10.0: no command, no object type, and a monitor does not take another
character device by `chardev-change`). So each remedy but `monitor = "shared"` is a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmdedup.attach.cmdline import (
    MonitorOption,
    human_monitors,
    network_ids,
    qmp_monitors,
)
from vmdedup.attach.owners import is_ours, owner_of

_OPTION = "-qmp unix:PATH,server=on,wait=off"


@dataclass(frozen=True)
class MonitorChoice:
    """The sockets of a VM by which it could be attached to, or the reason why there is none."""

    sockets: tuple[str, ...] = ()
    """Paths of sockets that may be kept, the best first."""
    foreign: tuple[str, ...] = ()
    """Paths of sockets over which other programs manage the VM: to be used in turns only."""
    reason: str | None = None
    """Why no socket may be kept, with the remedy; `None` if one may."""
    knows_monitors: bool = True
    """False if the arguments name no QMP monitor at all."""


def choose_monitors(
    arguments: Sequence[str], is_lost: Callable[[str], bool] = lambda _: False
) -> MonitorChoice:
    """The choice for a QEMU with these arguments.

    `is_lost`: whether a socket's path leads nowhere any more.
    """
    monitors = qmp_monitors(arguments)
    paths = [option.path for option in _by_preference(monitors) if option.path is not None]
    if paths and all(map(is_lost, paths)):
        return MonitorChoice(reason=_first_reason(monitors) or _lost(paths[0]))
    sockets = tuple(path for path in paths if owner_of(path) is None)
    if sockets:
        return MonitorChoice(sockets)
    if paths:
        reason = (
            f"its only QMP socket {paths[0]} is {owner_of(paths[0])}: use it in turns"
            ' (monitor = "shared" in the settings, or VMDEDUP_MONITOR=shared), or give vmdedup'
            f" its own ({_OPTION})"
        )
        return MonitorChoice((), tuple(paths), reason)
    reason = _first_reason(monitors) or _missing(arguments)
    return MonitorChoice(reason=reason, knows_monitors=bool(monitors))


def _by_preference(options: Sequence[MonitorOption]) -> list[MonitorOption]:
    """Those made for vmdedup first, those of other programs last."""

    def rank(option: MonitorOption) -> int:
        path = option.path or ""
        return 0 if is_ours(path, option.device_id) else 1 if owner_of(path) is None else 2

    return sorted(options, key=rank)


def _first_reason(options: Sequence[MonitorOption]) -> str | None:
    return next((option.reason for option in options if option.reason), None)


def _lost(path: str) -> str:
    return (
        f"its monitor's path {path} is relative, and QEMU has left the folder that it was started"
        " in (-daemonize); name its socket (--qmp PATH)"
    )


def _missing(arguments: Sequence[str]) -> str:
    human = human_monitors(arguments)
    if not human:
        return f"it has no QMP monitor (start it with {_OPTION})"
    how = _how_to_start(arguments, human)
    return (
        f"it has no QMP monitor, only a human one ({human[0]}), and a running QEMU takes no"
        f" other: {how}"
    )


def _how_to_start(arguments: Sequence[str], human: Sequence[str]) -> str:
    if any(monitor.endswith("-monitor.socket") for monitor in human):
        return f'start it with quickemu --extra_args "{_OPTION}"'
    if any(name.startswith("gns3-") for name in network_ids(arguments)):
        return f"add {_OPTION} to the node's options in GNS3, and start it again"
    return f"start it with {_OPTION}"
