"""/proc/PID/net/unix: the Unix sockets of a network namespace.

Owns its format. Reads only.
"""

from __future__ import annotations

from pathlib import Path

_CONNECTED = 0x03
"""State of a connected socket (include/uapi/linux/net.h: SS_CONNECTED)."""


def sockets_with_clients(pid: int) -> frozenset[str]:
    """Paths of the listening sockets whose server has accepted a client that is still there.

    Sees the network namespace of process `pid`; empty if that cannot be read. The paths are as
    they were bound. A client that waits to be accepted counts for nothing.
    """
    try:
        lines = Path(f"/proc/{pid}/net/unix").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    return frozenset(path for line in lines[1:] if (path := _served_path(line)) is not None)


def _served_path(line: str) -> str | None:
    """`Num RefCount Protocol Flags Type St Inode Path`: the path of an accepted connection.

    The client's end has no path, unless it was bound; the server's end has the listener's. It
    has no inode until it is accepted (net/unix/af_unix.c: unix_seq_show).
    """
    fields = line.split(None, 7)
    if len(fields) < 8 or int(fields[5], 16) != _CONNECTED or fields[6] == "0":
        return None
    return fields[7]
