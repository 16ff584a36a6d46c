"""merge_across_nodes=0 through the daemon: on one node it merges the same, and stays right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot
from tests.service.daemon import Daemon, Directories, running, store_pages, wait_mergeable
from vmdedup.client import ServiceError
from vmdedup.models import HostReport

pytestmark = pytest.mark.qemu

BACKENDS = [
    Backend("memfd", share=True, mib=16),
    Backend("ram", share=False, mib=16),
    Backend("memfd", share=False, mib=16),
]
QUIET = {"mib": 4, "hold": 1, "check_per_s": 8192}


@pytest.fixture
def directories(need: Callable[[str | None], None]) -> Iterator[Directories]:
    need(root_missing())
    with Directories() as made:
        yield made


def test_pages_of_one_node_are_shared_also_with_those_of_a_killed_daemon(
    directories: Directories, boot: Boot
) -> None:
    vms = [
        boot("bare", backend=backend, parameters={"seed": number, **QUIET})
        for number, backend in enumerate(BACKENDS, 1)
    ]
    per_node = "--controls=merge_across_nodes=0"
    with running(directories, per_node, *_monitors(vms[:2])) as daemon:
        before = _merged(daemon, vms[:2])
        with pytest.raises(ServiceError, match="merge_across_nodes"):
            daemon.client.set(merge_across_nodes=1)
        daemon.process.kill()
    with running(directories, per_node, *_monitors(vms)) as daemon:
        after = _merged(daemon, vms)
        # The third finds what the first two share on the store's own node.
        assert after.pages_shared == pytest.approx(before.pages_shared, abs=16)
        assert after.pages_sharing > before.pages_sharing + 100
        daemon.client.set(run=2)
        assert [store_pages(vm) for vm in vms] == [0, 0, 0]
        daemon.client.set(merge_across_nodes=1, run=1)
        across = _merged(daemon, vms)
        assert across.pages_sharing == pytest.approx(after.pages_sharing, rel=0.05)
    for vm in vms:
        vm.wait_passes(1)


def _merged(daemon: Daemon, vms: list[Vm]) -> HostReport:
    wait_mergeable(daemon, *vms)
    report = daemon.client.merge(timeout_s=60)
    assert len(report.vms) == len(vms)
    return report.host


def _monitors(vms: list[Vm]) -> list[str]:
    return [word for vm in vms for word in ("--qmp", str(vm.qmp_path))]
