"""The engine's side of the API server: sockets, start, restart, end.

Owns the API's Unix socket, which has its final mode from the first instant, the optional
TCP port on loopback, and the optional one for other hosts, with certificates. The engine keeps
all open, so that requests wait while the server starts or restarts. Promises that the server
gets exactly the descriptors it needs. Refuses a group that does not exist, a path that is
too long for a Unix socket, and certificates that cannot be used.
"""

from __future__ import annotations

import grp
import os
import socket
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vmdedup.closing import Closing
from vmdedup.daemon.own_program import command_of
from vmdedup.errors import UsageError
from vmdedup.history.place import HistoryPlan
from vmdedup.ipc.channel import ChannelError, EngineChannel, channel_pair
from vmdedup.ipc.protocol import SOCKET_NAME, Refusal
from vmdedup.models import Model
from vmdedup.tls import TlsFiles

_BACKLOG = 128
_END_LIMIT_S = 3.0


@dataclass(frozen=True)
class TlsListener:
    """Where the server listens for other hosts, and its certificates."""

    address: str
    port: int
    files: TlsFiles


class ApiServer(Closing):
    """The running API server, its channel and its sockets. A context manager.

    Make it in the engine's main thread: the kernel ends the server with the
    thread that started it. Needs the runtime directory's lock: an older socket
    there counts as a dead engine's and is replaced.
    """

    def __init__(
        self,
        runtime_dir: Path,
        *,
        group: str | None = None,
        mode: int = 0o660,
        tcp_port: int | None = None,
        tls: TlsListener | None = None,
        history: HistoryPlan | None = None,
    ) -> None:
        self.path = runtime_dir / SOCKET_NAME
        self._history = history
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        with ExitStack() as exits:
            self._listener = exits.enter_context(_unix_listener(self.path, group, mode))
            self._inode = self.path.stat().st_ino
            exits.callback(self._unlink)
            self._tcp_listener: socket.socket | None = None
            if tcp_port is not None:
                self._tcp_listener = exits.enter_context(_tcp_listener("127.0.0.1", tcp_port))
            self._tls_listener: socket.socket | None = None
            if tls is not None:
                _require_usable(tls.files)
                self._tls_listener = exits.enter_context(_tcp_listener(tls.address, tls.port))
            self.channel = self._start()
            exits.pop_all()

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def tcp_port(self) -> int | None:
        """The loopback port that the server listens on; `None` without one."""
        return None if self._tcp_listener is None else int(self._tcp_listener.getsockname()[1])

    @property
    def tls_port(self) -> int | None:
        """The port for other hosts; `None` without one."""
        return None if self._tls_listener is None else int(self._tls_listener.getsockname()[1])

    def restart(self) -> None:
        """After a ChannelError: end the server and start a new one, with a new `channel`.

        Requests that were not answered are lost to their clients (the connection
        ends); those that wait in the socket's queue are served.
        """
        self._end()
        self.channel = self._start()

    def reply(self, request_id: int, result: Model) -> None:
        """Answer a request with a model, or refuse it with a Refusal.

        The next poll notices a server that is gone, and starts it again.
        """
        with suppress(ChannelError):
            if isinstance(result, Refusal):
                self.channel.refuse(request_id, result)
            else:
                self.channel.reply(request_id, result)

    def close(self) -> None:
        """End the server and remove its socket. Idempotent."""
        if self._process is None:
            return
        self._unlink()
        self._end()
        for listener in (self._listener, self._tcp_listener, self._tls_listener):
            if listener is not None:
                listener.close()

    def _unlink(self) -> None:
        """Remove the socket, unless it belongs to another engine by now."""
        with suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _start(self) -> EngineChannel:
        engine_end, server_end = channel_pair()
        with server_end:
            lent = {"--channel-fd": server_end.fileno(), "--socket-fd": self._listener.fileno()}
            if self._tcp_listener is not None:
                lent["--tcp-fd"] = self._tcp_listener.fileno()
            if self._tls_listener is not None:
                lent["--tls-fd"] = self._tls_listener.fileno()
            options = [word for name, fd in lent.items() for word in (name, str(fd))]
            command = command_of("vmdedup.api.server")
            command += ["--engine-pid", str(os.getpid()), *options]
            if self._tls is not None:
                files = self._tls.files
                command += ["--tls-files", *map(str, (files.certificate, files.key, files.ca))]
            if self._history is not None:
                command += ["--history", str(self._history.directory)]
                command += ["--history-interval-s", str(self._history.interval_s)]
                command += ["--history-days", str(self._history.days)]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=tuple(lent.values()),
                    start_new_session=True,
                )
            except BaseException:
                engine_end.close()
                raise
        return EngineChannel(engine_end)

    def _end(self) -> None:
        """Close the channel, which ends the server; kill a server that does not end."""
        self.channel.close()
        assert self._process is not None
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            # A hanging disk may delay its end even now; the engine must go on.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_LIMIT_S)
        self._process = None


def _unix_listener(path: Path, group: str | None, mode: int) -> socket.socket:
    """A listening socket that appears at `path` with its final owner and mode."""
    draft = path.with_name(f".{path.name}.draft")
    if len(os.fsencode(draft)) > 107:
        raise UsageError(f"socket {path}: the path is too long; choose a shorter runtime directory")
    gid = -1 if group is None else _gid(group)
    with ExitStack() as exits:
        listener = exits.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        # The kernel gives the new file the mode of the socket: nobody can connect early.
        os.fchmod(listener.fileno(), 0o600)
        draft.unlink(missing_ok=True)
        try:
            listener.bind(str(draft))
            exits.callback(draft.unlink, missing_ok=True)
            os.chown(draft, -1, gid)
            draft.chmod(mode)
            if group is not None:
                os.chown(path.parent, -1, gid)
                path.parent.chmod(0o710)
            listener.listen(_BACKLOG)
            draft.rename(path)
        except OSError as error:
            raise UsageError(f"socket {path}: {error.strerror}") from error
        exits.pop_all()
    return listener


def _tcp_listener(address: str, port: int) -> socket.socket:
    """A listening socket at an address of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    shown = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    if not 0 <= port <= 0xFFFF:
        raise UsageError(f"TCP port {shown}: not a port")
    try:
        return socket.create_server(
            (address, port),
            family=family,
            backlog=_BACKLOG,
            dualstack_ipv6=address == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise UsageError(f"TCP port {shown}: {os.strerror(error.errno or 0)}") from error


def _require_usable(files: TlsFiles) -> None:
    """Raise UsageError for files that the server could not use."""
    try:
        files.server_context()
    except UsageError as error:
        raise UsageError(f"setting api_tls: {error}") from error


def _gid(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"socket group {group!r}: no such group") from None
