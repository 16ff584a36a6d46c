"""The real daemon's processes, killed or stopped alone and together."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from tests.chaos.daemons import patiently
from tests.chaos.fleet import Fleet, becomes_true, is_running, merged_pages
from tests.harness.vm import Backend
from tests.service.daemon import Daemon, Directories, killed_at
from vmdedup.client import ServiceError

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

_KILLS = int(os.environ.get("VMDEDUP_CHAOS_KILLS", "7"))
_CHILDREN = ("engine", "server", "guardian")
_SETS = [each for size in (1, 2, 3) for each in combinations(_CHILDREN, size)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("children")) as running:
        yield running


class Service:
    """VMs, and daemons one after the other on the same directories."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._exits = ExitStack()

    def __enter__(self) -> Service:
        self.directories = self._exits.enter_context(Directories())
        self.fleet = self._exits.enter_context(Fleet(self._folder))
        self.fleet.boot(
            {},
            {"backend": Backend("ram", share=False, mib=32)},
            {"backend": Backend("file", share=True, mib=32)},
        )
        sockets = ", ".join(f'"{path}"' for path in self.fleet.sockets)
        self.directories.write(
            f"qmp = [{sockets}]\nfirst_look_ms = 20\nhang_limit_ms = 5000\n"
            "[controls]\nsleep_millisecs = 5\n"
        )
        self.fleet.settings = self.fleet.settings.model_copy(
            update={"runtime_dir": self.directories.runtime, "store_dir": self.directories.store}
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def start(self) -> Daemon:
        """A daemon that has taken over what is merged, and has merged all VMs."""
        stood = {vm.name: merged_pages(vm.pid) for vm in self.fleet.vms}
        daemon = patiently(self.directories)
        try:
            assert becomes_true(lambda: len(daemon.names()) == len(self.fleet.vms)), self.log
            for row in daemon.client.report(fresh=True).vms:
                if stood[row.name]:
                    assert row.merged_pages + row.zero_pages + row.cow_broken_pages > 0
            assert becomes_true(lambda: self._all_merge(daemon)), self.log
        except BaseException:
            daemon.kill()
            raise
        return daemon

    def _all_merge(self, daemon: Daemon) -> bool:
        rows = daemon.client.report(fresh=True).vms
        return len(rows) == len(self.fleet.vms) and all(row.merged_pages for row in rows)

    @property
    def log(self) -> str:
        return self.directories.log.read_text()

    def require_well(self) -> None:
        assert "Traceback" not in self.log, self.log
        self.fleet.require_unharmed()


def _pids(daemon: Daemon) -> dict[str, int]:
    health = daemon.client.health()
    assert health.engine.guardian_pid is not None
    return {
        "engine": health.engine.engine_pid,
        "server": health.server_pid,
        "guardian": health.engine.guardian_pid,
    }


def _has_ended(pid: int) -> bool:
    return not is_running(pid)


def _is_replaced(daemon: Daemon, killed: dict[str, int]) -> bool:
    try:
        if "guardian" in killed:  # it is only missed when a VM is armed again
            some = sorted(daemon.names())[:1]
            daemon.client.unmerge(some)
            daemon.client.merge(some, timeout_s=5)
        now = _pids(daemon)
    except ServiceError:
        return False
    return all(now[child] != pid for child, pid in killed.items())


def test_children_killed_alone_and_together(service: Service) -> None:
    """The engine replaces the others; a dead engine is followed by the next daemon."""
    moments = random.Random(11)
    daemon = service.start()
    try:
        for kill in range(_KILLS):
            chosen = _SETS[kill % len(_SETS)]
            pids = _pids(daemon)
            killed = {child: pids[child] for child in chosen}
            time.sleep(moments.uniform(0, 0.5))
            for pid in killed.values():
                os.kill(pid, signal.SIGKILL)
            if "engine" in chosen:
                daemon.kill()
                for pid in pids.values():
                    assert becomes_true(partial(_has_ended, pid), 30)
                if "guardian" not in chosen:  # else the next engine resumes what was paused
                    service.fleet.require_released()
                daemon = service.start()
            else:
                assert becomes_true(lambda: _is_replaced(daemon, killed)), service.log  # noqa: B023
            service.require_well()
        daemon.end()
    finally:
        daemon.kill()
    service.fleet.require_all_well()


@pytest.mark.parametrize("child", ["server", "guardian"])
def test_a_child_that_hangs_does_not_hold_the_engine(service: Service, child: str) -> None:
    daemon = service.start()
    try:
        pid = _pids(daemon)[child]
        passes = daemon.client.health().engine.passes
        os.kill(pid, signal.SIGSTOP)
        used_s = daemon.cpu_s()
        assert becomes_true(lambda: daemon.cpu_s() > used_s + 0.3), "it does not go on"
        service.require_well()
        if child == "server":
            os.kill(pid, signal.SIGCONT)
        assert becomes_true(lambda: daemon.client.health().engine.passes > passes), service.log
        if child == "server":
            os.kill(pid, signal.SIGSTOP)
        daemon.end()
        assert becomes_true(lambda: not is_running(pid))
    finally:
        daemon.kill()
    service.fleet.require_all_well()


def test_the_daemon_killed_at_steps(service: Service) -> None:
    """The steps of the library's own chaos, with the service around them."""
    for number, step in enumerate(("armed", "gate-closed", "launched", "merged", "lent")):
        program = killed_at(step, number % 3)
        with service.directories.log.open("ab") as log:
            doomed = subprocess.Popen(
                [sys.executable, "-c", program, "run", "--config", service.directories.config],
                stdout=log,
                stderr=log,
                env=service.directories.environment,
            )
        try:
            assert doomed.wait(60) == -signal.SIGKILL, service.log
        finally:
            doomed.kill()
            doomed.wait()
        service.fleet.require_released()
        service.fleet.require_unharmed()
        daemon = service.start()
        daemon.end()
        daemon.kill()
    service.fleet.require_all_well()
