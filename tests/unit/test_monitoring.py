"""The examples for Prometheus and Grafana name metrics that exist, and CI's are valid jobs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tests.service.engine import CONTROLS, sharing, vm_report
from vmdedup.api.metrics import exposition
from vmdedup.cli.main import app
from vmdedup.ipc.protocol import ControlValues, EngineHealth, Histogram, Snapshot
from vmdedup.models import MemoryPlace, VmList
from vmdedup.policy.hazards import HAZARDS, Verdict
from vmdedup.policy.refusals import REFUSALS

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = re.compile(r"\bvmdedup_\w+")


def served() -> set[str]:
    """The names of all samples that a daemon serves."""
    counts = {"unique_pages": 1, "volatile_pages": 1, "swapped_pages": 0, "absent_pages": 2}
    counts |= {"huge_pages": 3, "pages_kept_in_huge": 4}
    place = MemoryPlace(
        place="host",
        vms=["web"],
        needed_bytes=3,
        available_bytes=2,
        swap_bytes=0,
        breaks_per_s=1.0,
        lasts_s=2.0,
        reserve_bytes=1,
    )
    vm = vm_report("web").model_copy(update=counts)
    report = sharing([vm]).model_copy(update={"memory": [place]})
    totals = {"cow_breaks": 5, "pages_skipped": 3, "huge_pages_split": 2}
    host = report.host.model_copy(update=totals)
    snapshot = Snapshot(
        unix_s=1.0,
        report=report.model_copy(update={"host": host}),
        vms=VmList(vms=[]),
        controls=ControlValues(values=CONTROLS),
        health=EngineHealth(
            engine_pid=1, started_unix_s=0, passes=1, last_pass_unix_s=1, last_pass_ms=1
        ),
        gates=Histogram().plus([1.0]),
        drains=Histogram().plus([1.0]),
    )
    text = exposition(snapshot, "1").decode()
    return {match for line in text.splitlines() if line[:1] != "#" for match in NAMES.findall(line)}


def load(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())


def test_scraping_finds_the_rules() -> None:
    document = load("prometheus/scrape.yml")
    (job,) = document["scrape_configs"]
    assert job["job_name"] == "vmdedup"
    for file in document["rule_files"]:
        assert (CONFIGS / "prometheus" / file).is_file()


def test_alerts_speak_of_metrics_that_exist() -> None:
    (group,) = load("prometheus/alerts.yml")["groups"]
    known = served()
    for rule in group["rules"]:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning")
        assert set(NAMES.findall(rule["expr"])) <= known, rule["alert"]
        assert {"summary", "description"} == set(rule["annotations"])
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])


def test_the_dashboard_speaks_of_metrics_that_exist() -> None:
    board = json.loads((CONFIGS / "grafana/vmdedup.json").read_text())
    known = served()
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            names = NAMES.findall(target["expr"])
            assert names
            assert set(names) <= known, panel["title"]
            own = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert own <= variables
    places = [tuple(panel["gridPos"][key] for key in ("x", "y")) for panel in board["panels"]]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        ("github-actions.yml", ["vendor.github-workflows"]),
        ("gitlab-ci.yml", ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"]),
    ],
)
def test_ci_examples_are_valid_jobs(file: str, schema: list[str]) -> None:
    command = [sys.executable, "-m", "check_jsonschema", str(CONFIGS / "ci" / file)]
    done = subprocess.run(
        [*command, "--builtin-schema", *schema], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", ["github-actions.yml", "gitlab-ci.yml"])
def test_ci_examples_name_what_exists(file: str) -> None:
    text = (CONFIGS / "ci" / file).read_text()
    for name in re.findall(r"configs/[\w./-]+\w", text):
        assert (CONFIGS.parent / name).exists(), name
    report = set(re.findall(r"vmdedup report (.*)", text))
    assert report
    known = {option for each in command_of("report").params for option in each.opts}
    for options in report:
        assert {word for word in options.split() if word.startswith("-")} <= known


def command_of(verb: str) -> Any:
    command: Any = typer.main.get_command(app)
    return command.commands[verb]


def test_every_kind_of_refusal_has_a_label() -> None:
    assert {row.key for row in HAZARDS if row.verdict >= Verdict.PAUSE} <= set(REFUSALS)
    assert len(set(REFUSALS)) == len(REFUSALS)
