"""An unmerge that could not be done is told, kept in mind, and done when it can be."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true, mappings
from tests.harness.limits import filled, small_tmpfs
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import MakeSettings
from tests.qemu.conftest import settings as settings_fixture
from tests.qemu.serving import set_capability
from tests.service.conftest import Start
from tests.service.daemon import (
    Daemon,
    Directories,
    assert_unharmed,
    merged,
    monitors,
    running,
    store_pages,
)
from vmdedup.attach.discover import attach_all
from vmdedup.client import ServiceConflictError, ServiceUnfinishedError
from vmdedup.engine.fleet import Fleet
from vmdedup.errors import MonitorError, VmError
from vmdedup.models import UnmergedVm, VmReport
from vmdedup.remap.context import Host
from vmdedup.vm.attached_vm import AttachedVm

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("needs_root"),
]

settings = settings_fixture


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """On a tmpfs that holds one VM's RAM file; name it before `start`."""
    with small_tmpfs(tmp_path / "ram", 24 << 10) as path:
        yield path


def row_of(daemon: Daemon, vm: Vm) -> VmReport:
    (row,) = (row for row in daemon.client.report(fresh=True).vms if row.pid == vm.pid)
    return row


def assert_stays(daemon: Daemon, vm: Vm, stands: int) -> None:
    """For some rounds of the scan it is neither merged further nor let go of."""
    row = row_of(daemon, vm)
    assert row.left_to_unmerge_pages > stands / 2
    assert "MiB left" in (row.reason or ""), row
    (listed,) = (each for each in daemon.client.vms().vms if each.pid == vm.pid)
    assert listed.left_to_unmerge_pages > stands / 2
    assert not becomes_true(lambda: store_pages(vm) > stands, 3)
    assert daemon.happened("dropped") == []
    assert f'vmdedup_left_to_unmerge_pages{{vm="{vm.name}"}}' in metrics(daemon)


def metrics(daemon: Daemon) -> str:
    return daemon.client._http.get("/metrics").text


def test_an_unmerge_that_finds_no_room_is_done_when_there_is(
    directories: Directories, folder: Path, start: Start
) -> None:
    vm = start(Backend("file", mib=16, directory=folder))
    other = start()
    with running(directories, *monitors(vm, other)) as daemon:
        merged(daemon, vm, other)
        stood = store_pages(vm)
        with filled(folder):
            with pytest.raises(ServiceUnfinishedError) as unfinished:
                daemon.client.unmerge([vm.name])
            assert (unfinished.value.status, unfinished.value.kind) == (503, "unfinished")
            assert unfinished.value.unmerged is not None
            (left,) = unfinished.value.unmerged.vms
            assert (left.name, left.remaining_pages > stood / 2) == (vm.name, True)
            assert vm.name in str(unfinished.value)
            done = directories.verb("unmerge", vm.name, code=1)
            assert "MiB left" in done.stderr
            assert done.stderr.count("stay merged") == 1
            assert_stays(daemon, vm, stood)
            assert_unharmed(vm, other)
        assert becomes_true(lambda: store_pages(vm) == 0, 40)
        assert becomes_true(lambda: row_of(daemon, vm).left_to_unmerge_pages == 0, 10)
        assert store_pages(other) > 0
        assert not becomes_true(lambda: store_pages(vm) > 0, 2)
        merged(daemon, vm, other)
        assert_unharmed(vm, other)


def test_run_2_that_leaves_something_says_so_until_it_is_done_or_revoked(
    directories: Directories, folder: Path, start: Start
) -> None:
    vm = start(Backend("file", mib=16, directory=folder))
    with running(directories, *monitors(vm)) as daemon:
        merged(daemon, vm)
        stood = store_pages(vm)
        with filled(folder):
            for _ in range(2):
                with pytest.raises(ServiceUnfinishedError):
                    daemon.client.set(run=2)
                assert daemon.client.controls().values["run"] == 2
            failed = directories.verb("set", "run=2", code=1)
            assert "stay merged" in failed.stderr
            assert_stays(daemon, vm, stood)
            daemon.client.set(run=0)
            assert_stays(daemon, vm, stood)
            assert_unharmed(vm)
        assert becomes_true(lambda: store_pages(vm) == 0, 40)
        assert daemon.client.set(run=2).values["run"] == 2
        daemon.client.set(run=1)
        merged(daemon, vm)
        with filled(folder):
            with pytest.raises(ServiceUnfinishedError):
                daemon.client.set(run=2)
            daemon.client.set(run=1)
            assert row_of(daemon, vm).left_to_unmerge_pages == 0
        merged(daemon, vm)
        assert_unharmed(vm)


def test_run_2_unmerges_what_a_predecessor_left(directories: Directories, start: Start) -> None:
    vm = start()
    with running(directories, *monitors(vm)) as daemon:
        merged(daemon, vm)
        daemon.end()
    assert store_pages(vm) > 0
    with running(directories, "--controls", "run=2", *monitors(vm)):
        assert becomes_true(lambda: store_pages(vm) == 0, 40)
        assert_unharmed(vm)


@pytest.mark.parametrize("error", [MonitorError, VmError], ids=["monitor", "other"])
def test_a_vm_that_was_lost_in_its_unmerge_is_still_meant(
    settings: MakeSettings,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    error: type[VmError],
) -> None:
    """It is let go of, and when it is attached again it is unmerged and not merged."""
    vm = start()
    failing = True
    from vmdedup.remap.unmerge_vm import unmerge_vm

    def fails(host: Host, each: AttachedVm, **options: object) -> UnmergedVm:
        if not failing:
            return unmerge_vm(host, each)
        if error is MonitorError:
            raise MonitorError(each.name, "add-fd", "no answer", pid=each.pid)
        raise VmError(each.name, "lost", pid=each.pid)

    monkeypatch.setattr("vmdedup.engine.owed.unmerge_vm", fails)
    fleet = Fleet(settings(), merging=True)
    try:
        for found in attach_all([str(vm.qmp_path)], fleet.loop, timeout_s=20).attached:
            fleet.take_in(found)
        for _ in range(3):
            fleet.engine.run_pass(lambda _: None)
        assert store_pages(vm) > 200
        fleet.rest({vm.pid})
        (left,) = fleet.unmerge(None, lambda _: None).vms
        assert left.remaining_pages > 200
        assert fleet.pids() == set()
        failing = False
        for found in attach_all([str(vm.qmp_path)], fleet.loop, timeout_s=20).attached:
            fleet.take_in(found)
        before = store_pages(vm)
        fleet.engine.run_pass(lambda _: None)
        assert store_pages(vm) == before
        assert fleet.left_to_unmerge_pages > 200
        assert becomes_true(lambda: [row.remaining_pages for row in fleet.settle()] == [0], 40)
        assert store_pages(vm) == 0
    finally:
        fleet.close()
    assert_unharmed(vm)


def rule(vm: Vm, domain: str) -> str:
    return f'[[domains]]\nname = "{vm.name}"\ndomain = "{domain}"\n'


@pytest.mark.parametrize("domain", ["none", "other", "zero-only"])
def test_a_domain_is_left_as_soon_as_there_is_room(
    directories: Directories, folder: Path, start: Start, domain: str
) -> None:
    vm = start(Backend("file", mib=16, directory=folder))
    other = start()
    old = f"uid:{os.geteuid()}"
    with running(directories, *monitors(vm, other)) as daemon:
        merged(daemon, vm, other)
        stood = store_pages(vm)
        inodes = store_inodes(vm)
        with filled(folder):
            directories.write(rule(vm, domain))
            daemon.signal(signal.SIGHUP)
            assert becomes_true(lambda: len(daemon.happened("reloaded")) == 1, 40)
            assert becomes_true(lambda: row_of(daemon, vm).leaves_domain == old, 40)
            assert_stays(daemon, vm, stood)
            row = row_of(daemon, vm)
            assert row.merged_pages > stood / 2
            assert row.trust_domain == (None if domain == "none" else domain)
            assert "vmdedup_leaving_vms 1.0" in metrics(daemon)
            if domain == "none":
                with pytest.raises(ServiceConflictError):
                    daemon.client.merge([vm.name])
            else:
                assert not daemon.client.merge([vm.name], timeout_s=60).converged
            assert daemon.client.merge([other.name], timeout_s=60).converged
            assert "MiB left" in directories.verb("unmerge", vm.name, code=1).stderr
            assert_unharmed(vm, other)
        assert becomes_true(lambda: store_inodes(vm) == set(), 40)
        assert becomes_true(lambda: row_of(daemon, vm).leaves_domain is None, 40)
        assert "vmdedup_leaving_vms 0.0" in metrics(daemon)
        if domain == "none":
            assert becomes_true(lambda: row_of(daemon, vm).status == "refused", 40)
            assert not becomes_true(lambda: store_pages(vm) > 0, 2)
        else:
            daemon.client.merge([vm.name], timeout_s=60)
        assert not store_inodes(vm) & inodes
        assert (store_pages(vm) > 200) == (domain == "other")
        assert_unharmed(vm, other)


def store_inodes(vm: Vm) -> set[int]:
    return {each.inode for each in mappings(vm.pid) if each.is_store}


def test_a_rule_that_came_between_two_daemons_unmerges(
    directories: Directories, start: Start
) -> None:
    vms = [start(), start()]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        daemon.end()
    directories.write(rule(vms[0], "none"))
    with running(directories, *monitors(*vms)) as daemon:
        assert becomes_true(lambda: standing(vms[0]) == 0, 20)
        assert becomes_true(lambda: "never merged" in (daemon.row_of(vms[0])[1] or ""), 10)
        assert store_pages(vms[1]) > 0
        assert daemon.client.unmerge([vms[0].name]).vms[0].remaining_pages == 0
        assert becomes_true(lambda: "never merged" in (daemon.row_of(vms[0])[1] or ""), 10)
        assert_unharmed(*vms)


def standing(vm: Vm) -> int:
    """Mappings that stand on a store or on /dev/zero."""
    return sum(each.is_store or each.path == "/dev/zero" for each in mappings(vm.pid))


def is_of_colo(ask: Callable[[], object]) -> bool:
    return "COLO" in left_by(ask)


def left_by(ask: Callable[[], object]) -> str:
    with pytest.raises(ServiceUnfinishedError) as unfinished:
        ask()
    return str(unfinished.value)


def test_what_is_refused_by_now_is_unmerged_all_the_same(
    directories: Directories, start: Start
) -> None:
    """Where its hazard allows it: COLO, which stands for what pins, does not."""
    vms = [start(), start()]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        set_capability(vms[0], "x-colo")
        assert becomes_true(lambda: not daemon.row_of(vms[0])[0], 40)
        assert store_pages(vms[0]) > 200
        for ask in (
            lambda: daemon.client.unmerge([vms[0].name]),
            daemon.client.unmerge,
            lambda: daemon.client.set(run=2),
        ):
            # The daemon itself may just be looking at it, which takes its monitor.
            assert becomes_true(partial(is_of_colo, ask), 40)
            assert f"{vms[1].name} " not in left_by(ask)
        assert store_pages(vms[1]) == 0
        daemon.client.set(run=1)
        assert becomes_true(lambda: row_of(daemon, vms[0]).left_to_unmerge_pages == 0, 10)
        assert row_of(daemon, vms[0]).status == "refused"
        assert store_pages(vms[0]) > 200
        assert becomes_true(partial(is_of_colo, lambda: daemon.client.set(run=2)), 40)
        set_capability(vms[0], "x-colo", False)
        assert becomes_true(lambda: standing(vms[0]) == 0, 60)
        assert_unharmed(*vms)
