"""The example for CI runs as it is: pytest suite and shell step, real VMs, a real daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.images import image
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot
from tests.service.daemon import Directories, running

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

EXAMPLE = Path(__file__).parents[2] / "configs/ci"


def test_the_pytest_suite(directories: Directories) -> None:
    guest = image("bare")
    command = (
        "setpriv --pdeathsig KILL -- qemu-system-x86_64 -accel tcg,tb-size=64 -display none"
        " -nodefaults -no-user-config -m 16M -name {name} -qmp unix:{qmp},server=on,wait=off"
        " -object memory-backend-memfd,id=ram0,size=16M,share=on -machine pc,memory-backend=ram0"
        f" -kernel {guest.kernel} -append 'vmdedup.mib=4 vmdedup.seed={{number}}'"
    )
    # The daemon looks where there is nothing: the suite attaches its VMs by itself.
    with running(directories, "--qmp", str(directories.base / "*.qmp")):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE)],
            capture_output=True,
            text=True,
            check=False,
            env=directories.environment | {"VM_COMMAND": command},
            cwd=directories.base,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_the_shell_step(directories: Directories, boot: Boot) -> None:
    vms = [
        boot("bare", backend=Backend(mib=16), parameters={"mib": 4, "seed": seed})
        for seed in (1, 2)
    ]
    report = directories.base / "report.json"
    patterns = [word for vm in vms for word in ("--qmp", str(vm.qmp_path))]
    assert gate(directories, "30%", report).returncode == 1
    with running(directories, *patterns):
        enough = gate(directories, "30%", report)
        assert enough.returncode == 0, enough.stderr
        assert json.loads(report.read_text())["host"]["saved_bytes"] > 0
        too_little = gate(directories, "99%", report)
        assert too_little.returncode == 3
        assert "below 99%" in too_little.stderr
    for vm in vms:
        vm.wait_passes(1)
        assert vm.errors == 0


def gate(directories: Directories, *arguments: object) -> subprocess.CompletedProcess[str]:
    scripts = Path(sys.executable).parent
    path = f"{scripts}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(EXAMPLE / "gate.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=directories.environment | {"PATH": path},
        cwd=directories.base,
    )
