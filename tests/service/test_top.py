"""`vmdedup top`: rates from samples, and the screen itself over a daemon or its history."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from textual.widgets import DataTable, Static

from tests.harness.capabilities import root_missing
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot
from tests.service.daemon import COMMAND, Daemon, Directories
from tests.service.engine import CONTROLS, ScriptedEngine, sharing, vm_report
from tests.service.test_client import unclosed_by_httpcore
from vmdedup.client import Client
from vmdedup.history.database import Database
from vmdedup.history.offline import read_each_offline
from vmdedup.history.place import FILE_NAME, HistoryPlan
from vmdedup.history.series import row_of
from vmdedup.ipc.protocol import ControlValues, EngineHealth, Health
from vmdedup.models import HistorySample, VmReport
from vmdedup.top.app import TopApp
from vmdedup.top.replay import ReplaySource
from vmdedup.top.sample import LiveSource, Sample, view
from vmdedup.top.view import COLUMNS, ORDERS, ordered

_WAIT_S = 60


def sample(at_s: float, *vms: VmReport, started: float = 1.0, scanned: int = 0) -> Sample:
    report = sharing(list(vms))
    breaks = sum(vm.cow_breaks or 0 for vm in vms)
    host = report.host.model_copy(update={"cow_breaks": breaks, "pages_scanned": scanned})
    engine = EngineHealth(engine_pid=1, started_unix_s=started, passes=1)
    return Sample(
        monotonic_s=at_s,
        report=report.model_copy(update={"host": host}),
        health=Health(version="1", server_pid=1, snapshot_age_ms=0, engine=engine),
        controls=ControlValues(values=CONTROLS),
        cpu_s=at_s / 10,
    )


def vm(name: str, pid: int, breaks: int, *, saved_mib: int = 1) -> VmReport:
    changed = {"cow_breaks": breaks, "saved_bytes": saved_mib << 20}
    return vm_report(name, pid=pid).model_copy(update=changed)


@pytest.mark.unit
def test_rates_are_of_the_time_between_two_samples() -> None:
    before = sample(10.0, vm("web", 1, 100), vm("db", 2, 50), scanned=1000)
    now = sample(14.0, vm("web", 1, 140), vm("db", 2, 50), vm("new", 3, 9), scanned=9000)
    shown = view(now, before)
    assert [row.breaks for row in shown.rows] == [10.0, 0.0, None]
    assert shown.rates.scanned == 2000
    assert "CPU 10.0%" in shown.when


@pytest.mark.unit
def test_there_is_no_rate_across_a_restart() -> None:
    before = sample(10.0, vm("web", 1, 100))
    now = sample(14.0, vm("web", 1, 3), started=13.0)
    assert view(now, before).rates.breaks is None
    assert view(now, None).rows[0].breaks is None


@pytest.mark.unit
def test_every_order_sorts_and_can_be_turned() -> None:
    before = sample(0.0, vm("b", 1, 0), vm("a", 2, 0))
    rows = view(sample(1.0, vm("b", 1, 5, saved_mib=9), vm("a", 2, 7)), before).rows
    for order in ORDERS:
        forth = [row.name for row in ordered(rows, order)]
        assert forth == [row.name for row in ordered(rows, order, reverse=True)][::-1]
    assert [row.name for row in ordered(rows, "saved")] == ["b", "a"]
    assert [row.name for row in ordered(rows, "breaks")] == ["a", "b"]
    assert {order for order in COLUMNS.values() if order is not None} == set(ORDERS)


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def names(app: TopApp) -> list[str]:
    table = app.screen_stack[0].query_one(DataTable)
    return [table.get_row_at(row)[0].plain for row in range(table.row_count)]


def headers(app: TopApp) -> list[str]:
    table = app.screen_stack[0].query_one(DataTable)
    return [column.label.plain for column in table.ordered_columns]


def text(app: TopApp, name: str) -> str:
    return str(app.screen_stack[0].query_one(name, Static).render())


@pytest.mark.process
def test_keys_and_widths(engine: ScriptedEngine) -> None:
    async def drive() -> None:
        app = TopApp(LiveSource(engine.api.path), interval_s=0.5)
        async with app.run_test(size=(80, 20)) as pilot:
            await until(lambda: names(app) == ["db", "web"])
            await pilot.press("n")
            assert names(app) == ["db", "web"]
            assert headers(app)[0] == "VM▼"
            await pilot.press("r")
            assert names(app) == ["web", "db"]
            narrow = headers(app)
            await pilot.resize_terminal(200, 30)
            await until(lambda: len(headers(app)) == len(COLUMNS))
            assert len(narrow) < len(COLUMNS)
            await pilot.press("question_mark")
            assert len(app.screen_stack) == 2
            await pilot.press("q")
            assert len(app.screen_stack) == 1
            await pilot.press("plus")
            assert app.interval_s == 1.0
            await pilot.press("left", "right")
            assert not app.is_paused
            await pilot.press("space")
            await until(lambda: "paused" in text(app, "#note"))
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(drive())


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    """A history of five minutes: web all the time, db in the first half, 60 breaks a sample."""
    path = tmp_path / FILE_NAME
    begin = time.time() - 20 * 15
    with Database(path, days=1) as database:
        for at in range(20):
            vms = ("db", "web") if at < 10 else ("web",)
            one, both = (
                row_of(
                    HistorySample(
                        unix_s=begin + 15 * at,
                        saved_bytes=at * number << 20,
                        present_bytes=number << 30,
                        vms=number,
                        cow_breaks=60 * at,
                        gates=at,
                        pages_sharing=7,
                    )
                )
                for number in (1, len(vms))
            )
            database.append([both], [(name, one) for name in vms])
    return path


def replayed(path: Path) -> ReplaySource:
    found = read_each_offline(path, 3600, 6000, 15)
    assert found is not None
    return ReplaySource(found.together, found.vms)


@pytest.mark.process
def test_a_history_plays_to_its_end_and_stays_there(noted: Path) -> None:
    async def drive() -> None:
        app = TopApp(replayed(noted), interval_s=0.1, order="name")
        async with app.run_test(size=(120, 20)) as pilot:
            await until(lambda: "sample 2 of 20" in text(app, "#head"))
            assert names(app) == ["db", "web"]
            await until(lambda: "this is the last sample" in text(app, "#note"))
            assert "sample 20 of 20" in text(app, "#head")
            assert "19.0 MiB saved of 1.0 GiB (1.9%), 1 VM; 20" in text(app, "#head")
            assert "breaks 4.0/s; gates 0.1/s" in text(app, "#head")
            assert names(app) == ["web"]
            shown = [header.rstrip("▼") for header in headers(app)]
            assert shown == [it for it in COLUMNS if it not in ("status", "waiting", "VMAs")]
            await asyncio.sleep(0.5)
            assert "sample 20 of 20" in text(app, "#head")
            await pilot.press("w")
            assert app.order == "name"

    asyncio.run(drive())


@pytest.mark.process
def test_steps_pause_the_replay(noted: Path) -> None:
    async def drive() -> None:
        app = TopApp(replayed(noted), interval_s=60)
        async with app.run_test(size=(120, 20)) as pilot:
            await until(lambda: "sample 1 of 20" in text(app, "#head"))
            for key, number in (("left", 1), ("right", 2), ("right", 3), ("left", 2)):
                await pilot.press(key)
                await until(lambda n=number: f"sample {n} of 20" in text(app, "#head"))  # type: ignore[misc]
            await pilot.press(*["right"] * 9)
            await until(lambda: names(app) == ["web"])
            assert "paused" in text(app, "#note")
            await pilot.press("left")
            await until(lambda: sorted(names(app)) == ["db", "web"])
            await pilot.press(*["minus"] * 12)
            assert app.interval_s == ReplaySource.shortest_s
            await pilot.press("space")
            await until(lambda: "this is the last sample" in text(app, "#note"))

    asyncio.run(drive())


def on_terminal(directories: Directories, *words: str, enough: str = "\0") -> tuple[int, str]:
    """Exit code and output of `top`, which is left with `q` once it shows `enough`."""
    master, terminal = pty.openpty()
    size = {"COLUMNS": "120", "LINES": "24", "TERM": "xterm-256color"}
    with open(master, "rb+", buffering=0) as screen:
        process = subprocess.Popen(
            [*COMMAND, "top", *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=directories.environment | size,
        )
        os.close(terminal)
        too_late = threading.Timer(_WAIT_S, process.kill)
        too_late.start()
        try:
            shown, asked = "", False
            with suppress(OSError):  # the end of a terminal
                while piece := screen.read(4096):
                    shown += piece.decode(errors="replace")
                    if enough in shown and not asked:
                        screen.write(b"q")
                        asked = True
            return process.wait(_WAIT_S), shown
        finally:
            too_late.cancel()
            process.kill()
            process.wait()


@pytest.mark.process
def test_the_verb_replays_the_daemons_own_file(directories: Directories, tmp_path: Path) -> None:
    """From wherever the daemon says it is; without one, from the state directory."""
    directories.runtime.mkdir()
    words = ("--replay", "1h", "--interval", "60")
    plan = HistoryPlan(tmp_path / "elsewhere", interval_s=1, days=1)
    with ScriptedEngine(directories.runtime, history=plan) as engine:
        engine.push()
        with Client(engine.api.path) as client:
            asyncio.run(until(lambda: bool(client.history().samples)))
        code, shown = on_terminal(directories, *words, enough="sample 1 of")
        assert (code, "web" in shown) == (0, True), shown
    code, shown = on_terminal(directories, *words)
    assert (code, "there is no history at" in shown) == (1, True), shown
    code, shown = on_terminal(
        directories, *words, "--state-dir", str(plan.directory), enough="sample 1 of"
    )
    assert (code, "web" in shown) == (0, True), shown


@pytest.mark.process
def test_what_cannot_be_replayed_is_one_line(directories: Directories, noted: Path) -> None:
    here = ("--state-dir", str(noted.parent))
    assert "--replay soon: write a time" in refused(directories, "--replay", "soon", code=2)
    assert "only --replay reads" in refused(directories, *here, code=2)
    words = ("--replay", "1h", "--sort", "vmas")
    assert "--sort vmas: choose one of" in refused(directories, *words, code=2)
    assert "has no sample of that time" in refused(directories, "--replay", "1s", *here)
    with closing(sqlite3.connect(noted)) as file, file:
        file.execute("DELETE FROM vm_fine")
        file.execute("DELETE FROM vm_coarse")
    assert "has no VM of that time" in refused(directories, "--replay", "1h", *here)
    noted.write_bytes(b"no database" * 1000)
    assert "file is not a database" in refused(directories, "--replay", "1h", *here)


def refused(directories: Directories, *words: str, code: int = 1) -> str:
    found, shown = on_terminal(directories, *words)
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert (found, line.count("\n")) == (code, 1), shown
    return line


@unclosed_by_httpcore
@pytest.mark.qemu
def test_it_survives_the_daemons_restart(
    directories: Directories, boot: Boot, need: Callable[[str | None], None]
) -> None:
    need(root_missing())
    vms = [
        boot("bare", backend=Backend(mib=16), parameters={"mib": 4, "seed": seed})
        for seed in (1, 2)
    ]
    words = [word for each in vms for word in ("--qmp", str(each.qmp_path))]

    async def drive() -> None:
        app = TopApp(LiveSource(directories.runtime / "vmdedup.sock"), interval_s=0.5)
        async with app.run_test(size=(100, 20)):
            await until(lambda: "start `vmdedup run`" in text(app, "#note"))
            for _ in range(2):
                daemon = await asyncio.to_thread(Daemon, directories, *words)
                try:
                    await until(lambda: app.trouble is None and len(names(app)) == len(vms))
                    of_this_one = f"pid {daemon.process.pid}"
                    await until(lambda pid=of_this_one: pid in text(app, "#head"))  # type: ignore[misc]
                    await until(lambda: not text(app, "#head").startswith("0 B saved"))
                finally:
                    await asyncio.to_thread(daemon.kill)
                await until(lambda: "trying again" in text(app, "#note"))
                assert len(names(app)) == len(vms)

    asyncio.run(drive())
    for each in vms:
        each.wait_passes(1)
        assert each.errors == 0
