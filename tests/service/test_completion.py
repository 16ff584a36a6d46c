"""The Tab key: verbs, VMs and controls, by a real daemon, in a real shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot
from tests.service.daemon import COMMAND, Directories, running
from vmdedup.cli.completion import SOCKET_NAME
from vmdedup.ipc import protocol

pytestmark = pytest.mark.service


def completed(*words: str, **environment: str) -> list[str]:
    """What fish is offered for the last of these words, with what explains it."""
    done = subprocess.run(
        COMMAND,
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "_VMDEDUP_COMPLETE": "complete_fish",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_TYPER_COMPLETE_ARGS": " ".join(["vmdedup", *words]),
            **environment,
        },
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_verbs_and_options() -> None:
    offered = [line.split("\t")[0] for line in completed("un")]
    assert sorted(offered) == ["unmerge", "unregister"]
    assert [line.split("\t")[0] for line in completed("run", "--until")] == ["--until-converged"]
    assert completed("report", "--format", "m") == ["markdown"]


def test_without_a_daemon_nothing_is_said(tmp_path: Path) -> None:
    away = {"VMDEDUP_RUNTIME_DIR": str(tmp_path)}
    assert completed("get", "pages", **away) == [""]
    (tmp_path / SOCKET_NAME).touch()
    assert completed("get", "pages", **away) == [""]


def test_the_socket_is_looked_for_where_the_daemon_has_it() -> None:
    assert SOCKET_NAME == protocol.SOCKET_NAME


def test_a_daemon_gives_its_vms_backends_and_controls(directories: Directories, boot: Boot) -> None:
    vm = boot("bare", name="webshop", backend=Backend(mib=16), parameters={"mib": 4})
    directories.write(f'qmp = ["{vm.qmp_path}"]\n')
    with running(directories) as service:
        assert becomes_true(lambda: service.names() == {"webshop"}, 30)
        here = {"VMDEDUP_RUNTIME_DIR": str(directories.runtime)}
        assert completed("merge", "web", **here) == [f"webshop\tpid {vm.pid}"]
        (backend,) = completed("register", "webshop", "", **here)
        assert backend == "ram0\tmemfd"
        assert completed("register", "another", "", **here) == [""]
        assert completed("get", "sleep", **here) == ["sleep_millisecs\t20"]
        given = ["--runtime-dir", str(directories.runtime)]
        assert completed("set", *given, "sleep") == ["sleep_millisecs=20"]
        assert service.end() >= 0
    assert f"{vm.qmp_path}\twebshop" in completed("vms", "--qmp", str(vm.qmp_path.parent))
    assert f"webshop\tpid {vm.pid}" in completed("explain", "webs", **here)


def test_bash_completes(tmp_path: Path) -> None:
    command = tmp_path / "vmdedup"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    script = f"""
        eval "$(_VMDEDUP_COMPLETE=source_bash {command})"
        COMP_WORDS=(vmdedup report --f) COMP_CWORD=2
        _vmdedup_completion {command}
        printf '%s ' "${{COMPREPLY[@]}}"
    """
    shell = ["bash", "--norc", "-c", script]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["--format", "--fail-under", "--from"], "")


def test_no_heavy_library_is_loaded_while_somebody_waits() -> None:
    code = (
        "import sys; from vmdedup.cli import main\n"
        "try: main.main()\n"
        "finally: print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    environment = {"_VMDEDUP_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "vmdedup merge "}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    loaded = set(done.stderr.split())
    assert "vmdedup" in loaded
    assert not loaded & {"numpy", "httpx", "qemu", "starlette", "textual"}
