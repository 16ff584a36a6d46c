"""The history's file: bounded, read evenly, and robust against clocks and damage."""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.unit.test_report import sharing, vm_report
from vmdedup.cli.history import seconds
from vmdedup.errors import UsageError
from vmdedup.history.database import (
    BUCKET_S,
    FINE_ROWS,
    VM_COARSE_ROWS,
    VM_FINE_ROWS,
    DamagedError,
    Database,
)
from vmdedup.history.keeper import UNSAVED_SAMPLES, Keeper, read_history
from vmdedup.history.offline import read_each_offline, read_offline
from vmdedup.history.place import HistoryError, HistoryPlan
from vmdedup.history.series import (
    COLUMNS,
    PEAKS,
    joined,
    row_of,
    thinned,
    vm_samples_of,
    width_s,
)
from vmdedup.models import History, HistorySample
from vmdedup.report.history import as_csv, as_parquet, show_history

pytestmark = pytest.mark.unit

NOON = 1_790_000_100.0
"""The begin of a bucket."""
MIB = 1 << 20


def sample(unix_s: float, saved_mib: int = 1, **more: float | None) -> HistorySample:
    figures = {"present_bytes": 100 * MIB, "vms": 2, "overhead_bytes": None, **more}
    return HistorySample.model_validate(
        {"unix_s": unix_s, "saved_bytes": saved_mib * MIB, **figures}
    )


@pytest.fixture
def plan(tmp_path: Path) -> HistoryPlan:
    return HistoryPlan(tmp_path / "state", interval_s=15, days=1)


@pytest.fixture
def keeper(plan: HistoryPlan) -> Iterator[Keeper]:
    with Keeper(plan) as own:
        yield own


def times(history: History) -> list[float]:
    return [it.unix_s for it in history.samples]


def all_of(plan: HistoryPlan) -> list[float]:
    """The times of all samples in the file, by whoever may read it."""
    with Database(plan.directory / "history.db", plan.days, read_only=True) as database:
        return [row[0] for row in database.rows("fine", -math.inf, math.inf)]


# --- reading ------------------------------------------------------------------


def test_what_was_noted_is_read_with_every_figure(keeper: Keeper) -> None:
    noted = [
        sample(NOON, 1, cow_breaks=3, gate_p99_ms=1.25, stopped_ms=0.5),
        sample(NOON + 15, 2, overhead_bytes=5, pages_shared=7, pages_sharing=8, zero_pages=9),
    ]
    for each in noted:
        keeper.note(each)
    read = keeper.read(NOON, NOON + 15, 10)
    assert (read.samples, read.interval_s) == (noted, 15)
    assert keeper.read(NOON + 1, NOON + 14, 10).samples == []
    assert (keeper.problem, keeper.unsaved) == (None, 0)


def test_more_than_asked_for_is_averaged_evenly(keeper: Keeper) -> None:
    for at in range(100):
        keeper.note(sample(NOON + 15 * at, at, cow_breaks=at, gate_max_ms=float(at % 7)))
    read = keeper.read(NOON, NOON + 99 * 15, 10)
    assert len(read.samples) == 10
    assert read.interval_s == 99 * 15 / 9
    assert times(read) == sorted(times(read))
    for each in read.samples[1:-1]:
        # Saved grows by 1 MiB a sample: an average lies where its time lies.
        place = (each.unix_s - NOON) / 15
        assert abs(each.saved_bytes - place * MIB) < MIB / 100
        assert each.cow_breaks == math.floor(place + 5)
        assert each.gate_max_ms == 6
    assert keeper.read(NOON, NOON + 99 * 15, 1).samples[0].saved_bytes == 99 * MIB // 2
    assert len(keeper.read(NOON, NOON + 99 * 15, 100).samples) == 100


Figures = st.one_of(st.none(), st.integers(0, 1 << 50))
Rows = st.lists(
    st.tuples(st.floats(1, 1e10), *[Figures] * (len(COLUMNS) - 1)), min_size=1, max_size=50
)


@given(Rows, st.integers(1, 20))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_thinned_rows_are_few_and_within_what_they_stand_for(
    rows: list[tuple[float | None, ...]], most: int
) -> None:
    rows.sort(key=lambda row: row[0] or 0)
    first, last = rows[0][0], rows[-1][0]
    assert first is not None
    assert last is not None
    slot_s = max(width_s(last - first, most), 1e-3)
    few = list(thinned(rows, slot_s))
    assert 1 <= len(few) <= min(most, len(rows)) + 1
    assert [row[0] for row in few] == sorted(row[0] for row in few)
    for at in range(1, len(COLUMNS)):
        known = [figure for row in rows if (figure := row[at]) is not None]
        for row in few:
            figure = row[at]
            assert figure is not None or len(known) < len(rows)
            if figure is not None:
                assert min(known) * (1 - 1e-9) <= figure <= max(known) * (1 + 1e-9)


def test_a_coarse_row_is_what_its_samples_average_to(plan: HistoryPlan) -> None:
    rows = [
        row_of(sample(NOON + 15 * at, at % 5, overhead_bytes=at if at % 3 else None, gates=at))
        for at in range(20)
    ]
    plan.directory.mkdir()
    with Database(plan.directory / "history.db", 1) as database:
        for row in rows:
            database.append([row])
        (coarse,) = database.rows("coarse", NOON, NOON + BUCKET_S)
    for name, found, wanted in zip(COLUMNS, coarse, joined(rows), strict=True):
        if name == "overhead_bytes":
            # Where it was not known at times, the row's own weights stand in.
            assert 0 < found < 20
        elif name in PEAKS:
            assert found == wanted
        else:
            assert found == pytest.approx(wanted)


# --- bounds and clocks --------------------------------------------------------


def test_the_file_is_bounded_and_old_time_is_coarse(plan: HistoryPlan) -> None:
    """Of two and a half days one is kept, and another five days take no more room."""
    plan.directory.mkdir()
    path = plan.directory / "history.db"
    number = FINE_ROWS * 5 // 2
    sizes_bytes = []
    for first in (0, number, number + 2 * FINE_ROWS):
        with Database(path, days=1) as database:
            for begin in range(first, first + number, 480):
                database.append(row_of(sample(NOON + 15 * at)) for at in range(begin, begin + 480))
            assert database.count("fine", 0, math.inf) == FINE_ROWS
            assert database.count("coarse", 0, math.inf) == 86_400 // BUCKET_S
            both_bytes = sum(file.stat().st_size for file in plan.directory.iterdir())
            assert both_bytes < 8 * MIB, "the log is not cut"
        assert [file.name for file in plan.directory.iterdir()] == [path.name]
        sizes_bytes.append(path.stat().st_size)
    assert max(sizes_bytes) <= 1.1 * sizes_bytes[0] < MIB


def test_time_before_the_fine_samples_is_read_from_the_coarse_ones(tmp_path: Path) -> None:
    with Database(tmp_path / "history.db", days=9) as database:
        for begin in range(0, FINE_ROWS * 2, 480):
            database.append(row_of(sample(NOON + 15 * at)) for at in range(begin, begin + 480))
        end = NOON + 2 * 86_400
        assert database.tier(end - 3600) == "fine"
        assert database.tier(NOON) == "coarse"
        rows = list(database.rows("coarse", NOON, end))
    assert len(rows) == 2 * 86_400 // BUCKET_S
    assert {round(later[0] - row[0]) for row, later in pairwise(rows)} == {300}


@pytest.mark.parametrize("jump_s", [-3600, -50 * 365 * 86_400, 10 * 365 * 86_400])
def test_a_clock_that_jumps_deletes_nothing_and_shows_nothing_of_the_future(
    keeper: Keeper, plan: HistoryPlan, jump_s: float
) -> None:
    before = [NOON + 15 * at for at in range(10)]
    wrong = [NOON + jump_s + 15 * at for at in range(10)]
    after = [NOON + 1000 + 15 * at for at in range(10)]
    for unix_s in [*before, *wrong]:
        keeper.note(sample(unix_s))
    now = wrong[-1]
    assert times(keeper.read(now - 3600, now, 100)) == [
        t for t in sorted(before + wrong) if now - 3600 <= t <= now
    ]
    for unix_s in after:
        keeper.note(sample(unix_s))
    assert times(keeper.read(NOON, after[-1], 100)) == before + after
    assert keeper.problem is None
    assert sorted(all_of(plan)) == sorted(before + wrong + after)


# --- the disk -----------------------------------------------------------------


def test_it_survives_its_daemon(plan: HistoryPlan) -> None:
    for at in range(3):
        with Keeper(plan) as keeper:
            keeper.note(sample(NOON + at))
    assert all_of(plan) == [NOON, NOON + 1, NOON + 2]
    mode = (plan.directory / "history.db").stat().st_mode & 0o777
    assert (plan.directory.stat().st_mode & 0o777, mode) == (0o700, 0o600)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)


def _replace_by_text(path: Path) -> None:
    path.write_text("no database at all\n" * 100)


def _replace_by_another(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE fine (x)")
    connection.close()


def _put_text_in(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE fine SET saved_bytes = 'much'")
    connection.close()


@pytest.mark.parametrize(
    "damage", [_truncate, _overwrite, _replace_by_text, _replace_by_another, _put_text_in]
)
def test_a_damaged_file_is_moved_aside_and_noting_goes_on(
    plan: HistoryPlan, damage: object
) -> None:
    path = plan.directory / "history.db"
    with Keeper(plan) as keeper:
        for at in range(200):
            keeper.note(sample(NOON + at))
    assert callable(damage)
    damage(path)
    content = path.read_bytes()
    with Keeper(plan) as keeper:
        keeper.note(sample(NOON + 1000))
        keeper.read(NOON, NOON + 1000, 1000)
        assert keeper.problem is None
        assert keeper.moved_aside is not None
        assert "\n" not in keeper.moved_aside
        keeper.note(sample(NOON + 1001))
        later = keeper.read(NOON + 1, NOON + 2000, 1000)
    assert times(later)[-1] == NOON + 1001
    aside = path.with_name("history.db.damaged")
    if damage is not _put_text_in:
        assert aside.read_bytes() == content
    with Keeper(plan) as keeper:
        keeper.note(sample(NOON + 1002))
        assert keeper.moved_aside is None


def test_read_offline_leaves_a_damaged_file_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    _replace_by_text(path)
    with pytest.raises(DamagedError, match=r"history\.db"):
        read_offline(path, 3600, 10, 15)
    assert [it.name for it in tmp_path.iterdir()] == ["history.db"]
    assert read_offline(tmp_path / "none", 3600, 10, 15) is None


def test_a_file_of_a_newer_version_is_left_alone(plan: HistoryPlan) -> None:
    with Keeper(plan) as keeper:
        keeper.note(sample(NOON))
    path = plan.directory / "history.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with Keeper(plan) as keeper:
        keeper.note(sample(NOON + 1))
        assert keeper.problem is not None
        assert "newer vmdedup" in keeper.problem
        assert times(keeper.read(NOON, NOON + 9, 9)) == [NOON + 1]
    assert path.exists()


def test_a_file_that_is_removed_meanwhile_is_begun_anew(keeper: Keeper, plan: HistoryPlan) -> None:
    keeper.note(sample(NOON))
    for file in plan.directory.glob("history.db*"):
        file.unlink()
    keeper.note(sample(NOON + 1))
    assert keeper.problem is None
    assert all_of(plan) == [NOON + 1]


def test_one_daemon_at_a_time(keeper: Keeper, plan: HistoryPlan) -> None:
    keeper.note(sample(NOON))
    with Keeper(plan) as other:
        other.note(sample(NOON + 1))
        assert other.problem is not None
        assert "another vmdedup" in other.problem
        assert times(other.read(NOON, NOON + 9, 9)) == [NOON + 1]
        keeper.close()
        other.note(sample(NOON + 2))
        assert other.problem is None
    assert all_of(plan) == [NOON, NOON + 1, NOON + 2]


def test_a_directory_that_others_may_write_is_refused(plan: HistoryPlan) -> None:
    plan.directory.mkdir()
    plan.directory.chmod(0o777)
    with Keeper(plan) as keeper:
        keeper.note(sample(NOON))
        assert keeper.problem is not None
        assert "is not ours alone" in keeper.problem
    assert list(plan.directory.iterdir()) == []


def test_links_are_not_followed(plan: HistoryPlan, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    plan.directory.mkdir(mode=0o700)
    (plan.directory / "history.db").symlink_to(elsewhere)
    with Keeper(plan) as keeper:
        keeper.note(sample(NOON))
        assert keeper.problem is not None
    shutil.rmtree(plan.directory)
    elsewhere.mkdir(mode=0o700)
    plan.directory.symlink_to(elsewhere)
    with Keeper(plan) as keeper:
        keeper.note(sample(NOON))
        assert "not a directory" in str(keeper.problem)
    assert list(elsewhere.iterdir()) == []


def test_what_can_not_be_written_is_bounded_too(plan: HistoryPlan) -> None:
    nowhere = HistoryPlan(plan.directory, 15, days=0)
    with Keeper(nowhere) as keeper:
        for at in range(UNSAVED_SAMPLES + 100):
            keeper.note(sample(NOON + at))
        assert len(keeper.read(NOON, NOON + 9999, 9999).samples) == UNSAVED_SAMPLES
        assert len(keeper.read(NOON, NOON + 9999, 30).samples) <= 30
        assert keeper.problem is None
    assert not plan.directory.exists()


# --- each VM ------------------------------------------------------------------


def test_each_vm_has_a_history_of_its_own(plan: HistoryPlan) -> None:
    web = [sample(NOON + 15 * at, at, cow_broken_pages=at, unique_pages=7) for at in range(3)]
    with Keeper(plan) as keeper:
        for at, each in enumerate(web):
            others = {"db": sample(NOON + 15 * at, 50)} if at else {}
            keeper.note(sample(NOON + 15 * at, 99), {"web": each, **others})
        assert keeper.read(NOON, NOON + 99, 10, "web").samples == web
        assert keeper.read(NOON, NOON + 99, 10, "web").vm == "web"
        assert len(keeper.read(NOON, NOON + 99, 10, "db").samples) == 2
        assert keeper.read(NOON, NOON + 99, 10, "nobody").samples == []
        assert [each.saved_bytes for each in keeper.read(NOON, NOON + 99, 10).samples] == [
            99 * MIB
        ] * 3
    with Keeper(plan) as keeper:
        (one,) = keeper.read(NOON, NOON + 99, 1, "web").samples
    assert (one.saved_bytes, one.cow_broken_pages) == (MIB, 1)


def test_vms_in_memory_alone_have_one_too(plan: HistoryPlan) -> None:
    with Keeper(HistoryPlan(plan.directory, 15, days=0)) as keeper:
        keeper.note(sample(NOON), {"web": sample(NOON, 3)})
        keeper.note(sample(NOON + 15))
        (one,) = keeper.read(NOON, NOON + 99, 10, "web").samples
    assert one.saved_bytes == 3 * MIB


def test_many_vms_have_a_shorter_past_and_no_bigger_file(plan: HistoryPlan) -> None:
    plan.directory.mkdir()
    path = plan.directory / "history.db"
    row = row_of(sample(NOON, cow_breaks=1, gates=1, cow_broken_pages=1, unique_pages=1))
    vms = [f"build-{number:05}" for number in range(1000)]
    with Database(path, days=90) as database:
        for at in range(VM_COARSE_ROWS // 1000 + 20):
            unix_s = NOON + BUCKET_S * at
            database.append([], ((vm, (unix_s, *row[1:])) for vm in vms))
        assert database.tier(NOON, vms[0]) == "vm_coarse"
        fine = [database.count("vm_fine", 0, math.inf, vm) for vm in vms]
        coarse = [database.count("vm_coarse", 0, math.inf, vm) for vm in vms]
    assert (sum(fine), sum(coarse)) == (VM_FINE_ROWS, VM_COARSE_ROWS)
    assert path.stat().st_size < 24 * MIB


def test_a_vm_that_left_long_ago_has_its_coarse_rows(plan: HistoryPlan) -> None:
    """Others have displaced its fine ones."""
    plan.directory.mkdir()
    row = row_of(sample(NOON))
    with Database(plan.directory / "history.db", days=90) as database:
        database.append([row], [("left", row)])
        later = ((f"vm-{number}", (NOON + 900, *row[1:])) for number in range(VM_FINE_ROWS))
        database.append([], later)
        assert database.count("vm_fine", 0, math.inf, "left") == 0
        (found,) = read_history(database, 15, (NOON - 1, NOON + 999), 9, vm="left").samples
        assert found == sample(NOON)
        assert database.vm_names(NOON - 1, NOON + 1) == ["left"]


def test_the_vms_of_a_time_span_are_named(plan: HistoryPlan, keeper: Keeper) -> None:
    keeper.note(sample(NOON), {"web": sample(NOON), "db": sample(NOON)})
    keeper.note(sample(NOON + 15), {"web": sample(NOON + 15)})
    keeper.note(sample(NOON + BUCKET_S), {"mail": sample(NOON + BUCKET_S)})
    with Database(plan.directory / "history.db", plan.days, read_only=True) as database:
        assert database.vm_names(NOON, NOON + BUCKET_S) == ["db", "mail", "web"]
        assert database.vm_names(NOON + 15, NOON + 99) == ["web"]
        assert database.vm_names(NOON + BUCKET_S + 1, math.inf) == []


def test_all_histories_are_read_at_once(keeper: Keeper, plan: HistoryPlan) -> None:
    now = time.time()
    for at in range(3):
        figures = sample(now - 30 + at), sample(now - 30 + at, 7)
        keeper.note(figures[0], {"web": figures[1]})
    path = plan.directory / "history.db"
    found = read_each_offline(path, 60, 100, 15)
    assert found is not None
    assert found.together == keeper.read(now - 60, now, 100)
    assert found.vms == {"web": keeper.read(now - 60, now, 100, "web")}
    assert read_each_offline(path.with_name("none.db"), 60, 100, 15) is None


VERSION_1 = (
    "saved_bytes REAL, present_bytes REAL, overhead_bytes REAL, pages_shared REAL,"
    " pages_sharing REAL, zero_pages REAL, vms REAL, cow_breaks REAL, gates REAL,"
    " stopped_ms REAL, gate_p99_ms REAL, gate_max_ms REAL"
)
"""The figures in a file of vmdedup before VMs had a history."""


def test_a_file_of_an_older_version_is_read_and_goes_on(plan: HistoryPlan) -> None:
    plan.directory.mkdir(mode=0o700)
    path = plan.directory / "history.db"
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA application_id = {0x766D6464}")
        connection.execute("PRAGMA user_version = 1")
        connection.execute(
            f"CREATE TABLE fine (id INTEGER PRIMARY KEY, unix_s REAL NOT NULL, {VERSION_1})"
        )
        connection.execute(
            "CREATE TABLE coarse (id INTEGER PRIMARY KEY, bucket INTEGER UNIQUE NOT NULL,"
            f" samples INTEGER NOT NULL, unix_s REAL NOT NULL, {VERSION_1})"
        )
        connection.execute(
            "INSERT INTO fine (unix_s, saved_bytes, present_bytes, vms) VALUES (?, 5, 6, 1)",
            (NOON,),
        )
    connection.close()
    with Database(path, plan.days, read_only=True) as database:
        (row,) = database.rows("fine", 0, math.inf)
        assert (row[0], row[-1], len(row)) == (NOON, None, len(COLUMNS))
        assert database.tier(0, "web") == "vm_fine"
        assert database.vm_names(0, math.inf) == []
        assert list(database.rows("vm_fine", 0, math.inf, "web")) == []
    with Keeper(plan) as keeper:
        keeper.note(sample(NOON + 15, cow_broken_pages=4), {"web": sample(NOON + 15)})
        old, new = keeper.read(NOON, NOON + 99, 10).samples
        assert (old.saved_bytes, old.cow_broken_pages, new.cow_broken_pages) == (5, None, 4)
        assert len(keeper.read(NOON, NOON + 99, 10, "web").samples) == 1
        assert (keeper.problem, keeper.moved_aside) == (None, None)


def test_vms_of_one_name_are_told_apart() -> None:
    twins = [
        vm_report("web", "merged", None).model_copy(update={"pid": pid, "saved_bytes": pid})
        for pid in (7, 8)
    ]
    vms = [*twins, vm_report("db", "scanning", None), vm_report("x", "refused", "why")]
    found = vm_samples_of(sharing(vms), NOON)
    assert list(found) == ["web (pid 7)", "web (pid 8)", "db"]
    assert [found[f"web (pid {pid})"].saved_bytes for pid in (7, 8)] == [7, 8]


def test_parquet_has_the_columns_of_csv(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    history = History(samples=[sample(NOON, 3, gate_p99_ms=1.5), sample(NOON + 15)], interval_s=15)
    (tmp_path / "history.parquet").write_bytes(as_parquet(history))
    table = parquet.read_table(tmp_path / "history.parquet")
    assert table.column_names == ["time_utc", *HistorySample.model_fields]
    first, second = table.to_pylist()
    assert first["time_utc"].isoformat() == "2026-09-21T14:15:00+00:00"
    assert (first["saved_bytes"], first["gate_p99_ms"]) == (3 * MIB, 1.5)
    assert second["gate_p99_ms"] is None


# --- showing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted_s"),
    [("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800), ("2w", 1_209_600)],
)
def test_times_are_read(text: str, wanted_s: int) -> None:
    assert seconds(text) == wanted_s


@pytest.mark.parametrize(
    "text",
    ["", "h", "1", "0m", "-1h", "1.5h", "1y", "nan", "1 h", "401d", "\u0661h", "9" * 99 + "s"],
)
def test_what_is_no_time_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="--since") as refused:
        seconds(text)
    assert "\n" not in str(refused.value)


def test_csv_has_a_header_and_no_word_for_what_is_not_known() -> None:
    history = History(samples=[sample(NOON, 3, cow_breaks=4), sample(NOON + 15)], interval_s=15)
    first, second = csv.DictReader(io.StringIO(as_csv(history)))
    assert first["time_utc"] == "2026-09-21T14:15:00+00:00"
    assert (first["saved_bytes"], first["cow_breaks"], first["vms"]) == (str(3 * MIB), "4", "2")
    assert second["overhead_bytes"] == second["cow_breaks"] == ""
    assert set(first) == {"time_utc", *HistorySample.model_fields}


def shown(samples: Sequence[HistorySample], encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding)
    console = Console(file=out, width=80, markup=False, emoji=False, highlight=False)
    show_history(History(samples=list(samples), interval_s=15), 3600, console)
    out.flush()
    return raw.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_fits_and_has_few_rows(encoding: str) -> None:
    samples = [
        sample(NOON + 15 * at, 90_000, present_bytes=1 << 40, cow_breaks=10**9, gate_p99_ms=99.99)
        for at in range(240)
    ]
    lines = shown(samples, encoding)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 5 + 20, lines
    assert lines[0].startswith("87.9 GiB saved of 1.0 TiB held (8.6%)")


def test_the_line_grows_with_what_is_saved_and_shows_a_gap() -> None:
    growing = [sample(NOON + 15 * at, at) for at in range(8)]
    later = [sample(NOON + 15 * at, 7) for at in range(12, 14)]
    assert shown(growing + later)[2] == "▁▂▃▄▅▆▇█    ██"
    assert shown([sample(NOON, 0)])[2] == "▁"
    assert shown([sample(NOON, 0), sample(NOON, 5)])[2] == "▅"


def test_an_unreadable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "history.db").mkdir()
    with pytest.raises(HistoryError, match=r"history\.db") as failed:
        read_offline(tmp_path / "history.db", 3600, 10, 15)
    assert "\n" not in str(failed.value)
