"""The daemon as it is used: a process, its socket, real VMs, and what the kernel says of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot
from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import (
    ALLOWANCE,
    COMMAND,
    Daemon,
    Directories,
    assert_unharmed,
    merged,
    monitors,
    running,
    saved,
    store_pages,
    wait_mergeable,
)
from vmdedup.client import ServiceConflictError, ServiceError, ServiceUsageError

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

BOTH = 300
"""Fewer than the store pages that two guests of this make map each; one alone has 256."""


def test_from_start_to_end(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, "--json", *monitors(*vms)) as daemon:
        assert daemon.start_s < 4 * ALLOWANCE
        report = daemon.client.merge(timeout_s=60)
        assert report.converged
        assert {vm.name for vm in report.vms} == {vm.name for vm in vms}
        assert report.host.pages_sharing > 500
        merged_pages = {row.name: row.merged_pages for row in report.vms}
        for vm in vms:
            assert merged_pages[vm.name] == pytest.approx(store_pages(vm), abs=64)
        assert daemon.end() < 2 * ALLOWANCE
        last = json.loads(directories.out.read_text())
        assert last["host"]["saved_bytes"] == pytest.approx(report.host.saved_bytes, rel=0.1)
    assert min(map(store_pages, vms)) > BOTH
    assert not (directories.runtime / "vmdedup.sock").exists()
    assert_unharmed(*vms)


def test_vms_come_and_go(directories: Directories, start: Start, boot: Boot) -> None:
    """By a pattern that matches nothing at first; the one that ends leaves the others merged."""
    pattern = directories.base / "*.qmp"
    with running(directories, "--qmp", str(pattern)) as daemon:
        assert daemon.names() == set()
        vms = [start(SHARED), start(PRIVATE), start(SHARED)]
        for vm in vms:
            (directories.base / f"{vm.name}.qmp").symlink_to(vm.qmp_path)
        assert becomes_true(lambda: min(map(store_pages, vms)) > BOTH, 60)
        vms[0].kill()
        assert becomes_true(lambda: daemon.names() == {vm.name for vm in vms[1:]}, 10)
        assert any("ended" in message for message in daemon.happened("dropped"))
        report = daemon.client.report(fresh=True)
        assert {vm.name: vm.status for vm in report.vms} == dict.fromkeys(daemon.names(), "merged")
        assert_unharmed(*vms[1:])
        assert daemon.client.merge(timeout_s=60).converged


def test_merge_now_finds_the_vm_that_was_just_started(
    directories: Directories, start: Start
) -> None:
    with running(directories, "--qmp", str(directories.base / "*.qmp")) as daemon:
        with pytest.raises(ServiceError) as refused:
            daemon.client.merge()
        assert refused.value.status == 404
        vm = start()
        (directories.base / "a.qmp").symlink_to(vm.qmp_path)
        merged(daemon, vm)
        assert_unharmed(vm)


def test_merge_now_lets_pages_hold_still_first(directories: Directories, start: Start) -> None:
    first_look_s = 1.5
    directories.write(f"first_look_ms = {first_look_s * 1000:.0f}\n")
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, "--controls", "run=0", *monitors(*vms)) as daemon:
        wait_mergeable(daemon, *vms)
        daemon.client.set(run=1)
        daemon.client.unmerge()  # they are left alone until somebody asks
        began = time.monotonic()
        with ThreadPoolExecutor(1) as waiter:
            asked = waiter.submit(daemon.client.merge, timeout_s=60)
            assert becomes_true(lambda: any(map(store_pages, vms)), 12 * ALLOWANCE)
            assert time.monotonic() - began >= first_look_s
            assert asked.result().converged


def test_controls(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    controls = "--controls=max_page_sharing=100"
    with running(directories, controls, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        before = daemon.client.controls().values
        assert before["run"] == 1
        assert before["max_page_sharing"] == 100
        for now in ({"pages_to_scan": 200}, {"max_page_sharing": 50}):
            with pytest.raises(ServiceConflictError) as impossible_now:
                daemon.client.set(**now)
            assert impossible_now.value.status == 409
        for refused in (
            {"sleep_millisecs": 33, "run": 7},
            {"sleep_millisecs": 33, "max_page_shareing": 2},
            {"sleep_millisecs": "soon"},
        ):
            with pytest.raises(ServiceUsageError) as impossible:
                daemon.client.set(**refused)
            assert impossible.value.status == 422
        kept = daemon.client.controls().values
        own = before.keys() - {"pages_to_scan"}
        assert {name: kept[name] for name in own} == {name: before[name] for name in own}
        changed = daemon.client.set(advisor_mode="none", pages_to_scan=1234, sleep_millisecs=5)
        assert changed.values["pages_to_scan"] == 1234
        assert daemon.client.controls() == changed
        assert daemon.client.set(max_page_sharing=100) == changed
        assert_unharmed(*vms)


def test_run_0_keeps_and_run_2_unmerges(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        daemon.client.set(run=0)
        scans = daemon.client.report(fresh=True).host.full_scans
        later = start(SHARED)
        daemon.client.attach(later.qmp_path)
        with pytest.raises(ServiceError) as refused:
            daemon.client.merge()
        assert refused.value.status == 409
        assert_unharmed(*vms, later)
        report = daemon.client.report(fresh=True)
        assert report.host.full_scans == scans
        assert min(map(store_pages, vms)) > 250
        assert store_pages(later) == 0

        began = time.monotonic()
        assert daemon.client.set(run=2).values["run"] == 2
        assert time.monotonic() - began < 3 * ALLOWANCE
        assert [store_pages(vm) for vm in vms] == [0, 0]
        assert saved(daemon) == 0
        assert daemon.client.set(max_page_sharing=50, run=1).values["max_page_sharing"] == 50
        merged(daemon, *vms, later)
        assert_unharmed(*vms, later)


def userfaults(pid: int) -> int:
    """How many userfaultfds a process holds: one for each VM whose writes it follows."""
    folder = f"/proc/{pid}/fd"
    links = []
    for number in os.listdir(folder):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"{folder}/{number}"))
    return links.count("anon_inode:[userfaultfd]")


def test_what_was_unmerged_stays_so_until_asked_for(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        assert userfaults(daemon.process.pid) == 2
        directories.verb("unmerge", vms[0].name)
        assert userfaults(daemon.process.pid) == 1
        passes = daemon.client.health().engine.passes
        daemon.client.merge([vms[1].name], timeout_s=60)
        assert daemon.client.health().engine.passes > passes
        assert store_pages(vms[0]) == 0
        assert store_pages(vms[1]) > 0
        merged(daemon, *vms)
        assert_unharmed(*vms)


def test_preallocated_memory_is_merged_once_it_is_registered(
    directories: Directories, start: Start
) -> None:
    """QEMU was told to keep it present, so nobody merges it unasked; KSM would."""
    allocated = Backend("memfd", share=True, mib=16, options="prealloc=on")
    vms = [start([PRIVATE, allocated]), start(allocated)]
    with running(directories, *monitors(*vms)) as daemon:
        assert becomes_true(lambda: daemon.names() == {vm.name for vm in vms}, 10)
        wait_mergeable(daemon, vms[0])
        mergeable, reason = daemon.row_of(vms[1])
        assert not mergeable
        assert "prealloc=on keeps all its memory present" in (reason or "")
        assert "register it" in (reason or "")
        for vm, backend in zip(vms, ("ram1", "ram0"), strict=True):
            done = daemon.client.register(vm.name, backend)
            assert done.complete
            assert [(it.offset_bytes, it.length_bytes) for it in done.registered] == [(0, 16 << 20)]
        merged(daemon, *vms)
        assert_unharmed(*vms)
        for vm, backend in zip(vms, ("ram1", "ram0"), strict=True):
            assert daemon.client.unregister(vm.name, backend).unmerged_pages > 0
        assert store_pages(vms[1]) == 0
        assert_unharmed(*vms)


def test_registration(directories: Directories, start: Start) -> None:
    by_hand = start([PRIVATE, Backend("memfd", share=True, mib=16, merge=False)])
    never = start(Backend("memfd", share=True, mib=16, merge=False))
    with running(directories, *monitors(by_hand, never)) as daemon:
        assert becomes_true(lambda: daemon.names() == {by_hand.name, never.name}, 10)
        mergeable, reason = daemon.row_of(never)
        assert not mergeable
        assert reason is not None
        assert "merge=off" in reason
        for backend, offset, length in (
            ("nothing", 0, None),
            ("ram0", 1, None),
            ("ram0", 0, 100),
            ("ram0", 1 << 30, 4096),
        ):
            with pytest.raises(ServiceUsageError):
                daemon.client.register(
                    by_hand.name, backend, offset_bytes=offset, length_bytes=length
                )
        with pytest.raises(ServiceError) as unknown:
            daemon.client.register("nobody", "ram0")
        assert unknown.value.status == 404

        done = daemon.client.register(by_hand.name, "ram1", offset_bytes=4096, length_bytes=1 << 20)
        assert [(it.offset_bytes, it.length_bytes) for it in done.registered] == [(4096, 1 << 20)]
        beyond = daemon.client.register(
            by_hand.name, "ram1", offset_bytes=15 << 20, length_bytes=2 << 20
        )
        assert not beyond.complete
        assert [(it.offset_bytes, it.length_bytes) for it in beyond.skipped] == [
            (16 << 20, 1 << 20)
        ]
        whole = daemon.client.register(never.name, "ram0")
        assert whole.complete
        merged(daemon, by_hand, never)

        done = daemon.client.unregister(never.name, "ram0")
        assert done.registered == ()
        assert done.unmerged_pages > BOTH
        daemon.client.merge(timeout_s=60)
        assert store_pages(never) == 0
        assert_unharmed(by_hand, never)


def test_registering_works_while_scanning_is_off(directories: Directories, start: Start) -> None:
    vm = start([PRIVATE, Backend("memfd", share=True, mib=16, merge=False)])
    with running(directories, "--controls", "run=0", *monitors(vm)) as daemon:
        assert becomes_true(lambda: daemon.names() == {vm.name}, 10)
        assert daemon.client.register(vm.name, "ram1").registered
        assert daemon.client.register(vm.name, "ram0").registered
        assert daemon.client.unregister(vm.name, "ram1").registered == ()
        assert saved(daemon) == 0


def test_detach_keeps_merges_and_stays_away(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        detached = daemon.client.detach(vms[0].name)
        assert detached.merged_pages > BOTH
        daemon.client.merge(timeout_s=60)
        assert daemon.names() == {vms[1].name}
        assert store_pages(vms[0]) > 250
        assert_unharmed(*vms)
        assert daemon.client.attach(vms[0].qmp_path).mergeable
        assert saved(daemon) > 0
        with pytest.raises(ServiceError) as twice:
            daemon.client.attach(vms[0].qmp_path)
        assert twice.value.status == 409


def test_unmerge_on_exit(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    directories.write("unmerge_on_exit = true\n")
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        daemon.end()
    assert [store_pages(vm) for vm in vms] == [0, 0]
    assert_unharmed(*vms)


def test_sighup_reads_the_settings_again(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        daemon.client.set(smart_scan=0)
        directories.write("[controls]\nsleep_millisecs = 77\n")
        daemon.signal(signal.SIGHUP)
        assert becomes_true(lambda: daemon.client.controls().values["sleep_millisecs"] == 77, 10)
        assert daemon.client.controls().values["smart_scan"] == 0

        for bad, why in (
            ("[controls]\nsleep_millisecs = 88\nmax_page_sharing = 9\n", "max_page_sharing"),
            ("slep_ms = 3\n", "did you mean sleep_ms"),
            ('api_group = "root"\n', "api_group"),
        ):
            directories.write(bad)
            daemon.signal(signal.SIGHUP)
            assert becomes_true(partial(was_refused, daemon, why), 10)
        assert daemon.client.controls().values["sleep_millisecs"] == 77

        directories.write("[controls]\nrun = 2\n")
        daemon.signal(signal.SIGHUP)
        assert becomes_true(lambda: [store_pages(vm) for vm in vms] == [0, 0], 15)
        assert_unharmed(*vms)


def test_changed_trust_domains_part_the_vms(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE), start(SHARED)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        rules = [(vms[1].name, "other"), (vms[2].name, "none")]
        lines = [f'[[domains]]\nname = "{name}"\ndomain = "{domain}"\n' for name, domain in rules]
        directories.write("".join(lines))
        daemon.signal(signal.SIGHUP)
        assert becomes_true(lambda: len(daemon.happened("reloaded")) == 1, 10)
        report = daemon.client.merge([vm.name for vm in vms[:2]], timeout_s=60)
        assert {vm.trust_domain for vm in report.vms} == {f"uid:{os.geteuid()}", "other"}
        assert report.matrix.pages[0][1] == report.matrix.pages[1][0] == 0
        assert store_pages(vms[2]) == 0
        assert not daemon.row_of(vms[2])[0]
        assert_unharmed(*vms)


def test_merging_waits_for_memory_pressure(directories: Directories, start: Start) -> None:
    """Available memory is never below 1% here: nothing is merged unless asked for."""
    vms = [start(SHARED), start(PRIVATE)]
    patient = ["--controls", "pressure_threshold_percent=1"]
    with running(directories, *patient, *monitors(*vms)) as daemon:
        assert becomes_true(lambda: len(daemon.names()) == 2, 10)
        assert_unharmed(*vms)
        assert daemon.client.health().engine.passes == 0
        assert [store_pages(vm) for vm in vms] == [0, 0]
        daemon.client.set(pressure_threshold_percent=0)
        assert becomes_true(lambda: min(map(store_pages, vms)) > BOTH, 30)


def test_a_vm_with_two_monitors_is_attached_to_once(directories: Directories, start: Start) -> None:
    vm = start()
    both = ["--qmp", str(vm.test_qmp_path), *monitors(vm)]
    with running(directories, *both) as daemon:
        daemon.client.merge(timeout_s=60)
        assert [row.pid for row in daemon.client.vms().vms] == [vm.pid]
        assert len(daemon.happened("attached")) == 1
        assert_unharmed(vm)
        assert [row.pid for row in daemon.client.vms().vms] == [vm.pid]


def was_refused(daemon: Daemon, why: str) -> bool:
    return any(why in line for line in daemon.happened("reload-refused"))


def test_one_instance_per_runtime_directory(directories: Directories, start: Start) -> None:
    vm = start()
    with running(directories, *monitors(vm)) as daemon:
        for condition in ([], ["--once"]):
            began = time.monotonic()
            done = directories.verb(
                "run", "--config", str(directories.config), *condition, *monitors(vm), code=1
            )
            assert time.monotonic() - began >= 2
            (line,) = done.stderr.splitlines()
            assert str(daemon.process.pid) in line
        assert daemon.client.health().engine.engine_pid == daemon.process.pid


def test_a_reset_and_plugged_memory_are_followed(directories: Directories, start: Start) -> None:
    vms = [start(SHARED, extra=["-m", "16M,slots=2,maxmem=256M"]), start(PRIVATE)]
    vm = vms[0]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        size = {row.pid: row.ram_bytes for row in daemon.client.report().vms}[vm.pid]
        plug = {"qom-type": "memory-backend-memfd", "id": "more", "size": 128 << 20, "share": True}
        qmp(vm.test_qmp_path, "object-add", **plug)
        qmp(vm.test_qmp_path, "device_add", driver="pc-dimm", id="dimm", memdev="more")
        assert becomes_true(
            lambda: (
                {row.pid: row.ram_bytes for row in daemon.client.report().vms}[vm.pid]
                == size + (128 << 20)
            ),
            30,
        )
        merged(daemon, *vms)
        qmp(vm.test_qmp_path, "set-action", reboot="reset")
        vm.begin_anew(lambda: qmp(vm.test_qmp_path, "system_reset"))
        merged(daemon, *vms)
        assert_unharmed(*vms)


def test_free_page_reporting_that_appears_leaves_zero_pages(
    directories: Directories, start: Start
) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        balloon = {"driver": "virtio-balloon-pci", "id": "b", "free-page-reporting": True}
        qmp(vms[0].test_qmp_path, "device_add", **balloon)
        assert becomes_true(lambda: store_pages(vms[0]) == 0, 30)
        assert becomes_true(lambda: "only zero pages" in str(daemon.row_of(vms[0])[1]), 10)
        assert daemon.row_of(vms[0])[0]
        (row,) = daemon.client.merge([vms[0].name]).vms
        assert row.zero_pages > 0
        assert (row.merged_pages, store_pages(vms[0])) == (0, 0)
        assert_unharmed(*vms)


def test_a_hazard_that_appears_unmerges(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        by_file = {"capability": "x-ignore-shared", "state": True}
        qmp(vms[0].test_qmp_path, "migrate-set-capabilities", capabilities=[by_file])
        assert becomes_true(lambda: store_pages(vms[0]) == 0, 30)
        assert becomes_true(lambda: not daemon.row_of(vms[0])[0], 10)
        assert "x-ignore-shared" in str(daemon.row_of(vms[0])[1])
        assert daemon.row_of(vms[1])[0]
        with pytest.raises(ServiceError) as refused:
            daemon.client.merge([vms[0].name])
        assert refused.value.status == 409
        assert_unharmed(*vms)


def test_a_killed_daemon_is_followed_by_the_next(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        before = daemon.client.report(fresh=True).host
    assert_unharmed(*vms)
    with running(directories, *monitors(*vms)) as daemon:
        assert becomes_true(lambda: len(daemon.names()) == 2, 10)
        assert saved(daemon) == pytest.approx(before.saved_bytes, rel=0.1)
        merged(daemon, *vms)
        directories.verb("unmerge")
        assert [store_pages(vm) for vm in vms] == [0, 0]
        assert_unharmed(*vms)


def test_a_killed_api_server_is_replaced(directories: Directories, start: Start) -> None:
    vm = start()
    with running(directories, *monitors(vm)) as daemon:
        merged(daemon, vm)
        attached = daemon.happened("attached")
        server = daemon.client.health().server_pid
        os.kill(server, signal.SIGKILL)
        assert becomes_true(lambda: answers_anew(daemon, server), 4 * ALLOWANCE)
        assert daemon.happened("api-restarted")
        assert daemon.happened("attached") == attached
        merged(daemon, vm)
        assert_unharmed(vm)


def answers_anew(daemon: Daemon, old_server: int) -> bool:
    try:
        return daemon.client.health().server_pid != old_server
    except ServiceError:
        return False


def test_reports_come_at_once_while_the_engine_works(
    directories: Directories, start: Start
) -> None:
    parameters = {"mib": 8, "rewrite_per_s": 1000}
    vms = [start(SHARED, parameters=parameters), start(PRIVATE, parameters=parameters)]
    fast = ["--controls", "advisor_mode=none", "--controls", "sleep_millisecs=1"]
    with running(directories, *fast, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        passes = daemon.client.health().engine.passes
        took_ms: list[float] = []
        while len(took_ms) < 300:
            began = time.monotonic()
            assert len(daemon.client.report().vms) == 2
            took_ms.append((time.monotonic() - began) * 1000)
            time.sleep(0.005)
        assert daemon.client.health().engine.passes > passes
        assert np.quantile(took_ms, 0.99) < 50 * ALLOWANCE
        assert_unharmed(*vms)


def test_limits_on_stable_pages_hold(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE), start(SHARED)]
    limits = ["--controls", "max_kernel_pages=100", "--controls", "max_page_sharing=2"]
    with running(directories, *limits, *monitors(*vms)) as daemon:
        report = daemon.client.merge(timeout_s=60)
        assert 50 < report.host.pages_shared <= 100
        assert report.host.pages_sharing <= report.host.pages_shared
        daemon.client.set(max_kernel_pages=0)
        report = daemon.client.merge(timeout_s=60)
        assert report.host.pages_shared > 300
        assert report.host.pages_sharing <= report.host.pages_shared
        assert report.host.stable_node_dups > 0
        assert_unharmed(*vms)


def cpu_share(daemon: Daemon, seconds: float) -> float:
    """The part of one processor that the daemon takes during that time."""
    cpu_s, began = daemon.cpu_s(), time.monotonic()
    time.sleep(seconds)
    return (daemon.cpu_s() - cpu_s) / (time.monotonic() - began)


def test_once_converged_it_costs_next_to_nothing(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        idle = cpu_share(daemon, 6)
        daemon.client.set(advisor_mode="none")
        daemon.client.set(pages_to_scan=100_000, sleep_millisecs=1)
        busy = cpu_share(daemon, 3)
        print(f"{idle:.4f} of a processor idle, {busy:.4f} scanning without a rest")
        assert idle < busy / 5


def test_the_verbs(directories: Directories, start: Start) -> None:
    """Each verb of the command line, against the daemon."""
    lonely = directories.verb("get", code=1).stderr
    assert str(directories.runtime / "vmdedup.sock") in lonely
    assert "vmdedup run" in lonely
    vms = [start(SHARED), start(PRIVATE)]
    names = [vm.name for vm in vms]
    with running(directories, *monitors(*vms)) as daemon:
        verb = directories.verb
        document = json.loads(verb("merge", *names, "--timeout", "60", "--json").stdout)
        assert document["converged"] is True
        assert {
            *("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"),
            *("pages_scanned", "pages_skipped", "full_scans", "ksm_zero_pages"),
            *("stable_node_chains", "stable_node_dups", "general_profit"),
        } <= document["host"].keys()
        assert json.loads(verb("get", "--json").stdout) == daemon.client.controls().values
        assert verb("get", "run").stdout == "1\n"
        assert "did you mean" in verb("get", "rum", code=2).stderr
        assert verb("set", "sleep_millisecs=30", "smart_scan=off").stdout.split() == [
            "sleep_millisecs=30",
            "smart_scan=0",
        ]
        verb("set", "sleep_millisecs=40", "smart_scan=7", code=2)
        verb("set", "sleep_millisecs", code=2)
        assert "the advisor" in verb("set", "pages_to_scan=7", code=1).stderr
        assert verb("get", "sleep_millisecs").stdout == "30\n"
        listed = json.loads(verb("vms", "--json").stdout)
        assert {vm["name"] for vm in listed["vms"]} == set(names)
        report = json.loads(verb("report", "--json", "--fail-under", "1%").stdout)
        saved_share = report["host"]["saved_bytes"] / sum(
            vm["present_bytes"] for vm in report["vms"]
        )
        assert saved_share > 0.1
        below = verb("report", "--fail-under", "100%", code=3)
        assert "below 100%" in below.stderr
        verb("report", "--fail-under", "lots", code=2)
        assert "no VM named" in verb("merge", "nobody", code=2).stderr
        assert "registered nothing" in verb("unregister", names[0], "ram0").stdout
        assert "0x0+0x1000" in verb("register", names[0], "ram0", "--length", "4096").stdout
        assert "4096" in verb("register", names[0], "ram0", "--offset", "5", code=2).stderr
        assert names[1] in verb("detach", names[1]).stdout
        assert "attached" in verb("attach", str(vms[1].qmp_path)).stdout
        kinds = [event["kind"] for event in json.loads(verb("events", "--json").stdout)["events"]]
        assert kinds[0] == "started"
        assert {"attached", "controls", "registered", "unregistered", "detached"} <= set(kinds)
        assert len(verb("events").stdout.splitlines()) >= len(kinds)
        follow_events(directories, daemon)
        assert json.loads(verb("unmerge", "--json").stdout)["vms"]
        assert [store_pages(vm) for vm in vms] == [0, 0]
        assert_unharmed(*vms)


def follow_events(directories: Directories, daemon: Daemon) -> None:
    last = daemon.client.events().next_since
    with subprocess.Popen(
        [*COMMAND, "events", "--follow", "--json", "--since", str(last)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=directories.environment,
    ) as follower:
        try:
            assert follower.stdout is not None
            for value in (50, 60):
                daemon.client.set(sleep_millisecs=value)
                event = json.loads(follower.stdout.readline())
                assert event["message"] == f"sleep_millisecs={value}"
        finally:
            follower.kill()
