"""`vmdedup fleet` asks hosts of which some are away, slow, or lie: the others are answered for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.harness.capabilities import fleet_extra_missing
from tests.harness.sshd import Sshd, sshd_missing
from tests.qemu.conftest import Need
from tests.service.daemon import verb
from tests.service.engine import ScriptedEngine
from vmdedup.ipc.protocol import ReadSketch
from vmdedup.models import VmSketch

pytestmark = pytest.mark.service

SAVED = 2 * (3000 // 2 + 500) * 4096
"""What the scripted engine of two VMs reports."""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[ScriptedEngine]]:
    with ExitStack() as exits:
        engines = []
        for name in "ab":
            (tmp_path / name).mkdir()
            engines.append(exits.enter_context(ScriptedEngine(tmp_path / name)))
            engines[-1].push()
        yield engines


@pytest.fixture
def sshd(tmp_path: Path, need: Need) -> Iterator[Sshd]:
    """One whose `vmdedup` is for each test to install."""
    need(sshd_missing())
    with Sshd(tmp_path / "sshd", {}, installed=False) as running:
        yield running


def listed(tmp_path: Path, *urls: tuple[str, str], limits: str = "max_vms = 2") -> list[str]:
    file = tmp_path / "hosts.toml"
    rows = [f'[[hosts]]\nname = "{name}"\nurl = "{url}"\n{limits}\n' for name, url in urls]
    file.write_text("".join(rows))
    return ["--hosts", str(file)]


def fleet(*words: str, code: int = 0, path: str = "", certificates: str = "") -> tuple[Any, str]:
    """The JSON of `vmdedup fleet`, and its lines on stderr."""
    environment = {"PATH": f"{path}:{os.environ['PATH']}", "VMDEDUP_CERT_PATH": certificates}
    done = verb("fleet", *words, "--json", code=code, **environment)
    return json.loads(done.stdout) if done.stdout else None, done.stderr


def test_hosts_that_fail_are_rows_and_the_others_are_counted(
    two: list[ScriptedEngine], sshd: Sshd, tmp_path: Path
) -> None:
    sshd.install("vmdedup", "exec sleep 60")
    a, b = (str(engine.api.path) for engine in two)
    hosts = listed(
        tmp_path,
        ("a", a),
        ("silent", sshd.url),
        ("away", "ssh://root@127.0.0.1:1"),
        ("none", str(tmp_path / "nowhere.sock")),
        ("a", b),
        ("b", b),
    )
    found, said = fleet("report", *hosts, "--timeout", "8", path=str(sshd.user_programs))
    rows = [(row["host"], row["vms"], row["reason"] or "") for row in found["hosts"]]
    assert [row[:2] for row in rows] == [
        ("a", 2),
        ("silent", 0),
        ("away", 0),
        ("none", 0),
        ("a", 0),
        ("b", 2),
    ]
    for number, told in (
        (1, "not done after 8 s"),
        (2, "Connection refused"),
        (3, "no service at"),
        (4, "another host of the list has this name"),
    ):
        assert told in rows[number][2]
        assert rows[number][2] in said
    assert (found["vms"], found["saved_bytes"]) == (4, 2 * SAVED)
    assert len(said.splitlines()) == 4


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("exec yes", "connection ended"),
        ("printf 'HTTP/1.1 200 OK\\r\\n\\r\\n'; exec yes", "over [0-9]+ bytes"),
        ("printf 'HTTP/1.1 200 OK\\r\\n\\r\\n{}'", "not an answer of this version"),
    ],
)
def test_a_host_that_sends_nonsense_is_a_row(
    two: list[ScriptedEngine], sshd: Sshd, tmp_path: Path, says: str, told: str
) -> None:
    sshd.install("vmdedup", says)
    hosts = listed(tmp_path, ("bad", sshd.url), ("a", str(two[0].api.path)))
    found, _ = fleet("report", *hosts, path=str(sshd.user_programs))
    assert re.search(told, found["hosts"][0]["reason"])
    assert found["vms"] == 2


def test_no_host_at_all_is_a_failure(tmp_path: Path) -> None:
    found, said = fleet("report", *listed(tmp_path, ("a", str(tmp_path / "x"))), code=1)
    assert found["vms"] == 0
    assert "no service at" in said


def test_the_ending_of_the_file_chooses_the_format(tmp_path: Path) -> None:
    page, hosts = tmp_path / "fleet.html", listed(tmp_path, ("a", str(tmp_path / "x")))
    assert verb("fleet", "report", *hosts, "-o", str(page), code=1).stdout == ""
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["repot"], "choose one of report"),
        (["report"], "--hosts"),
        (["place", "--hosts", "x"], "place needs a VM"),
        (["plan", "--from", "x"], "--from is for similar"),
        (["similar", "--hosts", "x", "--rate", "100"], "power of two"),
        (["similar", "--hosts", "/nowhere/x"], "No such file"),
    ],
)
def test_usage_errors_are_one_line(words: list[str], told: str) -> None:
    _, said = fleet(*words, code=2)
    assert told in said
    assert said.count("\n") == 1


@pytest.fixture
def engine_there(need: Need) -> None:
    need(fleet_extra_missing())


@pytest.mark.usefixtures("engine_there")
def test_a_sketch_that_lies_is_left_out_and_said(two: list[ScriptedEngine], tmp_path: Path) -> None:
    def lie(command: Any) -> Any:
        found = two[1].obey(command)
        if isinstance(command, ReadSketch):
            assert isinstance(found, VmSketch)
            return found.model_copy(update={"marks": "AAAA"})
        return found

    two[1].answer = lie
    hosts = listed(tmp_path, *((name, str(e.api.path)) for name, e in zip("ab", two, strict=True)))
    parquet = tmp_path / "sketches.parquet"
    found, said = fleet("similar", *hosts, "--sketches", str(parquet))
    assert "its sketch makes no sense" in said
    assert [row["vms"] for row in found["hosts"]] == [2, 2]
    assert [len(kind["vms"]) for kind in found["kinds"]] == [2]
    again, _ = fleet("similar", "--from", str(parquet))
    assert (again["kinds"], again["pairs"]) == (found["kinds"], found["pairs"])
    assert fleet("plan", *hosts)[0]["moves"] == []
    placed, _ = fleet("place", "a/web", *hosts)
    assert [each["host"] for each in placed["candidates"]] == ["a", "b"]


def test_without_the_extra_it_is_said(two: list[ScriptedEngine], tmp_path: Path) -> None:
    if fleet_extra_missing() is None:
        pytest.skip("the extra is installed")
    _, said = fleet("similar", *listed(tmp_path, ("a", str(two[0].api.path))), code=1)
    assert "pip install 'vmdedup[fleet]'" in said
