"""The way from a verb to the daemon, if one runs.

Owns where the daemon is looked for: at a socket here, or on the host of `--host`. Promises
that a verb which can also work by itself does so only if there is no daemon: a daemon that
this user may not ask is an error, not a reason to bypass it. So is one of another host that
cannot be reached.
"""

from __future__ import annotations

import os
import socket
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from vmdedup.errors import UsageError, VmdedupError

if TYPE_CHECKING:
    from vmdedup.client import Client

_CONNECT_LIMIT_S = 5.0


def socket_path(runtime_dir: Path | None) -> Path:
    """The daemon's socket: that of `--runtime-dir`, of the environment, or the default."""
    from vmdedup.ipc.protocol import SOCKET_NAME

    return runtime_folder(runtime_dir) / SOCKET_NAME


def runtime_folder(runtime_dir: Path | None, config: Path | None = None) -> Path:
    """The runtime directory of the settings, found without loading their model.

    Raises UsageError if `config` cannot be read.
    """
    given = runtime_dir or os.environ.get("VMDEDUP_RUNTIME_DIR")
    if not given and config is not None:
        try:
            given = tomllib.loads(config.read_text()).get("runtime_dir")
        except (OSError, ValueError) as error:
            raise UsageError(f"settings file {config}: {error}") from error
        if given is not None and not isinstance(given, str):
            raise UsageError(f"settings file {config}: runtime_dir must be a string")
    return Path(given or "/run/vmdedup")


def place(runtime_dir: Path | None) -> Path | str:
    """The daemon's socket, or the URL of the other host that `main` has put into VMDEDUP_HOST."""
    return os.environ.get("VMDEDUP_HOST") or socket_path(runtime_dir)


def daemon(runtime_dir: Path | None) -> Client:
    """The daemon's client. Nothing is sent yet: the first call tells whether it is there."""
    from vmdedup.client import Client

    return Client(place(runtime_dir))


def daemon_if_running(runtime_dir: Path | None) -> Client | None:
    """The daemon's client; `None` if no daemon runs.

    Raises VmdedupError if there is one that this user may not talk to.
    """
    path = place(runtime_dir)
    if isinstance(path, str):
        return daemon(runtime_dir)
    if len(os.fsencode(path)) > 107:
        return None  # no socket has such a path
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_LIMIT_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise VmdedupError(
                f"service at {path}: {error.strerror or error}: be root or of the socket's group,"
                " or name the VMs with --qmp"
            ) from error
    return daemon(runtime_dir)
