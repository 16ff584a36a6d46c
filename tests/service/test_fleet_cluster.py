"""The fleet's grouping on a real Dask cluster of two workers, on loopback: the same answers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.capabilities import fleet_extra_missing
from tests.harness.made_up import Tree
from tests.harness.skips import require
from tests.service.test_fleet import fleet
from tests.unit.test_hosts import answer
from vmdedup.core.sketch import keys_of, sketch_of
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.hosts.ask import SketchedVm
from vmdedup.hosts.inventory import Inventory

pytestmark = pytest.mark.service

TREE = Tree()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two processes that work, each with one thread."""
    require(fleet_extra_missing())
    missing = importlib.util.find_spec("distributed") is None
    require("distributed is not installed" if missing else None)
    local = importlib.import_module("distributed").LocalCluster
    with local(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as running:
        yield running


def mixed() -> list[SketchedVm]:
    """Twelve VMs of three images on three hosts, two of another domain, one without contents.

    Each of the twelve has lost a tenth of its contents, so that no two are in the same classes.
    """
    vms = [TREE.vm("abc"[n % 3], n // 4, n, 64 if n % 2 else 256) for n in range(12)]
    random = np.random.default_rng(3)
    for n, vm in enumerate(vms):
        keep = random.random(len(vm.sketch)) > 0.1
        vms[n] = replace(
            vm, sketch=replace(vm.sketch, mark=vm.sketch.mark[keep], pages=vm.sketch.pages[keep])
        )
    other = keys_of(b"a secret of the fleet", "other")
    for n in (12, 13):
        vm = TREE.vm("a", 0, n, 64)
        sketch = sketch_of(TREE.digests(0, n), 64, other)
        vms.append(replace(vm, trust_domain="other", sketch=sketch))
    empty = TREE.vm("b", 1, 14, 64)
    nothing = replace(empty.sketch, mark=empty.sketch.mark[:0], pages=empty.sketch.pages[:0])
    return [*vms, replace(empty, sketch=nothing)]


def compared(group: Any, vms: list[SketchedVm]) -> list[Any]:
    """Everything that is computed from sketches."""
    from vmdedup.hosts.alike import similarity
    from vmdedup.hosts.planning import candidates, plan
    from vmdedup.hosts.sketch_table import SketchTable, as_table

    table = SketchTable(as_table(vms), group)
    answers = [answer(host, *(vm for vm in vms if vm.host == host), max_vms=9) for host in "abc"]
    inventory = Inventory(hosts=[each.host for each in answers])
    return [
        similarity(table, [], alike=0.6, most_pairs=1000),
        plan(table, inventory, answers, [], worth_percent=1),
        candidates(table, f"{vms[0].host}/{vms[0].name}", answers, []),
        table.contents.tolist(),
    ]


def test_two_workers_give_the_same_as_this_process(cluster: Any) -> None:
    from vmdedup.hosts.cluster import grouped_on

    vms = mixed()
    here = compared(None, vms)
    assert len(here[0].kinds) == 4
    assert len(here[0].pairs) == 12 * 11 / 2 + 1
    assert here[1].moves
    with grouped_on(cluster.scheduler_address) as group:
        assert compared(group, vms) == here
        # With fewer VMs than slices, and with none.
        assert compared(group, vms[:2]) == compared(None, vms[:2])
        from vmdedup.hosts.sketch_table import SketchTable, as_table

        assert len(SketchTable(as_table([]), group).classes) == 0


def duckdb_there() -> tuple[str, int]:
    """Memory and threads that DuckDB may take on a worker."""
    from vmdedup.hosts import cluster, grouping

    settings = "SELECT current_setting('memory_limit'), current_setting('threads')"
    with cluster._within_worker(), grouping.database() as connection:
        (found,) = connection.sql(settings).fetchall()
    return found[0], found[1]


def test_duckdb_takes_a_workers_share(cluster: Any) -> None:
    from vmdedup.hosts.cluster import grouped_on

    with grouped_on(cluster.scheduler_address) as group:
        client = group.args[0]  # type: ignore[attr-defined]
        told, threads = client.submit(duckdb_there, pure=False).result()
        (limit, _) = (each["memory_limit"] for each in client.scheduler_info()["workers"].values())
    number, unit = told.split()
    assert unit == "GiB"
    assert float(number) == pytest.approx(0.6 * limit / 2**30, abs=0.1)
    assert threads == 1


def test_a_worker_that_is_killed_is_told_or_replaced(cluster: Any) -> None:
    """Its slices may be lost: then that is one line, and the next try works."""
    from vmdedup.hosts.cluster import grouped_on

    with grouped_on(cluster.scheduler_address) as group:
        client = group.args[0]  # type: ignore[attr-defined]
        pids = client.run(os.getpid)
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        expected = compared(None, mixed())
        try:
            said, found = "", compared(group, mixed())
        except VmdedupError as error:
            said, found = str(error), expected
        assert found == expected
        assert re.fullmatch("(the cluster failed, try again: .+)?", said)
        client.wait_for_workers(2, timeout=60)
        assert compared(group, mixed()) == expected


def test_the_verb_compares_there(cluster: Any, tmp_path: Path) -> None:
    from vmdedup.hosts.sketch_table import as_table, write_parquet

    write_parquet(as_table(mixed()), tmp_path / "sketches.parquet")
    words = ["similar", "--from", str(tmp_path / "sketches.parquet")]
    there, _ = fleet(*words, "--scheduler", cluster.scheduler_address)
    assert there == fleet(*words)[0]


def test_what_is_no_cluster_is_one_line(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmdedup.hosts import cluster as module

    monkeypatch.setattr(module, "_CONNECT_LIMIT_S", 1)
    for url, told in (("tcp://127.0.0.1:1", "no Dask scheduler"), ("nonsense://x", "nonsense")):
        with pytest.raises(UsageError, match=told) as refused, module.grouped_on(url):
            pass
        assert "\n" not in str(refused.value)
    _, said = fleet("report", "--hosts", "x", "--scheduler", "tcp://127.0.0.1:1", code=2)
    assert "a report compares nothing" in said
    with module.grouped_on(cluster.scheduler_address) as group:
        no_marks = importlib.import_module("pyarrow").table({"id": [1, 2]})
        with pytest.raises(
            VmdedupError, match="the cluster failed, try again: BinderException"
        ) as failed:
            group(no_marks, 0).classes()
        assert "\n" not in str(failed.value)
