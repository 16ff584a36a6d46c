"""The way from a verb to the daemon, if one runs.

Owns where the daemon's socket is looked for and what is said when nobody answers
there. Promises that a verb which can work by itself too only does so when there
is no daemon: one that is there but not for this user is an error, not a reason
to go round it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmdedup.service.client import Client


def socket_path(runtime_dir: Path | None) -> Path:
    """The daemon's socket: of `--runtime-dir`, else of the environment, else the default."""
    from vmdedup.service.client import default_socket
    from vmdedup.service.protocol import SOCKET_NAME

    return default_socket() if runtime_dir is None else runtime_dir / SOCKET_NAME


def daemon(runtime_dir: Path | None) -> Client:
    """The daemon's client. Nothing is sent yet: the first call tells whether it is there."""
    from vmdedup.service.client import Client

    return Client(socket_path(runtime_dir))


def daemon_if_running(runtime_dir: Path | None) -> Client | None:
    """The daemon's client, None when no daemon runs.

    Raises ServiceError when there is one and it does not answer this user.
    """
    path = socket_path(runtime_dir)
    if not path.exists():
        return None
    from vmdedup.service.client import Client, ServiceUnreachableError

    client = Client(path)
    try:
        client.health()
    except ServiceUnreachableError as error:
        client.close()
        if isinstance(error.__cause__, Exception) and "refused" in str(error.__cause__):
            return None
        raise
    except BaseException:
        client.close()
        raise
    return client
