"""`vmdedup top`: rates from samples, and the screen itself over a real daemon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from textual.widgets import DataTable, Static

from tests.harness.capabilities import root_missing
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot
from tests.service.daemon import Daemon, Directories
from tests.service.engine import CONTROLS, ScriptedEngine, sharing, vm_report
from tests.service.test_client import unclosed_by_httpcore
from vmdedup.ipc.protocol import ControlValues, EngineHealth, Health
from vmdedup.models import VmReport
from vmdedup.top.app import TopApp
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
            await pilot.press("space")
            await until(lambda: "paused" in text(app, "#note"))
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(drive())


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
