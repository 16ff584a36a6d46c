"""The coordinator without hosts: lists, sketches that lie, kinds, plans, and what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.harness.capabilities import fleet_extra_missing
from tests.harness.made_up import KEYS, Tree
from tests.harness.skips import require
from tests.service.engine import sharing, vm_report
from vmdedup.core.sketch import shared_contents, sketch_of
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.hosts.ask import Answer, SketchedVm, _drop_moved, checked
from vmdedup.hosts.documents import FleetReport, HostRow
from vmdedup.hosts.inventory import HostEntry, Inventory, read_inventory
from vmdedup.hosts.rows import fleet_report, host_rows
from vmdedup.hosts.show import as_text
from vmdedup.models import VmSketch
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.unit

TREE = Tree()


@pytest.fixture
def engine() -> None:
    require(fleet_extra_missing())


# ---- lists of hosts ----


def test_a_list_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "hosts.toml"
    file.write_text(
        'together = [["web-*", "cache"]]\napart = [["db-*"]]\n'
        '[[hosts]]\nname = "a"\nurl = "ssh://root@a"\nram_gib = 64\nmax_vms = 20\n'
        '[[hosts]]\nname = "b"\nurl = "/run/b/vmdedup.sock"\nram_gib = 32\nheadroom_percent = 50\n'
    )
    found = read_inventory(file)
    assert [host.name for host in found.hosts] == ["a", "b"]
    assert found.hosts[0].room_bytes == pytest.approx(57.6 * 2**30)
    assert found.hosts[1].room_bytes == 16 << 30
    assert (found.together, found.apart) == ([["web-*", "cache"]], [["db-*"]])


def test_a_list_as_ansible_has_it(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(
        "# all of them\nlone\n[kvm]\nhost1 ansible_host=10.0.0.1 ansible_user=root # first\n"
        "host2 ansible_port=2222 vmdedup_ram_gib=64 vmdedup_max_vms=9\n"
        "[kvm:vars]\nansible_user=nobody\n[old]\nhost1\n"
    )
    found = read_inventory(file)
    assert [(host.name, host.url) for host in found.hosts] == [
        ("lone", "ssh://lone"),
        ("host1", "ssh://root@10.0.0.1"),
        ("host2", "ssh://host2:2222"),
    ]
    assert (found.hosts[2].ram_gib, found.hosts[2].max_vms) == (64, 9)


YAML = """
all:
  vars: {ansible_user: root, vmdedup_max_vms: 9}
  hosts:
    lone:
  children:
    kvm:
      vars: {ansible_port: 2222}
      hosts:
        host1: {ansible_host: 10.0.0.1, vmdedup_ram_gib: 64}
        host2: {ansible_user: admin, vmdedup_url: "https://host2:9118"}
      children:
        old: {hosts: {host3: {ansible_host: "[fd00::1]"}}}
    again: {hosts: {host1: {vmdedup_headroom_percent: 20}}}
"""


@pytest.mark.parametrize("name", ["hosts.yml", "hosts.yaml"])
def test_a_list_as_ansible_has_it_in_yaml(tmp_path: Path, name: str) -> None:
    pytest.importorskip("yaml")
    (tmp_path / name).write_text(YAML)
    found = read_inventory(tmp_path / name)
    assert {host.name: host.url for host in found.hosts} == {
        "lone": "ssh://root@lone",
        "host1": "ssh://root@10.0.0.1:2222",
        "host2": "https://host2:9118",
        "host3": "ssh://root@[fd00::1]:2222",
    }
    (first,) = [host for host in found.hosts if host.name == "host1"]
    assert (first.ram_gib, first.headroom_percent, first.max_vms) == (64, 20, 9)


def test_variables_count_in_ansibles_order(tmp_path: Path) -> None:
    """A host's own, then the innermost group's, then the last one's by name; `all` last."""
    pytest.importorskip("yaml")
    file = tmp_path / "hosts.yml"
    file.write_text("""
all:
  vars: {ansible_user: root, ansible_port: 1, vmdedup_max_vms: 1, other: [x]}
  hosts:
    own: {ansible_user: admin}
    unset: {ansible_host: , ansible_port: , ansible_user: bob}
    six: {ansible_host: fd00::1}
  children:
    y: {vars: {ansible_port: 3}, hosts: {own: , inner: }}
    b: {hosts: {inner: }, children: {deep: {vars: {ansible_port: 4}, hosts: {inner: }}}}
    x: {vars: {ansible_port: 2, vmdedup_max_vms: 2}, hosts: {own: }}
top: {hosts: {alone: }}
""")
    found = {host.name: host for host in read_inventory(file).hosts}
    assert {name: host.url for name, host in found.items()} == {
        "own": "ssh://admin@own:3",
        "unset": "ssh://bob@unset:1",
        "six": "ssh://root@[fd00::1]:1",
        "inner": "ssh://root@inner:4",
        "alone": "ssh://root@alone:1",
    }
    assert [found[name].max_vms for name in ("own", "inner", "alone")] == [2, 1, 1]


def test_a_few_lines_of_yaml_cannot_be_endless(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    lines = ["x0: &x0 {hosts: {h: }}"]
    for depth in range(1, 19):
        below = f"*x{depth - 1}"
        lines.append(f"x{depth}: &x{depth} {{children: {{a: {below}, b: {below}}}}}")
    (tmp_path / "x.yml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="over 100000 hosts and groups"):
        read_inventory(tmp_path / "x.yml")


def test_yaml_without_its_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "x.yml").write_text(YAML)
    with pytest.raises(VmdedupError, match=r"pip install 'vmdedup\[fleet\]'"):
        read_inventory(tmp_path / "x.yml")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.toml", "", "hosts: Field required"),
        ("x.toml", "[[hosts]", "hosts|Expected"),
        ("x.toml", '[[hosts]]\nname = "a"\n', "hosts.0.url"),
        ("x.toml", '[[hosts]]\nname = "a"\nurl = "ssh://-x"\n', "write ssh://"),
        ("x.toml", '[[hosts]]\nname = "a"\nurl = "https://x/y"\n', "write https://"),
        ("x.toml", '[[hosts]]\nname = "a"\nurl = "http://x"\n', "write ssh://"),
        ("x.toml", '[[hosts]]\nname = "a"\nurl = "/x"\nram = 3\n', "hosts.0.ram"),
        ("x", "host[1:9]\n", "x:1: .*ranges"),
        ("x", "host vmdedup_ram_gib=-3\n", "hosts.0.ram_gib: "),
        ("x.yml", "", "hosts: List should have"),
        ("x.yml", "[a, b]", "not a mapping"),
        ("x.yml", "all: {hosts: {a: 7}}", "all: hosts: a: not a mapping"),
        ("x.yml", "all: {hosts: [a]}", "all: hosts: not a mapping"),
        ("x.yml", "all: {host: {a: }}", "all: host: a group has hosts, vars and children"),
        ("x.yml", "all: {hosts: {'a[1:9]': }}", "ranges"),
        ("x.yml", "all: {hosts: {a: {ansible_port: 0}}}", "write ssh://"),
        ("x.yml", "all: {hosts: {a: {vmdedup_ram_gib: much}}}", "hosts.0.ram_gib"),
        ("x.yml", "all: {hosts: {a: {vmdedup_url: [1]}}}", "hosts.0.url"),
        ("x.yml", "all: [", "x.yml: while parsing"),
        ("x.yml", "!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("x.yml", "[" * 5000, "x.yml: "),
        ("x.yml", "a: &a {children: {b: *a}}", "over 20 groups in one another"),
        ("x", "host 'open\n", "x:1: No closing quotation"),
        ("x", "[ kvm:vars ]\nname=[1\n", "hosts: List should have"),
        ("x.toml", "a=" + "[" * 100_000, "x.toml: too many values in one another"),
        ("x", "host ansible_host=a;reboot\n", "x: host host: ssh://a;reboot: write ssh://"),
    ],
)
def test_what_is_no_list_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=told) as refused:
        read_inventory(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_inventory(tmp_path / "none.toml")


# ---- what hosts say ----


def document(**changed: object) -> VmSketch:
    sketch = sketch_of(TREE.digests(0, 1), 256, KEYS)
    values: dict[str, object] = {
        "vm": "web",
        "pid": 4711,
        "trust_domain": "ci",
        "key_id": sketch.key_id,
        "rate": 256,
        "ram_bytes": 1 << 30,
        "still_pages": 60_000,
        "zero_pages": 7,
        "marks": b64encode(sketch.mark.tobytes()).decode(),
        "pages": b64encode(sketch.pages.tobytes()).decode(),
    }
    return VmSketch.model_validate({**values, **changed})


def test_a_sketch_survives_its_way() -> None:
    expected = sketch_of(TREE.digests(0, 1), 256, KEYS)
    found = checked(document())
    assert found.mark.tolist() == expected.mark.tolist()
    assert shared_contents(found, expected).value == len(expected) * 256


def encoded(values: object, kind: str) -> str:
    return b64encode(np.array(values, dtype=kind).tobytes()).decode()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rate": 100}, "power of two"),
        ({"marks": "?"}, "no base64"),
        ({"marks": "AAAA"}, "multiple|size"),
        ({"pages": ""}, "wrong number"),
        ({"marks": encoded([2, 1], "<u8"), "pages": encoded([1, 1], "<u4")}, "out of order"),
        ({"marks": encoded([1, 1], "<u8"), "pages": encoded([1, 1], "<u4")}, "out of order"),
        ({"marks": encoded([1], "<u8"), "pages": encoded([0], "<u4")}, "more sampled"),
        ({"marks": encoded([1], "<u8"), "pages": encoded([2**32 - 1], "<u4")}, "more sampled"),
        ({"marks": encoded([1], "<u8"), "pages": encoded([1], "<u4")}, "finer rate"),
        ({"still_pages": 1 << 40}, "more pages than memory"),
        ({"zero_pages": -70_000}, "more pages than memory"),
    ],
)
def test_a_sketch_that_cannot_be_is_not_believed(changed: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        checked(document(**changed))


def answer(name: str, *vms: SketchedVm, max_vms: int | None = 4) -> Answer:
    host = HostEntry(name=name, url=f"/run/{name}.sock", ram_gib=8, max_vms=max_vms)
    rows = [
        vm_report(vm.name).model_copy(
            update={"ram_bytes": vm.ram_bytes, "present_bytes": vm.present_bytes}
        )
        for vm in vms
    ]
    return Answer(host, sharing(rows), list(vms))


def changed(vm: SketchedVm, **values: object) -> SketchedVm:
    return SketchedVm(**{**vars_of(vm), **values})  # type: ignore[arg-type]


def vars_of(vm: SketchedVm) -> dict[str, object]:
    return {name: getattr(vm, name) for name in SketchedVm.__dataclass_fields__}


def test_a_vm_that_moved_meanwhile_counts_once() -> None:
    vm = changed(TREE.vm("a", 0, 1, 256), uuid="7")
    answers = [answer("a", vm), answer("b", changed(vm, host="b"))]
    _drop_moved(answers)
    assert [len(each.vms) for each in answers] == [0, 1]
    assert "has moved to b meanwhile" in answers[0].reasons[0]


def test_a_wrong_or_missing_secret_is_told_in_the_row() -> None:
    good, bad = TREE.vm("a", 0, 1, 256), TREE.vm("c", 0, 3, 256)
    other = changed(bad, sketch=type(bad.sketch)("ff", 256, bad.sketch.mark, bad.sketch.pages))
    answers = [answer("a", good), answer("b", changed(good, host="b")), answer("c", other)]
    answers[1].vms[0] = changed(answers[1].vms[0], only_here="no sketch_secret is set on this host")
    rows = host_rows([*answers, Answer(HostEntry(name="d", url="/d"), reasons=["away"])])
    assert rows[0].reason is None
    assert "no sketch_secret" in (rows[1].reason or "")
    assert "not that of most hosts" in (rows[2].reason or "")
    assert (rows[3].reason, rows[3].vms) == ("away", 0)


def test_totals_are_of_the_hosts_that_answered() -> None:
    report = fleet_report(
        [answer("a", TREE.vm("a", 0, 1, 256)), Answer(HostEntry(name="b", url="/"))]
    )
    assert (report.vms, len(report.hosts)) == (1, 2)
    assert report.present_bytes == 60_000 * PAGE_BYTES


@pytest.mark.parametrize("form", ["table", "json", "markdown", "html"])
def test_names_from_elsewhere_stay_text(form: str) -> None:
    evil = "\x1b[2J<script>|[x](y)"
    report = FleetReport(
        hosts=[HostRow(host=evil, url="/", reason=f"no\x07{evil}")],
        vms=0,
        present_bytes=0,
        saved_bytes=0,
    )
    text = as_text(report, form)  # type: ignore[arg-type]
    assert "\x1b" not in text
    assert "\x07" not in text
    if form == "html":
        assert "<script>" not in text
    if form == "markdown":
        assert "\\|\\[x\\]" in text
    if form == "json":
        assert json.loads(text)["hosts"][0]["host"] == evil


# ---- kinds, pairs, plans ----


def mixed(rate: int = 64) -> list[Answer]:
    """Three hosts of four VMs each; three images of one base, and one VM each of another."""
    images = {"a": [0, 1, 2, 0], "b": [1, 2, 0, 1], "c": [2, 0, 1, 2]}
    numbers = iter(range(100))
    return [
        answer(host, *(TREE.vm(host, image, next(numbers), rate) for image in each))
        for host, each in images.items()
    ]


@pytest.mark.usefixtures("engine")
def test_the_kinds_are_found_and_estimates_hold() -> None:
    from vmdedup.hosts.alike import similarity
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    vms = [vm for each in mixed() for vm in each.vms]
    found = similarity(SketchTable(as_table(vms)), [], alike=0.6, most_pairs=1000)
    kinds = [{vm.vm.partition("-")[0] for vm in kind.vms} for kind in found.kinds]
    assert sorted(map(sorted, kinds)) == [["image0"], ["image1"], ["image2"]]
    assert [len(kind.vms) for kind in found.kinds] == [4, 4, 4]
    assert len(found.pairs) >= 6
    for pair in found.pairs:
        one, other = (int(vm.vm[5]) for vm in (pair.one, pair.other))
        truth = TREE.shared_pages(one, other) * PAGE_BYTES
        assert abs(pair.shared_bytes - truth) <= 4 * pair.error_bytes
        assert pair.of_one == pytest.approx(truth / PAGE_BYTES / 60_000, abs=0.1)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("seed", range(20))
def test_the_sql_counts_what_sets_have_in_common(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs, contents, classes and hosts against Python's sets, of up to 12 VMs under two keys."""
    from vmdedup.core.sketch import Sketch
    from vmdedup.hosts import alike
    from vmdedup.hosts.grouping import Part
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    random = np.random.default_rng(seed)
    vms: list[SketchedVm] = []
    for n in range(random.integers(0, 13)):
        size = random.integers(0, 30)
        mark = np.unique(random.integers(0, 40, size, dtype=np.uint64) | np.uint64(15 << 60))
        if n and random.random() < 0.3:
            mark = vms[-1].sketch.mark  # a twin
        sketch = Sketch("ab"[n % 2], 16, mark, np.ones(len(mark), dtype=np.uint32))
        vms.append(changed(TREE.vm("xyz"[n % 3], 0, n, 256), sketch=sketch))
    table = SketchTable(as_table(vms))
    sets = [{(vm.sketch.key_id, mark) for mark in vm.sketch.mark.tolist()} for vm in vms]
    everyone = range(len(vms))
    both = {(a, b): len(sets[a] & sets[b]) for a in everyone for b in everyone if a < b}
    expected = sorted(((-n, *pair) for pair, n in both.items() if n))
    parts = [table.pairs(np.arange(len(vms)), Part(part, 3)) for part in range(3)]
    found = [pair for each in parts for pair in zip(*(it.tolist() for it in each), strict=True)]
    assert sorted((-n, a, b) for a, b, n in found) == expected
    assert table.contents.tolist() == [len(each) for each in sets]
    classes = table.classes
    members = [
        classes.vms[classes.first[c] : classes.first[c + 1]].tolist() for c in range(len(classes))
    ]
    assert len(set(map(tuple, members))) == len(members)
    for c, vms_of_class in enumerate(members):
        having = set.intersection(*(sets[n] for n in vms_of_class))
        others = set().union(*(sets[n] for n in everyone if n not in vms_of_class))
        assert classes.marks[c] == len(having - others) > 0
    for n, vm in enumerate(vms):
        on = {
            host: len(sets[n] & set().union(*(sets[m] for m in everyone if vms[m].host == host)))
            for host in "xyz"
        }
        assert table.on_hosts(n) == {
            host: marks for host, marks in on.items() if marks or host == vm.host
        }
    # Kinds: what is reached from one VM to the next by pairs that are alike.
    kind = list(everyone)
    for (a, b), n in both.items():
        if n >= 0.5 * max(1, min(len(sets[a]), len(sets[b]))):
            kind = [min(kind[a], kind[b]) if each in (kind[a], kind[b]) else each for each in kind]
    wanted = [{vms[n].name for n in everyone if kind[n] == first} for first in set(kind)]
    at_once = alike.similarity(table, [], alike=0.5, most_pairs=5)
    monkeypatch.setattr(alike, "_PAIRS_AT_ONCE", 3)
    assert alike.similarity(table, [], alike=0.5, most_pairs=5) == at_once
    shown = alike.similarity(table, [], alike=0.5, most_pairs=0).kinds
    assert sorted(sorted(vm.vm for vm in each.vms) for each in shown) == sorted(
        sorted(each) for each in wanted if len(each) > 1
    )


@pytest.mark.usefixtures("engine")
def test_a_comparison_that_would_take_hours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vmdedup.hosts import alike
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    table = SketchTable(as_table([vm for each in mixed() for vm in each.vms]))
    monkeypatch.setattr(alike, "_MOST_JOINED", 5)
    with pytest.raises(VmdedupError, match=r"pairs to compare, over 5: take a coarser --rate"):
        alike.similarity(table, [], alike=0.5, most_pairs=0)


@pytest.mark.usefixtures("engine")
def test_a_long_query_shows_no_progress() -> None:
    """DuckDB does in a process that runs no file, as Dask's workers are: after 2 s, on stdout."""
    program = (
        "from vmdedup.hosts.grouping import database\nwith database() as connection:"
        " print(connection.sql(\"SELECT current_setting('enable_progress_bar')\").fetchall())"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert done.stdout == b"[(False,)]\n"


@pytest.mark.usefixtures("engine")
def test_what_does_not_fit_into_memory_is_spilled_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import duckdb
    import pyarrow as pa

    from vmdedup.hosts import grouping

    mark = np.random.default_rng(1).integers(0, 1 << 62, 2_000_000, dtype=np.uint64)
    number = np.repeat(np.arange(2, dtype=np.int32), len(mark))
    table = pa.table({"id": number, "key": number * 0, "mark": np.tile(mark, 2)})
    expected = grouping.classes_of(table)
    assert expected["vms"].to_pylist() == [[0, 1]]
    connect, temporary = duckdb.connect, tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def limited(spilled: str) -> None:
        limits: dict[str, str | int] = {
            "memory_limit": "60MB",
            "threads": 1,
            "max_temp_directory_size": spilled,
        }
        monkeypatch.setattr(duckdb, "connect", lambda config: connect(config={**config, **limits}))

    limited("10GB")
    assert grouping.classes_of(table) == expected
    limited("0KB")
    with pytest.raises(VmdedupError, match="do not fit into memory: take a coarser") as refused:
        grouping.classes_of(table)
    assert "\n" not in str(refused.value)
    assert [*tmp_path.iterdir(), *temporary.iterdir()] == [temporary]


@pytest.mark.usefixtures("engine")
def test_domains_are_never_compared_and_rates_may_differ(tmp_path: Path) -> None:
    from vmdedup.core.sketch import keys_of
    from vmdedup.hosts.alike import similarity
    from vmdedup.hosts.sketch_table import SketchTable, as_table, read_parquet, write_parquet

    other = keys_of(b"a secret of the fleet", "other")
    vms = [
        TREE.vm("a", 0, 1, 16),
        TREE.vm("b", 0, 2, 256),
        changed(
            TREE.vm("c", 0, 3, 64),
            trust_domain="other",
            sketch=sketch_of(TREE.digests(0, 3), 64, other),
        ),
    ]
    write_parquet(as_table(vms), tmp_path / "sketches.parquet")
    table = SketchTable(read_parquet(tmp_path / "sketches.parquet"))
    assert table.rate == 256
    found = similarity(table, [], alike=0.5, most_pairs=10)
    (pair,) = found.pairs
    assert {pair.one.host, pair.other.host} == {"a", "b"}
    expected = shared_contents(vms[0].sketch, vms[1].sketch)
    assert pair.shared_bytes == expected.value * PAGE_BYTES
    (tmp_path / "none.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UsageError, match="not a table of sketches"):
        read_parquet(tmp_path / "none.parquet")


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("row", "changed", "told"),
    [
        *((1, {name: None}, f"{name} is missing") for name in ("host", "key_id", "rate", "marks")),
        (0, {"rate": 100}, "power of two"),
        (0, {"rate": -16}, "power of two"),
        (1, {"marks": [7, 7]}, "marks out of order"),
        (0, {"marks": [8, 7]}, "marks out of order"),
        (0, {"marks": [None, 7]}, "marks out of order"),
    ],
)
def test_a_table_that_cannot_be_is_refused(
    tmp_path: Path, row: int, changed: dict[str, object], told: str
) -> None:
    import pyarrow as pa

    from vmdedup.hosts.sketch_table import _SCHEMA, as_table, read_parquet, write_parquet

    file = tmp_path / "sketches.parquet"
    vms = [TREE.vm("a", 0, 1, 256), TREE.vm("b", 0, 2, 256)]
    none = replace(vms[0].sketch, mark=vms[0].sketch.mark[:0], pages=vms[0].sketch.pages[:0])
    table = as_table([replace(vms[0], sketch=none), *vms, replace(vms[0], sketch=none)])
    write_parquet(table, file)
    assert read_parquet(file) == table
    rows = table.slice(1, 2).to_pylist()
    rows[row].update(changed)
    write_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
    with pytest.raises(UsageError, match=f"not a table of sketches: .*{told}"):
        read_parquet(file)


@pytest.mark.usefixtures("engine")
def test_vms_that_share_the_same_little_are_of_no_kind() -> None:
    from vmdedup.hosts.alike import similarity
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    vms = [TREE.vm("a", image, image, 64) for image in range(3)]
    table = SketchTable(as_table(vms))
    third = TREE.base_pages / 60_000
    assert similarity(table, [], alike=1.5 * third, most_pairs=10).kinds == []
    (kind,) = similarity(table, [], alike=0.5 * third, most_pairs=10).kinds
    assert len(kind.vms) == 3


@pytest.mark.usefixtures("engine")
def test_no_vm_at_all_is_no_error() -> None:
    from vmdedup.hosts.alike import similarity
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    found = similarity(SketchTable(as_table([])), [], alike=0.5, most_pairs=10)
    assert (found.kinds, found.pairs) == ([], [])


@pytest.mark.usefixtures("engine")
def test_the_plan_brings_kinds_together_and_promises_what_that_saves() -> None:
    from vmdedup.hosts.planning import plan
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    answers = mixed()
    table = SketchTable(as_table([vm for each in answers for vm in each.vms]))
    inventory = Inventory(hosts=[each.host for each in answers])
    found = plan(table, inventory, answers, [], worth_percent=1)
    where = {vm.name: each.host.name for each in answers for vm in each.vms}
    for move in found.moves:
        assert where[move.vm] == move.source
        where[move.vm] = move.target
    for image in range(3):
        assert len({host for vm, host in where.items() if vm.startswith(f"image{image}")}) == 1
    # Each host had all three images, and has one now: six times an image's contents.
    truth = 6 * TREE.image_pages * PAGE_BYTES
    assert abs(found.saved_bytes - truth) <= 4 * found.error_bytes
    assert found.saved_bytes <= found.most_bytes
    assert found.random_bytes < found.saved_bytes
    assert plan(table, inventory, answers, [], worth_percent=1000).moves == []


@pytest.mark.usefixtures("engine")
def test_a_plan_obeys_together_and_apart() -> None:
    from vmdedup.hosts.planning import plan
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    answers = mixed()
    table = SketchTable(as_table([vm for each in answers for vm in each.vms]))
    names = [vm.name for each in answers for vm in each.vms if vm.name.startswith("image0")]
    hosts = [each.host for each in answers]
    inventory = Inventory(hosts=hosts, apart=[names[:2]])
    found = plan(table, inventory, answers, [], worth_percent=1)
    where = {vm.name: each.host.name for each in answers for vm in each.vms}
    where.update({move.vm: move.target for move in found.moves})
    assert where[names[0]] != where[names[1]]
    assert max(list(where.values()).count(host.name) for host in hosts) <= 4
    with pytest.raises(VmdedupError, match="no host has room"):
        plan(
            table,
            Inventory(hosts=hosts, together=[["*"]]),
            answers,
            [],
            worth_percent=1,
        )
    loose = [Answer(HostEntry(name="a", url="/"), answers[0].report, answers[0].vms)]
    with pytest.raises(UsageError, match="needs its limits"):
        plan(table, inventory, loose, [], worth_percent=1)


@pytest.mark.usefixtures("engine")
def test_the_best_host_for_one_more_has_its_kind_and_room() -> None:
    from vmdedup.hosts.planning import candidates
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    answers = [
        answer("a", TREE.vm("a", 0, 1, 64, "x"), TREE.vm("a", 1, 2, 64)),
        answer("b", TREE.vm("b", 0, 3, 64), max_vms=1),
        answer("c", TREE.vm("c", 1, 4, 64, "x")),
    ]
    table = SketchTable(as_table([vm for each in answers for vm in each.vms]))
    found = candidates(table, "a/x", answers, [])
    assert [(each.host, each.has_room) for each in found.candidates] == [
        ("a", True),
        ("c", True),
        ("b", False),
    ]
    own, base, image = (each.shared_bytes for each in found.candidates)
    assert base < image < own
    assert abs(image - 50_000 * PAGE_BYTES) <= 4 * found.candidates[2].error_bytes
    with pytest.raises(UsageError, match="several VMs"):
        candidates(table, "x", answers, [])
    with pytest.raises(UsageError, match="no VM nobody"):
        candidates(table, "nobody", answers, [])
