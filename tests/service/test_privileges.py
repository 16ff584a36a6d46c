"""What the service may do: its capabilities, and who can reach it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot
from tests.service import daemon
from tests.service.daemon import Directories, running
from vmdedup.linux import capabilities

pytestmark = pytest.mark.service

UNIT = Path(__file__).parents[2] / "configs" / "vmdedup.service"
NOBODY = 65534
NO_VMS = 'qmp = ["/nonexistent/*"]\n'
Need = Callable[[str | None], None]

# Becomes another user, looks into the socket's directory and tries to connect.
CONNECT = """
import os, socket, sys
path, uid, *groups = sys.argv[1:]
os.setgroups([int(group) for group in groups])
os.setresgid(int(uid), int(uid), int(uid))
os.setresuid(int(uid), int(uid), int(uid))
for attempt in (os.listdir, socket.socket(socket.AF_UNIX).connect):
    try:
        attempt(path if attempt != os.listdir else os.path.dirname(path))
    except OSError as error:
        print(type(error).__name__)
    else:
        print("allowed")
"""


def capability_sets(status: str) -> dict[str, set[int]]:
    """The sets of a /proc/…/status, by the kernel's name."""
    words = re.findall(r"^Cap(\w+):\t([0-9a-f]+)$", status, re.M)
    return {name: {bit for bit in range(64) if int(value, 16) >> bit & 1} for name, value in words}


def assert_has_exactly(pid: int, wanted: frozenset[capabilities.Capability]) -> None:
    """Each thread of the process, now and by whatever it may run."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = (task / "status").read_text()
        sets = capability_sets(status)
        assert sets["Eff"] == sets["Prm"] == wanted, task
        assert sets["Inh"] == sets["Amb"] == set()
        assert sets["Bnd"] <= capabilities.ENGINE
        assert "NoNewPrivs:\t1\n" in status


def unit_capabilities() -> list[str]:
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.M)
    return str(line).split()


def attempts_of(path: Path, uid: int, *groups: int) -> list[str]:
    """How listing the socket's directory and connecting to it go for a user."""
    words = [str(word) for word in (path, uid, *groups)]
    command = [sys.executable, "-I", "-S", "-c", CONNECT, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def mode_of(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, stat.S_IMODE(found.st_mode)


def test_the_unit_has_what_the_engine_needs() -> None:
    assert set(unit_capabilities()) == {each.label for each in capabilities.ENGINE}
    text = UNIT.read_text()
    for line in ("RuntimeDirectoryPreserve=yes", "NoNewPrivileges=yes", "ProtectSystem=strict"):
        assert f"\n{line}\n" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_knows_every_line_of_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/vmdedup", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_capabilities_are_given_up_for_good(need: Need) -> None:
    need(root_missing())
    code = (
        "import subprocess; from vmdedup.linux import capabilities as p\n"
        "p.keep_only({p.Capability.SYS_PTRACE}); print(open('/proc/self/status').read())\n"
        "print(subprocess.run(['cat', '/proc/self/status'], capture_output=True, text=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sets = capability_sets(done.stdout)  # of the program that was run: it comes last
    kept = {capabilities.Capability.SYS_PTRACE}
    assert sets == {"Inh": set(), "Prm": kept, "Eff": kept, "Bnd": kept, "Amb": set()}


def test_each_process_has_what_it_needs_and_no_more(directories: Directories, need: Need) -> None:
    need(root_missing())
    directories.write(NO_VMS)
    with running(directories) as service:
        health = service.client.health()
        assert health.engine.guardian_pid is not None
        assert_has_exactly(service.process.pid, capabilities.ENGINE)
        assert_has_exactly(health.engine.guardian_pid, capabilities.GUARDIAN)
        assert_has_exactly(health.server_pid, capabilities.API_SERVER)
        assert service.end() >= 0


def test_with_exactly_the_units_capabilities_it_merges_everybody(
    directories: Directories, boot: Boot, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(root_missing())
    names = [name.removeprefix("CAP_").lower() for name in unit_capabilities()]
    only = ",".join(["-all", *(f"+{name}" for name in names)])
    command = ["setpriv", "--bounding-set", only, "--inh-caps", only, *daemon.COMMAND]
    monkeypatch.setattr(daemon, "COMMAND", command)
    users = [None, None, NOBODY, NOBODY]
    vms = [
        boot(
            "bare",
            name=f"vm{number}",
            uid=uid,
            sandbox=uid is not None,
            backend=Backend("ram", share=number % 2 == 0, mib=16),
            parameters={"seed": number, "mib": 4},
            ready=False,
        )
        for number, uid in enumerate(users)
    ]
    for vm in vms:
        vm.wait_ready()
    directories.write(f"qmp = {[str(vm.qmp_path) for vm in vms]}\n")
    with running(directories) as service:
        assert becomes_true(lambda: len(service.names()) == len(vms), 30)
        report = service.client.merge(timeout_s=30)
        assert {vm.trust_domain for vm in report.vms} == {"uid:0", f"uid:{NOBODY}"}
        for row in report.vms:
            assert (row.status, row.reason, row.hint, row.stops) == ("merged", None, None, 0)
            assert row.merged_pages > 256
            assert row.saved_bytes > 256 * 4096
        for path in directories.store.iterdir():
            assert mode_of(path) == (0, 0o600)
        assert mode_of(directories.store) == (0, 0o700)
        for vm in vms:
            vm.wait_passes(1)
            assert vm.errors == 0
        unmerged = service.client.unmerge()
        assert unmerged.store_removed
        assert service.end() >= 0
    assert "works without" not in directories.log.read_text()


def test_what_is_lacking_is_said(directories: Directories, need: Need) -> None:
    need(root_missing())
    only = "-all,+sys_ptrace,+sys_admin,+dac_override,+chown"
    command = ["setpriv", "--bounding-set", only, "--inh-caps", only, *daemon.COMMAND]
    done = subprocess.run(
        [*command, "run", "--once", "--qmp", "/nonexistent"],
        env=directories.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = [line for line in done.stderr.splitlines() if "works without" in line]
    assert "CAP_SYS_NICE" in line
    assert "huge pages" in line


def test_only_root_and_the_group_reach_the_socket(directories: Directories, need: Need) -> None:
    need(root_missing())
    directories.base.chmod(0o755)
    directories.write(NO_VMS)
    with running(directories) as service:
        path = service.client.socket
        assert mode_of(directories.runtime) == (0, 0o700)
        assert attempts_of(path, NOBODY) == ["PermissionError"] * 2
        # Not only the directory keeps others out.
        assert mode_of(path) == (0, 0o660)
        for each in directories.runtime.iterdir():
            if not stat.S_ISSOCK(each.lstat().st_mode):
                assert mode_of(each) == (0, 0o600)
        assert service.end() >= 0
    directories.write(NO_VMS + 'api_group = "12345"\n')
    with running(directories) as service:
        path = service.client.socket
        assert path.stat().st_gid == directories.runtime.stat().st_gid == 12345
        assert attempts_of(path, NOBODY) == ["PermissionError"] * 2
        assert attempts_of(path, NOBODY, 12345) == ["PermissionError", "allowed"]
        assert service.end() >= 0


def test_a_runtime_directory_that_others_may_write_is_refused(directories: Directories) -> None:
    directories.runtime.mkdir(mode=0o777)
    directories.runtime.chmod(0o777)
    done = directories.verb("run", "--once", code=2)
    assert "is not ours alone" in done.stderr


def test_a_store_directory_that_others_may_enter_is_refused(
    directories: Directories, boot: Boot
) -> None:
    directories.store.mkdir()
    directories.store.chmod(0o710)
    vm = boot("bare", backend=Backend(mib=16), parameters={"mib": 4})
    qmp = ["--qmp", str(vm.qmp_path)]
    done = directories.verb("run", "--once", "--config", str(directories.config), *qmp, code=1)
    assert "is open to others" in done.stderr
    assert vm.alive


def test_a_link_in_the_place_of_a_directory_is_refused(
    directories: Directories, tmp_path: Path
) -> None:
    """Who may write beside it could else point us anywhere."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    directories.runtime.symlink_to(tmp_path / "elsewhere")
    done = directories.verb("run", "--once", code=2)
    assert "not a directory" in done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_socket_has_its_mode_from_the_first_instant(tmp_path: Path) -> None:
    """What launch.py relies on: a bound socket has the mode that its descriptor had."""
    with socket.socket(socket.AF_UNIX) as listener:
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(tmp_path / "s"))
        assert mode_of(tmp_path / "s") == (os.geteuid(), 0o600)
