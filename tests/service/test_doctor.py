"""`vmdedup doctor`: what it finds is so, and each thing that is not fine has a remedy."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from tests.harness.capabilities import root_missing
from tests.qemu.machine import Machine, backend
from tests.service.daemon import Directories, running
from vmdedup.doctor import diagnose
from vmdedup.doctor.host import host_checks
from vmdedup.doctor.vms import vm_checks
from vmdedup.linux.pagemap import has_pagemap_scan
from vmdedup.models import CheckedThing, Diagnosis, VmList, VmListing
from vmdedup.report.console import make_console
from vmdedup.report.text import show_diagnosis
from vmdedup.settings import Feature, Settings

RAM = ("-machine", "pc,memory-backend=ram0", "-S")


def by_name(checks: list[CheckedThing]) -> dict[str, CheckedThing]:
    for check in checks:
        assert check.verdict == "fine" or check.remedy, check
    return {check.name: check for check in checks}


def listing(name: str, *, mergeable: bool, reason: str | None = None) -> VmListing:
    return VmListing(
        name=name,
        pid=1,
        qmp="/q",
        qemu_version="7.2.0",
        trust_domain="uid:0",
        mergeable=mergeable,
        reason=reason,
    )


@pytest.mark.qemu
def test_it_is_right_about_this_host_and_its_vms(
    directories: Directories, tmp_path: Path, need: Callable[[str | None], None]
) -> None:
    need(root_missing())
    ram = ("-object", backend("memfd", 0, 64, "share=on"))
    unmergeable = ("-object", backend("memfd", 0, 64, "share=on,merge=off"))
    with (
        Machine(tmp_path, *ram, *RAM, "-name", "good", name="good") as good,
        Machine(tmp_path, *unmergeable, *RAM, "-name", "bad", name="bad") as bad,
    ):
        words = ["--qmp", str(good.qmp), "--qmp", str(bad.qmp)]
        found = Diagnosis.model_validate_json(directories.verb("doctor", *words, "--json").stdout)
        checks = by_name(found.checks)
        assert found.can_merge
        assert checks["calls in another process"].verdict == "fine"
        assert checks["PAGEMAP_SCAN"].verdict == ("fine" if has_pagemap_scan() else "note")
        assert checks["reading in place"].verdict == checks["compiled gates"].verdict == "fine"
        assert checks[f"good (pid {good.pid})"].verdict == "fine"
        assert "merge=off" in (checks[f"bad (pid {bad.pid})"].remedy or "")
        assert "(2 VMs)" in checks["QEMU"].found
        only_bad = directories.verb("doctor", "--qmp", str(bad.qmp), code=1).stdout
        assert "merging cannot work here: VMs" in only_bad
        assert max(map(len, only_bad.splitlines())) <= 100
        with running(directories, *words) as daemon:
            told = json.loads(directories.verb("doctor", "--json").stdout)
            (of_daemon,) = [check for check in told["checks"] if check["name"] == "daemon"]
            assert f"pid {daemon.process.pid}" in of_daemon["found"]
            assert {check["name"] for check in told["checks"]} >= {f"good (pid {good.pid})"}


@pytest.mark.process
def test_what_is_masked_counts_as_missing(need: Callable[[str | None], None]) -> None:
    need(root_missing())
    every: frozenset[Feature] = frozenset(get_args(Feature))
    found = diagnose(Settings(mask=every), VmList(vms=[]), daemon_pid=None)
    checks = by_name(found.checks)
    assert found.can_merge
    names = (
        "userfaultfd write protection",
        "asynchronous write protection",
        "reading in place",
        "compiled gates",
    )
    for name in names:
        assert checks[name].found == "masked by the settings"
    assert checks["PAGEMAP_SCAN"].verdict == checks["executable memfd"].verdict == "note"
    assert "-qmp unix:" in (checks["VMs"].remedy or "")


@pytest.mark.process
def test_without_privileges_it_can_not_work(
    directories: Directories, need: Callable[[str | None], None]
) -> None:
    need(root_missing())
    drop = ["setpriv", "--bounding-set=-sys_ptrace,-sys_admin", "--inh-caps=-all"]
    code = "from vmdedup.cli.main import main; main()"
    done = subprocess.run(
        [*drop, sys.executable, "-c", code, "doctor", "--qmp", "/nowhere", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=directories.environment,
    )
    assert done.returncode == 1, done.stderr
    checks = by_name(Diagnosis.model_validate_json(done.stdout).checks)
    assert checks["CAP_SYS_PTRACE"].verdict == "problem"
    assert checks["CAP_SYS_ADMIN"].verdict == "note"


@pytest.mark.unit
def test_directories_are_judged(tmp_path: Path) -> None:
    off_tmpfs = Settings(store_dir=Path("/var/lib/vmdedup"), runtime_dir=tmp_path)
    tmp_path.chmod(0o777)
    checks = by_name(list(host_checks(off_tmpfs, daemon_pid=None)))
    assert checks["store directory"].verdict == "problem"
    assert checks["daemon"].verdict == "problem"
    fine = Settings(store_dir=Path("/dev/shm/vmdedup-none/deeper"), runtime_dir=tmp_path / "run")
    checks = by_name(list(host_checks(fine, daemon_pid=None)))
    assert checks["store directory"].verdict in ("fine", "note")
    assert checks["daemon"].verdict == "fine"
    assert not (tmp_path / "run").exists()
    assert not Path("/dev/shm/vmdedup-none").exists()
    assert checks["KSM"].verdict == ksm_verdict()


@pytest.mark.qemu
def test_limits_of_promises_and_address_spaces_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmdedup.doctor.host.commit_left_bytes", lambda: 5 << 20)
    with Machine(tmp_path, "-S", name="tight") as machine:
        resource.prlimit(machine.pid, resource.RLIMIT_AS, (1 << 40, 1 << 40))
        checks = by_name(list(host_checks(Settings(), daemon_pid=None)))
        assert checks["RLIMIT_AS"].verdict == "note"
        assert f"pid {machine.pid} has 1,02" in checks["RLIMIT_AS"].found  # of 1,024 GiB
    assert checks["vm.overcommit_memory"].verdict == "note"
    assert "5.0 MiB" in checks["vm.overcommit_memory"].found


def ksm_verdict() -> str:
    try:
        folder = Path("/sys/kernel/mm/ksm")
        run, sharing = (
            int((folder / "run").read_text()),
            int((folder / "pages_sharing").read_text()),
        )
    except OSError:
        return "fine"
    return "note" if run == 1 or sharing else "fine"


@pytest.mark.unit
def test_all_refused_is_a_problem_and_some_are_not() -> None:
    bad = listing("bad", mergeable=False, reason="nested")
    some = VmList(vms=[listing("good", mergeable=True), bad])
    assert all(check.verdict != "problem" for check in vm_checks(some))
    none = by_name(list(vm_checks(VmList(vms=[bad]))))
    assert none["VMs"].verdict == "problem"
    assert none["bad (pid 1)"].remedy == "nested"


@pytest.mark.unit
def test_the_lines_fit(tmp_path: Path) -> None:
    long = CheckedThing(
        area="vms", name="n" * 60, verdict="problem", found="f" * 150, remedy="r " * 90
    )
    with (tmp_path / "out").open("w") as stream:
        show_diagnosis(Diagnosis(can_merge=False, checks=[long]), make_console(stream))
    shown = (tmp_path / "out").read_text()
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.count("n") >= 60
    assert shown.count("f") >= 150
