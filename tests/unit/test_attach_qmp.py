"""Connecting to sockets that are not a monitor, or one that misbehaves.

The peers are real unix sockets, served by a thread of the test.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from vmdedup.attach import replies
from vmdedup.attach.monitor import COMMAND_TIMEOUT_S
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.attach.qmp_client import EVENT_QUEUE
from vmdedup.errors import AttachError, MonitorError, UsageError

pytestmark = pytest.mark.unit

TIMEOUT_S = 0.5
GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 1}}, "capabilities": []}}\n'
)
Serve = Callable[[socket.socket], None]


@pytest.fixture
def loop() -> Iterator[MonitorLoop]:
    with MonitorLoop() as running:
        yield running


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Callable[[Serve], Path]]:
    """Start a server whose connections are given to `serve`, one after the other."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(serve: Serve) -> Path:
        path = tmp_path / f"peer{len(listeners)}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(1)
        listeners.append(listener)

        def run() -> None:
            try:
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        serve(connection)
            except OSError:
                return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        threads.append(thread)
        return path

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join(5)


def say(text: bytes) -> Serve:
    """Send `text`, then wait until the client leaves."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(text)
        while connection.recv(65536):
            pass

    return serve


def requests(connection: socket.socket) -> Iterator[tuple[str, str]]:
    """(command, id) of each request; clients send no line ends."""
    text = ""
    while chunk := connection.recv(65536):
        text += chunk.decode()
        while text.strip():
            try:
                request, end = json.JSONDecoder().raw_decode(text.lstrip())
            except json.JSONDecodeError:
                break
            text = text.lstrip()[end:]
            yield request["execute"], request["id"]


def answering(answers: Callable[[str, str], bytes], *, before: bytes = b"") -> Serve:
    """A monitor: greeting, negotiation, then `answers(command, id)` to each command."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(GREETING + before)
        for command, number in requests(connection):
            if command == "qmp_capabilities":
                connection.sendall(reply({}, number))
            else:
                connection.sendall(answers(command, number))

    return serve


def reply(value: object, number: str) -> bytes:
    return json.dumps({"return": value, "id": number}).encode() + b"\n"


def refused(path: Path, loop: MonitorLoop) -> str:
    """The reason for which connecting fails, in bounded time."""
    began = time.monotonic()
    with pytest.raises(AttachError) as caught:
        QmpMonitor.connect(path, loop, timeout_s=TIMEOUT_S)
    assert time.monotonic() - began < 10 * TIMEOUT_S
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value.reason


def test_no_socket_there(tmp_path: Path, loop: MonitorLoop) -> None:
    assert refused(tmp_path / "nothing", loop) == "no socket there"


def test_a_file_is_not_a_socket(tmp_path: Path, loop: MonitorLoop) -> None:
    path = tmp_path / "file"
    path.write_text("{}")
    assert refused(path, loop) == "not a socket"


def test_a_stale_socket_refuses(tmp_path: Path, loop: MonitorLoop) -> None:
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert "stale" in refused(path, loop)


def test_a_datagram_socket_is_not_qmp(tmp_path: Path, loop: MonitorLoop) -> None:
    path = tmp_path / "datagram"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        assert "not a QMP socket" in refused(path, loop)


def test_silence_means_busy(peer: Callable[[Serve], Path], loop: MonitorLoop) -> None:
    reason = refused(peer(say(b"")), loop)
    assert "busy" in reason
    assert "-qmp" in reason


def test_a_full_backlog_means_busy(tmp_path: Path, loop: MonitorLoop) -> None:
    path = tmp_path / "full"
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        try:
            for _ in range(2):
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(str(path))
            assert "busy" in refused(path, loop)
        finally:
            for one in waiting:
                one.close()


@pytest.mark.parametrize(
    "text",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"\x00\xff\xfe garbage \n",
        b"{}\n",
        b'{"QMP": 3}\n',
        b'{"QMP": {"version": []}}\n',
        b'{"QMP": {"version": {"qemu": {"major": "x"}}, "capabilities": []}}\n',
        b"{" + b'"a":{' * 100_000 + b"\n",
        b'{"n": ' + b"9" * 10_000 + b"}\n",
        b'{"no end',
        b"[1, 2]\n",
    ],
)
def test_garbage_is_refused_in_one_line(
    text: bytes, peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    reason = refused(peer(say(text)), loop)
    assert "not a QMP socket" in reason or "handshake" in reason


def test_an_endless_line_is_refused(peer: Callable[[Serve], Path], loop: MonitorLoop) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(b'{"QMP": "')
        while True:
            connection.sendall(b"x" * 65536)

    refused(peer(serve), loop)


def test_a_peer_that_closes_at_once(peer: Callable[[Serve], Path], loop: MonitorLoop) -> None:
    assert "closed" in refused(peer(lambda connection: None), loop)


def test_a_peer_that_closes_after_the_handshake(
    peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        _, number = next(requests(connection))
        connection.sendall(reply({}, number))

    path = peer(serve)
    with pytest.raises((AttachError, MonitorError)) as caught:
        QmpMonitor.connect(path, loop).execute("query-status")
    assert "closed" in str(caught.value) or "lost" in str(caught.value)


def test_a_human_monitor_is_named(peer: Callable[[Serve], Path], loop: MonitorLoop) -> None:
    text = b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "
    assert "human monitor" in refused(peer(say(text)), loop)


def test_qmp_without_a_qemu_version_is_not_a_qemu(
    peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        for _, number in requests(connection):
            connection.sendall(reply({}, number))

    assert "not a QEMU" in refused(peer(serve), loop)


def test_answers_to_an_earlier_client_are_never_ours(
    peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    stale = b"".join(
        reply("stale", f"{old}{n}") for old in ("vmdedup-0-", "__qmp#0000") for n in range(3)
    )

    def answer(command: str, number: str) -> bytes:
        return stale + reply("fresh", number)

    with QmpMonitor.connect(peer(answering(answer, before=stale)), loop) as monitor:
        assert monitor.version == (7, 2, 1)
        assert [monitor.execute("query-x") for _ in range(3)] == ["fresh"] * 3


def test_ids_are_unique_over_clients(peer: Callable[[Serve], Path], loop: MonitorLoop) -> None:
    seen: list[str] = []

    def answer(command: str, number: str) -> bytes:
        seen.append(number)
        return reply({}, number)

    path = peer(answering(answer))
    for _ in range(20):
        with QmpMonitor.connect(path, loop) as monitor:
            monitor.execute("a")
            monitor.execute("b")
    assert len(set(seen)) == 40
    # QEMU reads each of their bytes by itself.
    assert max(map(len, seen)) < 12


@pytest.mark.parametrize("late", [1, 3])
def test_a_silent_monitor_fails_at_once_until_its_late_answers_come(
    late: int, peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    """One command, or several at once. They are dropped, and the monitor lives on."""
    asked: list[str] = []
    release = threading.Event()

    def answer(command: str, number: str) -> bytes:
        asked.append(command)
        if command == "slow":
            release.wait(20)
        return reply(command, number)

    with QmpMonitor.connect(peer(answering(answer)), loop) as monitor:
        assert monitor.outage is None
        with pytest.raises(MonitorError, match="no answer within") as first:
            monitor.execute_all([("slow", None)] * late, timeout_s=0.2)
        assert first.value.unanswered
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(MonitorError, match=r"does not answer since .*slow") as again:
                monitor.execute("quick")
            assert again.value.unanswered
        assert time.monotonic() - began < COMMAND_TIMEOUT_S
        assert monitor.outage is not None
        release.set()
        assert becomes_true(lambda: monitor.outage is None)
        assert monitor.execute("quick") == "quick"
    assert asked == ["slow"] * late + ["quick"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "ID"}\n',
        b'{"error": 5, "id": "ID"}\n',
        b'{"error": {"class": [], "desc": 1}, "id": "ID"}\n',
        b'{"error": {"class": "C", "desc": "a\\u001b[2J\\n\\ud800b"}, "id": "ID"}\n',
        b"nonsense\n",
        b'{"error": {"class": "C", "desc": "no id"}}\n',
        b'{"return": ' + b"[" * 50_000 + b"\n",
        b"\n",
    ],
)
def test_a_malformed_answer_costs_at_most_the_connection(
    line: bytes, peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    def answer(command: str, number: str) -> bytes:
        return line.replace(b"ID", number.encode())

    with QmpMonitor.connect(peer(answering(answer)), loop) as monitor:
        with pytest.raises(MonitorError) as caught:
            monitor.query("query-status", replies.StatusReply, timeout_s=TIMEOUT_S)
        assert str(caught.value).isprintable()
        str(caught.value).encode()


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        {"status": "x" * 10_000, "running": True},
        {"status": "\ud800", "running": True},
        {"status": "running"},
        [[]],
    ],
)
def test_an_answer_of_another_shape_is_a_monitor_error(
    value: object, peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    path = peer(answering(lambda command, number: reply(value, number)))
    with (
        QmpMonitor.connect(path, loop) as monitor,
        pytest.raises(MonitorError, match="unexpected reply"),
    ):
        monitor.status()


def test_a_peer_that_hangs_up_is_a_monitor_error_while_it_lives(
    peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        incoming = requests(connection)
        _, number = next(incoming)
        connection.sendall(reply({}, number))
        next(incoming)

    with QmpMonitor.connect(peer(serve), loop) as monitor:
        assert monitor.peer_pid == os.getpid()
        for _ in range(2):
            with pytest.raises(MonitorError, match="connection was lost"):
                monitor.execute("query-status")


def test_events_are_bounded_and_drained(peer: Callable[[Serve], Path], loop: MonitorLoop) -> None:
    flood = b"".join(b'{"event": "E", "data": {"n": %d}}\n' % n for n in range(EVENT_QUEUE + 10))
    path = peer(answering(lambda command, number: flood + reply({}, number)))
    with QmpMonitor.connect(path, loop) as monitor:
        monitor.execute("x")
        events = monitor.events()
        assert [event["data"]["n"] for event in events] == list(range(10, EVENT_QUEUE + 10))
        assert monitor.events() == []


def test_a_long_path_is_reached(
    tmp_path: Path, peer: Callable[[Serve], Path], loop: MonitorLoop
) -> None:
    short = peer(answering(lambda command, number: reply({}, number)))
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    path = short.rename(folder / "qmp.sock")
    with QmpMonitor.connect(path, loop) as monitor:
        assert monitor.execute("x") == {}


def test_after_close_nothing_is_sent(peer: Callable[[Serve], Path], loop: MonitorLoop) -> None:
    monitor = QmpMonitor.connect(peer(answering(lambda command, number: reply({}, number))), loop)
    monitor.close()
    monitor.close()
    with pytest.raises(MonitorError, match="was closed"):
        monitor.execute("x")


def test_a_loop_does_not_wait_for_itself(peer: Callable[[Serve], Path], loop: MonitorLoop) -> None:
    path = peer(answering(lambda command, number: reply({}, number)))

    async def inside(monitor: QmpMonitor) -> object:
        return monitor.execute("x")

    with (
        QmpMonitor.connect(path, loop) as monitor,
        pytest.raises(UsageError, match="own event loop"),
    ):
        loop.call(inside(monitor), 5)


def test_a_closed_loop_is_told_and_nothing_is_left_to_await() -> None:
    with MonitorLoop() as loop:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match="event loop is closed"):
            loop.call(asyncio.sleep(0), 1)
        gc.collect()


def test_work_that_comes_while_the_loop_ends_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed: list[ConnectionAbortedError] = []
    monitors = MonitorLoop()

    def ask() -> None:
        try:
            monitors.call(asyncio.sleep(60), 60)
        except ConnectionAbortedError as error:
            failed.append(error)

    late = threading.Thread(target=ask)
    stop = monitors.loop.stop

    def stop_late() -> None:
        monkeypatch.undo()
        late.start()
        time.sleep(0.2)  # what it asks for waits in the loop
        stop()

    monkeypatch.setattr(monitors.loop, "stop", stop_late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitors.close()
        late.join(10)
        gc.collect()
    assert not late.is_alive()
    assert len(failed) == 1
    assert monitors.loop.is_closed()


def test_nothing_reaches_stderr(
    peer: Callable[[Serve], Path], loop: MonitorLoop, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(peer(say(b'{"QMP": 3}\n')), loop)
    path = peer(answering(lambda command, number: b"nonsense\n"))
    with QmpMonitor.connect(path, loop) as monitor, pytest.raises(MonitorError):
        monitor.execute("x", timeout_s=TIMEOUT_S)
    assert capfd.readouterr() == ("", "")
