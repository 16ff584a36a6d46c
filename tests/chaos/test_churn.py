"""VMs that come and go all the time, most of them killed: the daemon keeps nothing of them."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.chaos.daemons import patiently
from tests.chaos.fleet import BACKENDS, becomes_true, merged_pages
from tests.harness.capabilities import root_missing
from tests.harness.vm import Vm
from tests.service.daemon import Daemon, Directories

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

_VMS = int(os.environ.get("VMDEDUP_CHURN_VMS", "12"))
"""How many VMs are started in all."""
_AT_A_TIME = 6
_PATIENCE_S = 120.0


def _status(daemon: Daemon, field: str) -> int:
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def _descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def _start(number: int, directories: Directories) -> Vm:
    backend = BACKENDS[number % len(BACKENDS)]
    parameters = {"mib": 1, "seed": number, "rewrite_per_s": 100}
    vm = Vm("bare", name=f"churn{number}", backend=backend, parameters=parameters)
    (directories.base / f"{vm.name}.qmp").symlink_to(vm.qmp_path)
    return vm


def _end(vm: Vm, directories: Directories, *, killed: bool) -> None:
    if killed:
        vm.kill()
    vm.close()
    (directories.base / f"{vm.name}.qmp").unlink()


def test_a_churn_of_vms_leaves_nothing_behind(need: Callable[[str | None], None]) -> None:
    need(root_missing())
    chance = random.Random(3)
    running: list[Vm] = []
    with Directories() as directories:
        pattern = str(directories.base / "*.qmp")
        directories.write("hang_limit_ms = 10000\nfirst_look_ms = 20\n")
        daemon = patiently(directories, "--qmp", pattern)
        try:
            merged, before = 0, (0, 0)
            for number in range(_VMS):
                running.append(_start(number, directories))
                time.sleep(chance.uniform(0, 0.5))
                if number == _AT_A_TIME - 1:
                    assert becomes_true(lambda: len(daemon.names()) == _AT_A_TIME, _PATIENCE_S)
                    assert becomes_true(lambda: any(map(_is_merged, running)), _PATIENCE_S)
                    before = _descriptors(daemon), _status(daemon, "RssAnon")
                merged = max(merged, sum(map(_is_merged, running)))
                if len(running) > _AT_A_TIME:
                    victim = running.pop(chance.randrange(len(running)))
                    _end(victim, directories, killed=chance.random() < 0.8)
            assert merged > 0
            print(
                "descriptors, RssAnon KiB:",
                before,
                _descriptors(daemon),
                _status(daemon, "RssAnon"),
            )
            for vm in running:
                vm.wait_ready()
                assert vm.errors == 0
            for vm in running:
                _end(vm, directories, killed=True)
            running.clear()
            _require_empty(daemon, directories, before)
            daemon.end()
        finally:
            for vm in running:
                vm.close()
            daemon.kill()
        assert "Traceback" not in directories.log.read_text()


def _is_merged(vm: Vm) -> bool:
    return vm.alive and merged_pages(vm.pid) > 0


def _require_empty(daemon: Daemon, directories: Directories, before: tuple[int, int]) -> None:
    """No VM, no counter above zero, no store page, no descriptor of a VM that was."""
    assert becomes_true(lambda: daemon.names() == set(), _PATIENCE_S)
    host = daemon.client.report(fresh=True).host
    counted = (host.pages_shared, host.pages_sharing, host.zero_pages, host.saved_bytes)
    assert counted == (0, 0, 0, 0)
    assert becomes_true(lambda: _descriptors(daemon) < before[0], _PATIENCE_S)
    # One that was killed while it was being attached is let go of a moment later.
    assert becomes_true(lambda: not _links_of_vms(daemon), _PATIENCE_S), _links_of_vms(daemon)
    assert becomes_true(lambda: _store_blocks(directories) == 0, _PATIENCE_S)
    assert _status(daemon, "RssAnon") < 1.5 * before[1]


def _store_blocks(directories: Directories) -> int:
    return sum(path.stat().st_blocks for path in directories.store.glob("*.store"))


def _links_of_vms(daemon: Daemon) -> list[str]:
    links = []
    for number in _numbers(daemon):
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(f"/proc/{daemon.process.pid}/fd/{number}"))
    return [link for link in links if "userfaultfd" in link or "pagemap" in link]


def _numbers(daemon: Daemon) -> list[str]:
    return os.listdir(f"/proc/{daemon.process.pid}/fd")
