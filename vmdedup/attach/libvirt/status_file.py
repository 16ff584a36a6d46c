"""The trace of a suspend that changed nothing.

`virsh suspend` of a domain that is already paused succeeds, tells nobody and leaves
libvirt's state unchanged. A client that has paused the domain for a moment, as our
fallback does, cannot ask libvirt whether somebody else suspended it meanwhile. But
libvirt then saves the domain's status file (qemuDomainSuspend: virDomainObjSave), with
unchanged content. It also saves the file after each command through its monitor, and we
know our own commands; it does not save after its own queries. An additional save with
the old content is therefore somebody else's doing.

Owns finding the file, also if libvirt's daemon has a mount namespace of its own,
and counting its saves. If the file cannot be found, nothing is seen.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from vmdedup.attach.libvirt.processes import daemon_of

_SYSTEM_STATE = "/run/libvirt/qemu"
_IN_MOVED_TO = 0x80
_EVENT = struct.Struct("iIII")
_READ_BYTES = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


class StatusFile:
    """The status file of the domain `name` of the libvirt at `uri`, watched. Close it."""

    def __init__(self, uri: str, name: str) -> None:
        self._file = f"{name}.xml"
        self._folder = _state_folder(uri)
        self._fd = -1
        if self._folder is not None and "/" not in name:
            self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            where = os.fsencode(self._folder)
            if self._fd >= 0 and _libc.inotify_add_watch(self._fd, where, _IN_MOVED_TO) < 0:
                self.close()

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def saves(self) -> int:
        """How often it was saved since the last call: each save replaces the file."""
        count = 0
        while self._fd >= 0:
            try:
                raw = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                break
            place = 0
            while place < len(raw):
                *_, length = _EVENT.unpack_from(raw, place)
                place += _EVENT.size + length
                name = raw[place - length : place].rstrip(b"\0")
                count += name == os.fsencode(self._file)
        return count

    def content(self) -> bytes | None:
        """The file's content; `None` if it cannot be read."""
        if self._folder is None:
            return None
        try:
            return (self._folder / self._file).read_bytes()
        except OSError:
            return None


def _state_folder(uri: str) -> Path | None:
    address = urlsplit(uri)
    if address.path == "/session":
        runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
        (socket, *_) = parse_qs(address.query).get("socket", [f"{runtime}/libvirt/libvirt-sock"])
        return Path(socket).parent / "qemu/run"
    pid = daemon_of(uri)
    return None if pid is None else Path(f"/proc/{pid}/root{_SYSTEM_STATE}")
