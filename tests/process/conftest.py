"""Fixtures around victim processes; everything here needs ptrace to work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.process.victims import Victim, build
from vmdedup.errors import VmdedupError
from vmdedup.inject.remote import RemoteThread
from vmdedup.syscalls import NR


@cache
def _injection_missing(program: Path) -> str | None:
    """Why system calls can not be run in another process here; None when they can."""
    with Victim(program) as victim:
        try:
            with RemoteThread("probe", victim.pid, victim.worker) as remote:
                remote.call(NR.GETPID)
        except VmdedupError as error:
            return f"ptrace does not work here: {error}"
    return None


def require(missing: str | None) -> None:
    """Skip with the reason; VMDEDUP_REQUIRE=1 makes it a failure."""
    if missing is None:
        return
    if os.environ.get("VMDEDUP_REQUIRE") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("victims")
    built = {
        "dynamic": build(folder / "dynamic"),
        "static": build(folder / "static", "-static"),
    }
    require(_injection_missing(built["dynamic"]))
    return built


@pytest.fixture
def victim(programs: dict[str, Path]) -> Iterator[Victim]:
    with Victim(programs["dynamic"]) as running:
        yield running


@pytest.fixture(params=["stub", "chain"])
def stub(request: pytest.FixtureRequest) -> bool:
    """Both ways to run a batch."""
    return bool(request.param == "stub")
