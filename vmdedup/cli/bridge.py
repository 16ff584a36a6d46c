"""`vmdedup bridge`: the daemon's API on stdin and stdout, for `--host ssh://…` elsewhere."""

from __future__ import annotations

from vmdedup.cli.completion import SOCKET_NAME
from vmdedup.cli.options import RuntimeDir
from vmdedup.cli.outcome import DONE
from vmdedup.cli.service import runtime_folder


def bridge(runtime_dir: RuntimeDir = None) -> int:
    """Carry the daemon's API over stdin and stdout.

    `vmdedup --host ssh://…` runs this on the other host, by ssh.
    """
    from vmdedup.ssh import bridge as copy_to_daemon

    copy_to_daemon(str(runtime_folder(runtime_dir) / SOCKET_NAME))
    return DONE
