"""Fixtures around victim processes; everything here needs ptrace to work."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.harness.skips import require
from tests.process.victims import Victim, build
from vmdedup.errors import VmdedupError
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.syscalls import NR


@cache
def _injection_missing(program: Path) -> str | None:
    """Why system calls cannot be run in another process here; None when they can."""
    with Victim(program) as victim:
        try:
            with RemoteThread("probe", victim.pid, victim.worker) as remote:
                remote.call(NR.GETPID)
        except VmdedupError as error:
            return f"ptrace does not work here: {error}"
    return None


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    built = build(tmp_path_factory.mktemp("victims"))
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
