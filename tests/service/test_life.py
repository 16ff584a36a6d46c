"""The server process: how it starts, who may talk to it, and that it ends with the engine."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.service.conftest import over
from tests.service.engine import ScriptedEngine
from tests.service.test_client import unclosed_by_httpcore
from vmdedup.client import Client, ServiceError, ServiceUnreachableError
from vmdedup.daemon.api_process import ApiServer
from vmdedup.errors import UsageError
from vmdedup.ipc.channel import ChannelError
from vmdedup.ipc.protocol import Command

pytestmark = pytest.mark.process

_REPOSITORY = Path(__file__).parent.parent.parent


def ended_within(pidfd: int, limit_s: float) -> bool:
    return bool(select.select([pidfd], [], [], limit_s)[0])


def test_requests_wait_while_the_server_starts(tmp_path: Path) -> None:
    with ScriptedEngine(tmp_path) as engine, Client(engine.api.path) as client:
        engine.push()
        assert client.health().server_pid == engine.api.pid


def test_the_socket_is_for_root_and_the_group_alone(tmp_path: Path) -> None:
    with ApiServer(tmp_path, group="4242") as api:
        found = api.path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert (found.st_uid, found.st_gid) == (os.geteuid(), 4242)
        folder = tmp_path.stat()
        assert (stat.S_IMODE(folder.st_mode), folder.st_gid) == (0o710, 4242)
        assert [path.name for path in tmp_path.glob("*.sock")] == [api.path.name]
    assert list(tmp_path.iterdir()) == []


def test_without_a_group_the_directory_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with ApiServer(tmp_path) as api:
        assert stat.S_IMODE(api.path.stat().st_mode) == 0o660
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_dead_engines_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "vmdedup.sock"))
    with ScriptedEngine(tmp_path) as engine, Client(engine.api.path) as client:
        engine.push()
        assert client.health().server_pid == engine.api.pid


def test_impossible_sockets_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        ApiServer(tmp_path / ("x" * 120))
    with pytest.raises(UsageError, match="no such group"):
        ApiServer(tmp_path, group="no-such-group-here")
    with pytest.raises(UsageError, match="No such file"):
        ApiServer(tmp_path / "missing")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="in use"):
        ApiServer(tmp_path, tcp_port=taken.getsockname()[1])
    with pytest.raises(UsageError, match="not a port"):
        ApiServer(tmp_path, tcp_port=70_000)
    assert list(tmp_path.iterdir()) == []


def test_the_server_has_its_own_descriptors_only(own_engine: ScriptedEngine) -> None:
    """Whatever the engine holds, userfaultfds above all, must not be held by the server."""
    secret = os.memfd_create("held-by-the-engine", 0)
    os.set_inheritable(secret, True)
    try:
        own_engine.pause()
        own_engine.api.restart()
        own_engine.push()
        with Client(own_engine.api.path) as client:
            client.health()
        folder = Path(f"/proc/{own_engine.api.pid}/fd")
        held = []
        for fd in folder.iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                held.append(os.readlink(fd))
    finally:
        os.close(secret)
    kinds = {name.split(":")[0] for name in held[3:]}
    assert not any("held-by-the-engine" in name for name in held)
    assert kinds <= {"socket", "anon_inode"}


def test_a_restarted_server_serves_at_the_same_socket(own_engine: ScriptedEngine) -> None:
    os.kill(own_engine.api.pid, signal.SIGKILL)
    own_engine._thread.join(10)
    assert isinstance(own_engine.failure, ChannelError)
    with ThreadPoolExecutor(1) as pool, Client(own_engine.api.path) as client:
        waiting = pool.submit(client.report)
        own_engine.api.restart()
        own_engine.push()
        assert len(waiting.result(30).vms) == 2


def test_the_server_ends_when_the_engine_closes(tmp_path: Path) -> None:
    with ScriptedEngine(tmp_path) as engine:
        engine.push()
        with Client(engine.api.path) as client:
            client.health()
        pidfd = os.pidfd_open(engine.api.pid)
        engine.pause()
        engine.api.channel.close()
        assert ended_within(pidfd, 30)
        os.close(pidfd)


def test_who_waits_is_told_that_the_engine_ended(own_engine: ScriptedEngine) -> None:
    begun = threading.Event()

    def hold(_: Command) -> None:
        begun.set()

    own_engine.answer = hold
    with ThreadPoolExecutor(2) as pool, Client(own_engine.api.path) as client:
        changing = pool.submit(client.merge)
        listening = pool.submit(client.events, 0, wait_s=60)
        assert begun.wait(10)
        time.sleep(0.2)
        own_engine.pause()
        own_engine.api.channel.close()
        for waiting in (changing, listening):
            with pytest.raises(ServiceError, match="the engine has ended") as told:
                waiting.result(10)
            assert (told.value.status, told.value.kind) == (503, "gone")


def test_a_busy_engine_is_told_and_begins_nothing_later(own_engine: ScriptedEngine) -> None:
    """503 `busy` is a promise: the engine leaves such a request out when it looks again."""
    own_engine.pause()
    with Client(own_engine.api.path) as client:
        with pytest.raises(ServiceError) as refused:
            client.detach("web")
        assert (refused.value.status, refused.value.kind) == (503, "busy")
        assert client.report().converged, "reads need no engine"
        assert own_engine.api.channel.poll() == []


@unclosed_by_httpcore
def test_after_the_end_the_client_says_so(tmp_path: Path) -> None:
    with ScriptedEngine(tmp_path) as engine:
        path = engine.api.path
    with Client(path) as client, pytest.raises(ServiceUnreachableError, match="vmdedup run"):
        client.report()


def test_sigterm_ends_the_server_and_an_open_connection_does_not_hold_it(
    own_engine: ScriptedEngine,
) -> None:
    with over(own_engine.api.path) as http:
        http.get("/v1/health")
        pidfd = os.pidfd_open(own_engine.api.pid)
        os.kill(own_engine.api.pid, signal.SIGTERM)
        assert ended_within(pidfd, 30)
        os.close(pidfd)


_ENGINE = """
    import sys, time
    from pathlib import Path
    from vmdedup.daemon.api_process import ApiServer
    api = ApiServer(Path(sys.argv[1]))
    print(api.pid, flush=True)
    if sys.argv[2] == "channel-elsewhere":
        import os
        channel_fd = api.channel._sock.fileno()
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    time.sleep(60)
"""


@pytest.mark.parametrize("case", ["alone", "channel-elsewhere"])
def test_the_server_ends_with_a_killed_engine(tmp_path: Path, case: str) -> None:
    """By the channel's end; and by the kernel's word where somebody else holds the channel."""
    command = [sys.executable, "-c", textwrap.dedent(_ENGINE), str(tmp_path), case]
    engine = subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=_REPOSITORY, start_new_session=True
    )
    try:
        assert engine.stdout is not None
        with engine.stdout:
            pidfd = os.pidfd_open(int(engine.stdout.readline()))
        time.sleep(2)
        engine.kill()
        engine.wait()
        assert ended_within(pidfd, 30)
        os.close(pidfd)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGKILL)
        engine.wait()
