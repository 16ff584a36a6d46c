"""A process of the guardian's: resumes one libvirt domain that a dead engine had paused.

    python -c … 'URI#UUID' PID

Owns nothing. Exits with 0 if nothing is left to do: the domain was resumed, is another
process by now, or was suspended by somebody else and stays so.
"""

from __future__ import annotations

import sys

from vmdedup.attach.libvirt.link import LibvirtLink
from vmdedup.attach.libvirt.monitor import LibvirtMonitor
from vmdedup.errors import VmdedupError, VmGoneError

_TIMEOUT_S = 2.0


def main() -> None:
    """Resume the domain that the arguments name; the exit code says whether that is settled."""
    uri, _, uuid = sys.argv[1].rpartition("#")
    try:
        settled = _resume(uri, uuid, int(sys.argv[2]))
    except VmdedupError:
        settled = False
    sys.exit(0 if settled else 1)


def _resume(uri: str, uuid: str, pid: int) -> bool:
    with LibvirtLink(uri) as link:
        link.connect(_TIMEOUT_S)
        try:
            monitor = LibvirtMonitor(link, uuid, uuid, timeout_s=_TIMEOUT_S)
        except VmGoneError:
            return True
        try:
            if monitor.peer_pid == pid:
                monitor.resume_left_paused()
        finally:
            monitor.close()
    return True
