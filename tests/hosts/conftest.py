"""Fixtures: one host for all tests, and a unit that is as shipped at the begin of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.host import Host, build_missing, make_payload
from tests.harness.skips import require
from tests.hosts.inner import InnerVm
from tests.hosts.unit import Unit

Need = Callable[[str | None], None]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Booted once; each test leaves it with the unit stopped and no VMs."""
    require(root_missing() or build_missing())
    with Host(make_payload(tmp_path_factory.mktemp("payload"))) as running:
        yield running


@pytest.fixture
def vms(host: Host) -> Iterator[list[InnerVm]]:
    """Two that share most of their memory, and write some of it all the time.

    Slowly: emulated twice over, they take the host's time from all others.
    """
    started = [
        InnerVm(host, name, seed=number, mib=4, rewrite_per_s=5, check_per_s=100)
        for number, name in enumerate(("one", "two"), 1)
    ]
    for vm in started:
        vm.wait_ready()
    yield started
    for vm in started:
        vm.end()


@pytest.fixture
def unit(host: Host) -> Iterator[Unit]:
    """The shipped unit, installed and not running."""
    unit = Unit(host)
    unit.install()
    yield unit
    print(unit.journal()[-6000:])  # shown by pytest when the test has failed
    unit.end()
