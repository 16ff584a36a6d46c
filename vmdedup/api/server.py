"""The API server process: started by the engine, ends with it, holds no userfaultfd.

Owns the process: its sockets come as descriptors from `vmdedup.daemon.api_process`,
already listening, so that requests wait while it starts. Promises to end when
the engine does: the channel's end tells it, and the kernel (PR_SET_PDEATHSIG)
if the channel does not. Requests under way are first answered "the engine has ended".
It has no capabilities. Refuses to run without the engine that started it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from vmdedup.api.bounded_listener import BoundedListener
from vmdedup.api.engine_link import EngineLink
from vmdedup.api.historian import Historian
from vmdedup.api.http import make_app
from vmdedup.errors import UsageError
from vmdedup.history.place import HistoryPlan
from vmdedup.ipc.channel import ChannelError, ServerChannel
from vmdedup.linux import capabilities
from vmdedup.linux.process import end_with
from vmdedup.tls import TlsFiles

_END_LIMIT_S = 1
_MAX_CONNECTIONS = 128


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: two of them run here, in one loop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: ASGIApp, context: ssl.SSLContext | None = None) -> _Server:
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_END_LIMIT_S,
    )
    if context is not None:
        # With its own options, older versions of uvicorn allow weak ciphers.
        config.load()
        config.ssl = context
    return _Server(config)


async def serve(
    channel_socket: socket.socket,
    listener: socket.socket,
    tcp_listener: socket.socket | None,
    tls_listener: tuple[socket.socket, TlsFiles] | None,
    plan: HistoryPlan | None,
) -> None:
    """Serve until the engine is gone or SIGTERM comes. Raises ChannelError."""
    link = EngineLink(await ServerChannel.open(channel_socket), version("vmdedup"))
    historian = Historian(link, plan)
    servers = [(_server(make_app(link, historian, "unix")), listener)]
    if tcp_listener is not None:
        servers.append((_server(make_app(link, historian, "loopback")), tcp_listener))
    if tls_listener is not None:
        tls_socket, files = tls_listener
        try:
            server = _server(make_app(link, historian, "tls"), files.server_context())
        except UsageError as error:
            # The engine tried the files when it started: they have changed since.
            print(f"vmdedup API server: no HTTPS: {error}", file=sys.stderr)
        else:
            servers.append((server, BoundedListener(tls_socket)))

    def end() -> None:
        # If anything hangs then, the kernel ends the process.
        signal.alarm(_END_LIMIT_S + 1)
        for server, _ in servers:
            server.should_exit = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end)
    async with asyncio.TaskGroup() as group:
        listening = [group.create_task(server.serve([sock])) for server, sock in servers]
        following = group.create_task(link.run())
        following.add_done_callback(lambda _: end())
        noting = group.create_task(historian.run())
        await asyncio.wait(listening)
        following.cancel()
        noting.cancel()
        await historian.close()


def main() -> None:
    """The process: `server --engine-pid N --channel-fd N --socket-fd N`, and optional words."""
    capabilities.keep_only(capabilities.API_SERVER)
    parser = argparse.ArgumentParser(prog="vmdedup-api")
    for name in ("engine-pid", "channel-fd", "socket-fd"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--tcp-fd", type=int)
    parser.add_argument("--tls-fd", type=int)
    parser.add_argument("--tls-files", type=Path, nargs=3)
    parser.add_argument("--history", type=Path)
    parser.add_argument("--history-interval-s", type=int)
    parser.add_argument("--history-days", type=int)
    arguments = parser.parse_args()
    plan = None
    if arguments.history is not None:
        days = arguments.history_days
        plan = HistoryPlan(arguments.history, arguments.history_interval_s, days)
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    end_with(arguments.engine_pid)
    tcp = socket.socket(fileno=arguments.tcp_fd) if arguments.tcp_fd is not None else None
    tls = None
    if arguments.tls_fd is not None:
        tls = socket.socket(fileno=arguments.tls_fd), TlsFiles(*arguments.tls_files)
    channel_socket = socket.socket(fileno=arguments.channel_fd)
    listener = socket.socket(fileno=arguments.socket_fd)
    try:
        asyncio.run(serve(channel_socket, listener, tcp, tls, plan))
    except* ChannelError as errors:
        sys.exit(f"vmdedup API server: {errors.exceptions[0]}")


if __name__ == "__main__":
    main()
