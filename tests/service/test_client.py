"""The typed clients: the same calls, clear errors, patience with newer servers."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.service.engine import ScriptedEngine
from vmdedup.client import (
    AsyncClient,
    Client,
    ServiceError,
    ServiceUnreachableError,
    ServiceUsageError,
    _tolerant,
    default_socket,
)
from vmdedup.errors import UsageError
from vmdedup.ipc.protocol import MergeNow
from vmdedup.models import SharingReport

pytestmark = pytest.mark.process

_REPOSITORY = Path(__file__).parent.parent.parent

unclosed_by_httpcore = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
"""httpcore leaves a Unix socket that did not connect to the garbage collector."""


def test_the_async_client_does_what_the_other_does(engine: ScriptedEngine) -> None:
    async def use() -> None:
        async with AsyncClient(engine.api.path) as client:
            reports = await asyncio.gather(client.report(), client.merge(["web"], timeout_s=3))
            assert all(isinstance(report, SharingReport) for report in reports)
            assert (await client.set(run=False)).values == (await client.controls()).values
            assert (await client.register("web", "ram0")).complete
            assert (await client.unregister("web", "ram0")).backend == "ram0"
            assert (await client.attach("/run/vms/new.qmp")).name == "new"
            assert (await client.detach("db")).vm == "db"
            assert (await client.unmerge(["web"])).vms[0].restored_pages == 3000
            assert (await client.health()).engine.engine_pid == os.getpid()
            assert [vm.name for vm in (await client.vms()).vms] == ["web", "db"]
            assert (await client.events(since=(1 << 53) - 1)).events == []
            with pytest.raises(ServiceUsageError, match="no VM named 'nobody'"):
                await client.detach("nobody")

    asyncio.run(use())
    assert MergeNow(vms=["web"], timeout_s=3) in engine.commands


def test_errors_carry_status_and_kind(client: Client) -> None:
    with pytest.raises(ServiceUsageError) as unknown:
        client.unmerge(["nobody"])
    assert (unknown.value.status, unknown.value.kind) == (404, "not-found")
    assert isinstance(unknown.value, UsageError)
    with pytest.raises(ServiceError) as conflict:
        client.attach("/run/vms/web.qmp")
    assert (conflict.value.status, conflict.value.kind) == (409, "conflict")
    assert not isinstance(conflict.value, UsageError)


def test_nonsense_is_refused_without_being_sent(engine: ScriptedEngine, client: Client) -> None:
    for call in (
        lambda: client.merge(timeout_s=-1),
        lambda: client.merge([]),
        client.set,
        lambda: client.register("web", "ram0", offset_bytes=-4096),
        lambda: client.detach(""),
    ):
        with pytest.raises(ServiceUsageError):
            call()
    assert engine.commands == []


def test_a_relative_monitor_path_is_the_callers(engine: ScriptedEngine, client: Client) -> None:
    client.attach("vms/new.qmp")
    (command,) = engine.commands
    assert command.model_dump() == {"qmp": str(Path.cwd() / "vms/new.qmp")}


@unclosed_by_httpcore
def test_no_service(tmp_path: Path) -> None:
    missing = tmp_path / "vmdedup.sock"
    with Client(missing) as client, pytest.raises(ServiceUnreachableError, match="no service at"):
        client.report()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(missing))
    with Client(missing) as client, pytest.raises(ServiceUnreachableError, match="no service answ"):
        client.report()
    with (
        Client(tmp_path / ("x" * 120)) as client,
        pytest.raises(ServiceUnreachableError, match="no service at"),
    ):
        client.report()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_socket_of_another_group(engine: ScriptedEngine) -> None:
    path = engine.api.path
    path.parent.chmod(0o711)
    script = (
        "import os, sys; from vmdedup.client import Client, ServiceUnreachableError\n"
        # Nothing is imported later: that user may not read the environment's files.
        "try: Client('nowhere').report()\n"
        "except ServiceUnreachableError: pass\n"
        "Client(sys.argv[1]).health()\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: Client(sys.argv[1]).report()\n"
        "except ServiceUnreachableError as error: print(error)\n"
    )
    # Relative to the working directory: the folders above are pytest's, and closed.
    command = [sys.executable, "-c", script, path.name]
    environment = {"PYTHONPATH": str(_REPOSITORY)}
    said = subprocess.run(
        command, cwd=path.parent, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "no permission" in said


def test_an_answer_of_something_else(tmp_path: Path) -> None:
    """Another program's socket: an error, not a traceback from a parser."""
    path = tmp_path / "vmdedup.sock"
    for answer in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n<",
        b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n[]",
        b'{"QMP": {}}\r\n',
        b"",
    ):
        path.unlink(missing_ok=True)
        script = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1)\n"
            "print(flush=True); c, _ = s.accept(); c.recv(65536)\n"
            "c.sendall(bytes.fromhex(sys.argv[2])); c.close()\n"
        )
        command = [sys.executable, "-c", script, str(path), answer.hex()]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as stranger, Client(path) as client:
            try:
                assert stranger.stdout is not None
                stranger.stdout.readline()
                with pytest.raises(ServiceError) as error:
                    client.report()
                assert "\n" not in str(error.value)
            finally:
                stranger.kill()


def test_fields_of_a_newer_service_are_passed_over(engine: ScriptedEngine) -> None:
    report = engine.snapshot().report
    newer = json.loads(report.model_dump_json())
    newer["host"]["pages_new"] = 1
    newer["vms"][1]["newer"] = {"deep": []}
    newer["later"] = None
    assert _tolerant(SharingReport, json.dumps(newer).encode()) == report


def test_the_socket_follows_the_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMDEDUP_RUNTIME_DIR", "/run/elsewhere")
    assert default_socket() == Path("/run/elsewhere/vmdedup.sock")
    monkeypatch.delenv("VMDEDUP_RUNTIME_DIR")
    assert default_socket() == Path("/run/vmdedup/vmdedup.sock")


def test_no_request_goes_out_on_a_connection_that_was_long_idle(tmp_path: Path) -> None:
    """The server may be closing it at that very moment."""
    path = tmp_path / "service.sock"
    accepted = []

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                accepted.append(connection)
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while connection.recv(1 << 16):
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")

    with socket.socket(socket.AF_UNIX) as listener, Client(path) as client:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        for pause_s in (0, 0, 2.5):
            time.sleep(pause_s)
            with pytest.raises(ServiceError):
                client.health()
        listener.shutdown(socket.SHUT_RDWR)
    assert len(accepted) == 2
