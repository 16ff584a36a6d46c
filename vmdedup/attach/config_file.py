"""Files given to QEMU with `-readconfig`: their sections, as options of a command line.

Owns the file's syntax (QEMU's util/qemu-config.c: qemu_config_foreach) and finding it as QEMU
saw it. Promises to read only a file that QEMU has read in this very state: one that was
changed since QEMU started says nothing of it, and counts as unreadable. Never opens a file
that may lie on storage that hangs. Reads only.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmdedup.linux.filesystems import LOCAL_FILESYSTEMS
from vmdedup.linux.mounts import filesystem_at, mounts, resolved
from vmdedup.linux.process import start_unix_s

OPTION = "-readconfig"
_MOST_BYTES = 1 << 20
_CLOCK_SLACK_S = 2.0
"""The kernel tells the time of a process's start to a second, by the clock as it is now."""

_SECTION = re.compile(r'\[(?P<group>[^\s"\]]{1,63})(?:\s+"(?P<id>[^"]{1,63})")?\s*\]')
_VALUE = re.compile(r'(?P<key>[^\s=]{1,63})\s*=\s*"(?P<value>[^"]{0,1023})"')


class UnreadConfigError(Exception):
    """A configuration file cannot be read as QEMU has read it; the text says why."""


@dataclass(frozen=True)
class CommandLine:
    """Arguments of a QEMU, with what its configuration files say in their places."""

    arguments: list[str]
    unread: str | None = None
    """Why a file could not be read, `None` if all were; its option stays in its place."""


def whole_command_line(pid: int) -> CommandLine:
    """The command line of process `pid`. Raises OSError."""
    raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    arguments = [os.fsdecode(word) for word in raw.rstrip(b"\0").split(b"\0")]
    return with_files(arguments, lambda path: _content(pid, path))


def with_files(arguments: Sequence[str], read: Callable[[str], str]) -> CommandLine:
    """Put the options of each file in its place.

    `read` gives the content of a path, or raises UnreadConfigError.
    """
    whole: list[str] = []
    unread = None
    left = iter(arguments)
    for word in left:
        if word not in (OPTION, f"-{OPTION}"):
            whole.append(word)
            continue
        path = next(left, "")
        try:
            whole += as_options(read(path))
        except UnreadConfigError as error:
            whole += [OPTION, path]
            unread = unread or f"its configuration file {path} {error}"
    return CommandLine(whole, unread)


def as_options(text: str) -> list[str]:
    """`[chardev "c"]`, `path = "/x"` as `-chardev`, `id=c,path=/x`."""
    options: list[str] = []
    for group, fields in _sections(text):
        values = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in fields.items())
        options += [f"-{group}", values]
    return options


def _sections(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    group, fields = None, dict[str, str]()
    for line in map(str.strip, text.splitlines()):
        if section := _SECTION.match(line):
            if group is not None:
                yield group, fields
            group = section["group"]
            fields = {} if section["id"] is None else {"id": section["id"]}
        elif group is not None and (found := _VALUE.match(line)):
            fields[found["key"]] = found["value"]
    if group is not None:
        yield group, fields


def _content(pid: int, path: str) -> str:
    """The file at `path` as process `pid` has read it. Raises UnreadConfigError."""
    seen_by, place = _place(pid, path)
    kind = filesystem_at(mounts(seen_by), resolved(seen_by, path))
    if kind not in LOCAL_FILESYSTEMS:
        raise UnreadConfigError(f"lies on a filesystem that may hang ({kind})")
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnreadConfigError(f"cannot be read any more ({error.strerror})") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UnreadConfigError("is no regular file")
        started = start_unix_s(pid)
        if max(found.st_mtime, found.st_ctime) > started + _CLOCK_SLACK_S:
            raise UnreadConfigError("was changed since the VM was started")
        return os.read(fd, _MOST_BYTES).decode(errors="replace")
    except OSError as error:
        raise UnreadConfigError(f"cannot be read any more ({error.strerror})") from error
    finally:
        os.close(fd)


def _place(pid: int, path: str) -> tuple[int, str]:
    """Through whose root the file is found, and where; a QEMU in a chroot read it outside.

    Raises UnreadConfigError.
    """
    if not path.startswith("/"):
        raise UnreadConfigError("has a relative path, and QEMU's folder may be another by now")
    inside = f"/proc/{pid}/root{path}"
    if os.path.lexists(inside):
        return pid, inside
    try:
        is_ours = os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        is_ours = False
    if not is_ours:
        raise UnreadConfigError("cannot be read any more (No such file or directory)")
    return os.getpid(), path
