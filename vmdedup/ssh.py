"""The way to the daemon of another host: the API's Unix socket through the user's own ssh.

    httpx ─▶ socket of `SshWay` ─▶ ssh ═══ sshd ─▶ vmdedup bridge ─▶ vmdedup.sock

Owns one listening socket, which only this user may use, and an ssh process for each of its
connections; the connection is that process's stdin and stdout, so no byte is copied here.
Keys, config and known_hosts are the user's; nothing is ever asked for. Promises one line of
explanation if ssh or the other side fails. Nothing is left behind if this process is killed:
the socket has no place in the file system, and ssh ends with its stdin. Refuses a destination
that ssh or a shell could take for anything but a name.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass

from vmdedup.errors import UsageError, VmdedupError

SCHEME = "ssh://"

_DESTINATION = re.compile(
    r"ssh://(?:([A-Za-z0-9_][A-Za-z0-9_.+-]*)@)?"
    r"([A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\])"
    r"(?::([0-9]{1,5}))?/?"
)
"""User, host, port. No part can begin with `-`, or hold anything that a shell acts on."""

_OPTIONS = (
    "BatchMode=yes",  # never ask: no terminal may be there, and several hosts are asked at once
    "ConnectTimeout=10",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
    "ControlMaster=no",  # an existing master is used; we end our processes, and are none
    "LogLevel=ERROR",  # no banner among the reasons
)
_REMOTE = ("vmdedup", "bridge")
_NO_COMMAND, _SSH_FAILED = 127, 255
_END_LIMIT_S = 2.0
_KEPT_BYTES = 4096
_LINE_CHARACTERS = 300


@dataclass(frozen=True)
class Destination:
    """A host as ssh knows it: a name, an address, or an alias in the user's config."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, url: str) -> Destination:
        """The destination that `ssh://[user@]host[:port]` names. Raises UsageError."""
        match = _DESTINATION.fullmatch(url)
        port = int(match[3]) if match and match[3] else None
        if match is None or (port is not None and not 0 < port < 65536):
            shown = "".join(c if c.isprintable() else "?" for c in url)[:_LINE_CHARACTERS]
            raise UsageError(
                f"{shown}: write ssh://[user@]host[:port], or https://host[:port] to read only"
            )
        return cls(match[2].strip("[]"), match[1], port)

    @property
    def command(self) -> list[str]:
        """The ssh command that reaches the other side's daemon on its stdin and stdout."""
        words = ["ssh", "-T"]
        words += [word for option in _OPTIONS for word in ("-o", option)]
        words += ["-l", self.user] if self.user else []
        words += ["-p", str(self.port)] if self.port else []
        return [*words, "--", self.host, *_REMOTE]


class SshWay:
    """A local socket, each connection to which is one to the other host's daemon.

    `path` is its address, in the abstract namespace. `close` ends all connections.
    """

    def __init__(self, url: str) -> None:
        self.destination = Destination.parse(url)
        self._changed = threading.Condition()
        self._running: list[subprocess.Popen[bytes]] = []
        self._failure: str | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # the kernel chooses a free name
        self._listener.listen()
        self.path: str = self._listener.getsockname().decode()
        threading.Thread(target=self._serve, name="vmdedup-ssh", daemon=True).start()

    def close(self) -> None:
        """Take no more connections, and end the ssh processes. May be called twice."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, _END_LIMIT_S)
            for process in self._running:
                process.kill()
            self._changed.wait_for(lambda: not self._running, _END_LIMIT_S)

    def failure(self) -> str | None:
        """Why the last connection failed, in one line; `None` if ssh did not fail."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._running, _END_LIMIT_S)
            failure, self._failure = self._failure, None
        return failure

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # it was closed
            with connection:
                if _user_of(connection) == os.geteuid():
                    self._start(connection)

    def _start(self, connection: socket.socket) -> None:
        """Give the connection to an ssh process of its own."""
        try:
            process = subprocess.Popen(
                self.destination.command,
                stdin=connection.fileno(),
                stdout=connection.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C ends the request first, ssh after it
            )
        except OSError as error:
            with self._changed:
                self._failure = f"ssh cannot be started: {error.strerror or error}"
            return
        with self._changed:
            self._running.append(process)
        threading.Thread(
            target=self._follow, args=(process,), name="vmdedup-ssh", daemon=True
        ).start()

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Note how an ssh process ends, with the last it said."""
        said = b""
        with process:
            assert process.stderr is not None
            while some := os.read(process.stderr.fileno(), _KEPT_BYTES):
                said = (said + some)[-_KEPT_BYTES:]
        with self._changed:
            # It ends so, and silently, when we have closed its connection in mid-answer.
            if process.returncode and (said or process.returncode != _SSH_FAILED):
                self._failure = reason(process.returncode, said.decode(errors="replace"))
            self._running.remove(process)
            self._changed.notify_all()


def reason(exit_code: int, said: str) -> str:
    """Why ssh ended with this exit code, from what it and the other side said on stderr."""
    lines = [_printable(line) for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if exit_code == _NO_COMMAND:
        return "no vmdedup there: install it, or put it into the PATH that ssh sets for commands"
    if 0 < exit_code != _SSH_FAILED:
        return last.removeprefix("vmdedup: ") or f"`vmdedup bridge` ended there ({exit_code})"
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
        return "its host key has changed: ask its administrator, then correct known_hosts"
    if "Host key verification failed" in said:
        return "its host key is not known: connect once with ssh, or add it to known_hosts"
    if "Permission denied" in said:
        return f"ssh: it accepts no key of yours, and no password is asked for: {last}"
    return f"ssh: {last.removeprefix('ssh: ') or f'it was ended by signal {-exit_code}'}"


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether this is a URL of another host, and not the path of a socket."""
    return isinstance(place, str) and "://" in place


def host_in_environment() -> str | None:
    """The host that VMDEDUP_HOST names, `None` without."""
    return os.environ.get("VMDEDUP_HOST") or None


def bridge(path: str) -> None:
    """Copy stdin to the daemon's socket, and its answers to stdout, until one of them ends.

    Raises VmdedupError if nothing answers at the socket.
    """
    with socket.socket(socket.AF_UNIX) as daemon:
        try:
            daemon.connect(path)
        except OSError as error:
            raise VmdedupError(_unreached(path, error)) from error
        threading.Thread(target=_send_stdin, args=(daemon,), daemon=True).start()
        with suppress(ConnectionError):
            while some := daemon.recv(1 << 16):
                _write_all(1, some)


def _send_stdin(daemon: socket.socket) -> None:
    with suppress(OSError):
        while some := os.read(0, 1 << 16):
            daemon.sendall(some)
        daemon.shutdown(socket.SHUT_WR)


def _write_all(number: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(number, view) :]


def _unreached(path: str, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"no permission for {path} there: log in as root, or as one of the socket's group"
    if isinstance(error, FileNotFoundError):
        return f"no service at {path} there: start `vmdedup run`"
    return f"no service answers at {path} there: {error.strerror or error}"


def _user_of(connection: socket.socket) -> int:
    """The user at the other end."""
    layout = struct.Struct("3i")  # struct ucred: pid, uid, gid
    ends = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return int(layout.unpack(ends)[1])


def _printable(line: str) -> str:
    """A line from another host without what a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in line).strip()[:_LINE_CHARACTERS]
