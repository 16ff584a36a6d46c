"""Fixtures: a driver for engines that die, and a fleet that outlives them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.engines import Driver
from tests.chaos.fleet import Fleet
from tests.qemu.conftest import need

__all__ = ["driver", "fleet", "need"]


@pytest.fixture(scope="package")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with Driver(tmp_path_factory.mktemp("driver") / "stderr.log") as running:
        yield running


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """All backends under write load; the same VMs for every test here, crash after crash.

    They end with the last of these tests: under load they would slow down all others.
    """
    with Fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running.boot_all_backends()
