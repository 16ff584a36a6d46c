"""The history of a real daemon: over the API and the verb, through kills, and on bad disks."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true
from tests.harness.limits import resize_tmpfs, small_tmpfs
from tests.service.conftest import PRIVATE, SHARED, Start, over
from tests.service.daemon import Daemon, Directories, merged, monitors, running
from tests.service.engine import ScriptedEngine
from vmdedup.client import AsyncClient, Client, ServiceError
from vmdedup.history.database import Database
from vmdedup.history.place import HistoryPlan
from vmdedup.history.series import LEVELS, MAX_POINTS
from vmdedup.ipc.protocol import HistoryHealth
from vmdedup.linux.smaps import process_pss_bytes
from vmdedup.models import History

pytestmark = pytest.mark.qemu

NO_VMS = 'qmp = ["/nonexistent/*"]\nhistory_interval_s = 1\n'
WAIT_S = 30

Need = Callable[[str | None], None]


def times(history: History) -> list[float]:
    return [sample.unix_s for sample in history.samples]


def noted(daemon: Daemon) -> list[float]:
    return times(daemon.client.history(3600, max_points=MAX_POINTS))


def has_noted(daemon: Daemon, number: int = 1) -> bool:
    """Whether there are so many samples; a server that starts anew may not answer."""
    try:
        return len(noted(daemon)) >= number
    except ServiceError:
        return False


def kept(daemon: Daemon) -> HistoryHealth:
    health = daemon.client.health().history
    assert health is not None
    return health


def saved(daemon: Daemon) -> list[float]:
    """What is noted, once all of it is in the file: a dying server may hold that for a moment."""
    assert becomes_true(lambda: kept(daemon).unsaved_samples == 0, WAIT_S), kept(daemon)
    return noted(daemon)


def in_file(path: Path) -> list[float]:
    with Database(path, 1, read_only=True) as database:
        return [row[0] for row in database.rows("fine", 0, 1e12)]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedEngine]:
    """An API server that has noted a sample of what a scripted engine has pushed."""
    (tmp_path / "run").mkdir()
    plan = HistoryPlan(tmp_path / "state", interval_s=1, days=1)
    with ScriptedEngine(tmp_path / "run", tcp_port=0, history=plan) as engine:
        engine.push()
        with Client(engine.api.path) as client:
            assert becomes_true(lambda: bool(client.history().samples), WAIT_S)
        yield engine


def test_what_is_merged_is_in_the_history(
    directories: Directories, start: Start, port: int, need: Need
) -> None:
    need(root_missing())
    vms = [start(SHARED), start(PRIVATE)]
    directories.write(f"history_interval_s = 1\napi_tcp_port = {port}\n")
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        report = daemon.client.report(fresh=True)

        def is_noted() -> bool:
            samples = daemon.client.history().samples
            return bool(samples) and samples[-1].saved_bytes > report.host.saved_bytes // 2

        assert becomes_true(is_noted, WAIT_S)
        newest = daemon.client.history().samples[-1]
        assert newest.vms == 2
        assert newest.present_bytes >= newest.saved_bytes
        assert newest.gates is not None
        assert newest.gates > 0
        assert newest.gate_max_ms is not None
        web, database = (daemon.client.history(vm=vm.name) for vm in vms)
        both = zip(web.samples, database.samples, daemon.client.history().samples, strict=False)
        for one, other, together in both:
            assert one.saved_bytes + other.saved_bytes == together.saved_bytes
        assert web.samples[-1].pages_sharing
        assert web.samples[-1].gates
        assert daemon.client.history(vm="nobody").samples == []
        missing = directories.verb("history", "--vm", "nobody", code=1).stderr
        assert "no sample of nobody of the last 1h" in missing
        assert "saved of" in directories.verb("history", "--vm", vms[0].name).stdout
        before = noted(daemon)
        read_only = httpx.get(f"http://127.0.0.1:{port}/v1/history", params={"since_s": 600})
        seen = History.model_validate_json(read_only.content)
        assert set(before) <= set(times(seen))
        by_daemon = json.loads(directories.verb("history", "--json").stdout)
        page = directories.base / "page.html"
        directories.verb("report", "-o", str(page))
        assert "Saved memory over time" in page.read_text()
        table = directories.verb("history", "--since", "10m").stdout
        assert "saved of" in table.splitlines()[0]
        assert "gate p99" in table
        assert daemon.end() >= 0
    rows = list(csv.DictReader(io.StringIO(directories.verb("history", "--format", "csv").stdout)))
    by_vm = directories.base / "vm.csv"
    directories.verb("history", "--vm", vms[0].name, "-o", str(by_vm))
    assert by_vm.read_text().startswith("time_utc,unix_s,saved_bytes,")
    offline = [float(row["unix_s"]) for row in rows]
    assert offline[: len(by_daemon["samples"])] == [it["unix_s"] for it in by_daemon["samples"]]
    assert max(int(row["saved_bytes"]) for row in rows) >= newest.saved_bytes


def test_no_sample_is_lost_when_engine_or_server_is_killed(directories: Directories) -> None:
    """At random instants; the file is whole after each, and the next daemon goes on in it."""
    directories.write(NO_VMS)
    path = directories.state / "history.db"
    seen: list[float] = []
    for victim in ("engine", "server", "both"):
        with running(directories) as daemon:
            assert becomes_true(partial(has_noted, daemon, len(seen) + 1), WAIT_S)
            time.sleep(random.random() * 1.1)
            seen = saved(daemon)
            server_pid = daemon.client.health().server_pid
            if victim in ("server", "both"):
                os.kill(server_pid, signal.SIGKILL)
            if victim == "server":
                assert becomes_true(partial(has_noted, daemon, len(seen) + 1), WAIT_S)
                seen = saved(daemon)
            daemon.signal(signal.SIGKILL)
            daemon.process.wait(WAIT_S)
        assert set(seen) <= set(in_file(path))
    assert seen == sorted(seen)
    assert not path.with_name("history.db.damaged").exists()


def test_a_file_that_is_held_delays_nobody_and_loses_nothing(directories: Directories) -> None:
    directories.write(NO_VMS)
    path = directories.state / "history.db"
    with running(directories) as daemon:
        assert becomes_true(partial(has_noted, daemon), WAIT_S)
        with closing(sqlite3.connect(path, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            assert becomes_true(lambda: kept(daemon).unsaved_samples > 1, WAIT_S)
            assert "locked" in str(kept(daemon).problem)
            daemon.client.set(sleep_millisecs=7)
            shown = noted(daemon)
            assert set(shown) > set(in_file(path))
            holder.execute("ROLLBACK")
        assert becomes_true(lambda: kept(daemon).problem is None, WAIT_S)
        assert set(shown) <= set(in_file(path))
        assert daemon.end() >= 0
    said = [line for line in directories.log.read_text().splitlines() if "history:" in line]
    assert len(said) == 2, said
    assert "locked" in said[0]
    assert "written again" in said[1]


def test_a_full_disk_loses_nothing(directories: Directories, need: Need) -> None:
    need(root_missing())
    with small_tmpfs(directories.state, 2 << 10):
        directories.write(NO_VMS)
        filler = directories.state / "filler"
        with running(directories) as daemon:
            assert becomes_true(partial(has_noted, daemon), WAIT_S)
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            assert becomes_true(lambda: kept(daemon).unsaved_samples > 1, WAIT_S)
            assert "full" in str(kept(daemon).problem)
            shown = noted(daemon)
            resize_tmpfs(directories.state, 8 << 10)
            assert becomes_true(lambda: kept(daemon).problem is None, WAIT_S)
            assert set(shown) <= set(in_file(directories.state / "history.db"))
            assert daemon.end() >= 0


def test_a_damaged_file_and_a_directory_of_others_are_said_once(directories: Directories) -> None:
    directories.write(NO_VMS)
    directories.state.mkdir(mode=0o700)
    (directories.state / "history.db").write_bytes(os.urandom(10_000))
    with running(directories) as daemon:
        assert becomes_true(partial(has_noted, daemon, 3), WAIT_S)
        assert kept(daemon).problem is None
        assert "history.db.damaged" in str(kept(daemon).moved_aside)
        assert daemon.end() >= 0
    directories.state.chmod(0o777)
    with running(directories) as daemon:
        assert becomes_true(partial(has_noted, daemon, 3), WAIT_S)
        assert "not ours alone" in str(kept(daemon).problem)
        assert daemon.end() >= 0
    said = [line for line in directories.log.read_text().splitlines() if "history:" in line]
    assert len(said) == 2, said
    assert "damaged" in said[0]
    assert "not ours alone" in said[1]


def assert_only_the_server_writes(daemon: Daemon) -> None:
    """A disk that hangs can so hold no gate closed."""
    engine = Path(f"/proc/{daemon.process.pid}")
    server = Path(f"/proc/{daemon.client.health().server_pid}")
    for process, expected in ((engine, False), (server, True)):
        held = {os.readlink(fd) for fd in (process / "fd").iterdir()}
        assert any("history.db" in name for name in held) is expected
        if not os.environ.get("VMDEDUP_COVERAGE"):  # coverage has a database of its own
            assert ("_sqlite3" in (process / "maps").read_text()) is expected


def test_a_second_daemon_does_not_write_there(directories: Directories) -> None:
    directories.write(NO_VMS)
    with Directories() as others, running(directories) as daemon:
        others.write(NO_VMS)
        assert becomes_true(partial(has_noted, daemon), WAIT_S)
        assert_only_the_server_writes(daemon)
        with running(others, "--state-dir", str(directories.state)) as other:
            assert becomes_true(partial(has_noted, other), WAIT_S)
            assert "another vmdedup" in str(kept(other).problem)
            shown = noted(other)
            assert other.end() >= 0
        assert set(shown).isdisjoint(noted(daemon))
        assert daemon.end() >= 0


@pytest.mark.parametrize(
    "query",
    [
        "since_s=0",
        "since_s=-1",
        "since_s=1e99",
        "since_s=x",
        "max_points=0",
        f"max_points={MAX_POINTS + 1}",
    ],
)
def test_what_makes_no_sense_is_refused(scripted: ScriptedEngine, query: str) -> None:
    with over(scripted.api.path) as http:
        answer = http.get(f"/v1/history?{query}")
    assert answer.status_code == 422
    assert answer.json()["kind"] == "usage"


def test_the_async_client_reads_the_same(scripted: ScriptedEngine) -> None:
    import asyncio

    async def read() -> History:
        async with AsyncClient(scripted.api.path) as client:
            return await client.history(60, max_points=5)

    first = asyncio.run(read()).samples[0]
    with Client(scripted.api.path) as client:
        assert client.history().samples[0] == first
    assert first.saved_bytes == scripted.snapshot().report.host.saved_bytes
    assert (first.vms, first.gates) == (2, 3)


def test_the_server_stays_small_with_a_full_history(tmp_path: Path) -> None:
    """Ninety days, all of them read at once."""
    plan = HistoryPlan(tmp_path / "state", interval_s=1, days=90)
    plan.directory.mkdir(mode=0o700)
    now = time.time()
    with Database(plan.directory / "history.db", plan.days) as database:
        for day in range(90):
            begin = now - 90 * 86_400 + day * 86_400
            database.append(
                (begin + 300 * at, *(1 << 40 for _ in LEVELS), 5, 5, 5.0, 5.0, 5.0)
                for at in range(288)
            )
    (tmp_path / "run").mkdir()
    with ScriptedEngine(tmp_path / "run", history=plan) as engine:
        engine.push()
        with Client(engine.api.path) as client:
            for _ in range(3):
                assert len(client.history(90 * 86_400, max_points=500).samples) > 400
                assert len(client.history(90 * 86_400, max_points=MAX_POINTS).samples) > 5000
        assert 0 < process_pss_bytes(engine.api.pid) <= 64 << 20
