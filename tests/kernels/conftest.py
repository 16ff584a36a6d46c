"""Fixtures: the host with the kernel that is tried, and a place for what was found on it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.host import Host, build_missing, make_payload
from tests.harness.skips import require
from tests.hosts.conftest import unit
from tests.kernels.payload import add_process_tests
from tests.kernels.table import FAILED

__all__ = ["unit"]

SERIES = "VMDEDUP_KERNEL"
"""The environment variable that names the series; else the newest kernel that apt offers."""
FOUND = "VMDEDUP_KERNEL_FOUND"
"""And the one that names the file for what is found."""

Note = Callable[..., None]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Booted once for all tests."""
    series = os.environ.get(SERIES, "")
    require(root_missing() or build_missing(series))
    payload = make_payload(tmp_path_factory.mktemp("payload"), add=add_process_tests)
    with Host(payload, series=series) as running:
        yield running


_COLUMNS = {
    "test_processes": ["process"],
    "test_live_on_every_backend": ["live", "incremental"],
    "test_in_pauses_on_every_backend": ["pauses"],
    "test_the_unit": ["unit"],
}


def keep(**facts: str) -> None:
    """Facts for the table."""
    if path := os.environ.get(FOUND):
        file = Path(path)
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | facts))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What has failed is told in the table too."""
    if report.failed:
        name = report.nodeid.rpartition("::")[2]
        keep(**dict.fromkeys(_COLUMNS.get(name, []), FAILED))


@pytest.fixture
def note() -> Note:
    """Keeps facts for the table."""
    return keep
