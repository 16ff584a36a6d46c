"""The examples of README and docs/ run as they stand there: real VMs, a real daemon.

They run in a mount namespace of their own, in which `/run/vms` has the monitors of this
test's VMs and `/run/vmdedup` is its runtime directory, so that no word of them is changed.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true
from tests.harness.pages import Block, page
from tests.harness.vm import Vm
from tests.service.conftest import Start
from tests.service.daemon import COMMAND, Daemon, Directories, assert_unharmed, running

pytestmark = pytest.mark.service

RUN = {"sh", "python"}

WITH_DAEMON = {
    "README.md": ["From a test"],
    "docs/cli.md": ["Merge all the time"],
    "docs/api.md": ["The Python client", "HTTP"],
}
WITHOUT = {
    "README.md": ["Merge and unmerge"],
    "docs/cli.md": ["Merge once"],
    "docs/api.md": ["Without a daemon", "Documents"],
}
PLUGIN = "The pytest plugin"

_NAMESPACE = """
set -eu
mount -t tmpfs none /run
mkdir /run/vmdedup /run/vms
mount --bind "$1" /run/vmdedup
shift
while [ $# -gt 0 ]; do ln -s "$2" "/run/vms/$1.qmp"; shift 2; done
touch /run/vmdedup/ready
exec sleep infinity
"""
_IN_NAMESPACE = """
import os, sys
os.execvp("nsenter", ["nsenter", "-t", "{pid}", "-m", "--", *{command!r}, *sys.argv[1:]])
"""


def examples(name: str, sections: Sequence[str]) -> list[Block]:
    """What is to be run of these sections, in order."""
    found = [block for block in page(name).blocks if block.section in sections]
    assert {block.section for block in found} == set(sections)
    return found


class Reader:
    """Somebody who does what the page says, in a namespace where its paths are right."""

    def __init__(self, directories: Directories, pid: int) -> None:
        self.directories = directories
        self.pid = pid

    def run(self, *words: str) -> str:
        """A command as the reader would run it; what it prints. It must succeed."""
        environment = self.directories.environment | {
            "PATH": f"{Path(sys.executable).parent}:{self.directories.environment['PATH']}",
            "VMDEDUP_STORE_DIR": str(self.directories.store),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        del environment["VMDEDUP_RUNTIME_DIR"]
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", f"--wd={self.directories.base}", "--", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def follow(self, blocks: Sequence[Block]) -> None:
        """Run them one after the other; a block of JSON is what the one before has printed."""
        printed = ""
        for block in blocks:
            print(f"--- line {block.line} ({block.section})")
            if block.language == "json":
                assert json.loads(printed) == json.loads(block.text)
            elif block.language == "python":
                printed = self.run(sys.executable, "-W", "error", "-c", block.text)
            elif block.language == "sh":
                printed = self.run("bash", "-euo", "pipefail", "-c", block.text)
            print(printed)

    @contextmanager
    def daemon(self, line: str) -> Iterator[Daemon]:
        """The daemon, started with what the page says."""
        verb, *arguments = shlex.split(line, comments=True)[1:]
        assert verb == "run"
        program = _IN_NAMESPACE.format(pid=self.pid, command=COMMAND)
        with running(self.directories, *arguments, program=program) as daemon:
            yield daemon


@pytest.fixture
def vms(directories: Directories, start: Start, need: Callable[[str | None], None]) -> list[Vm]:
    need(root_missing())
    need(None if shutil.which("curl") else "curl is not installed")
    assert directories.base.exists()
    booted = [start(name=name, ready=False) for name in ("web", "db")]
    for vm in booted:
        vm.wait_ready()
    return booted


@pytest.fixture
def reader(directories: Directories, vms: list[Vm]) -> Iterator[Reader]:
    directories.runtime.mkdir(mode=0o700)
    monitors = [word for vm in vms for word in (vm.name, str(vm.qmp_path))]
    ready = directories.runtime / "ready"
    with subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *("unshare", "--mount", "--propagation", "private", "--"),
            *("sh", "-c", _NAMESPACE, "sh", str(directories.runtime), *monitors),
        ],
        stdin=subprocess.DEVNULL,
    ) as holder:
        try:
            assert becomes_true(ready.exists, 10)
            ready.unlink()
            yield Reader(directories, holder.pid)
        finally:
            holder.kill()


@pytest.mark.qemu
@pytest.mark.parametrize("name", WITH_DAEMON)
def test_with_the_daemon(name: str, reader: Reader, vms: list[Vm]) -> None:
    start, *steps = examples("docs/cli.md", WITH_DAEMON["docs/cli.md"])
    with reader.daemon(start.text) as daemon:
        assert becomes_true(lambda: daemon.names() == {"web", "db"}, 30)
        reader.follow(steps if name == "docs/cli.md" else examples(name, WITH_DAEMON[name]))
    assert_unharmed(*vms)


@pytest.mark.qemu
@pytest.mark.parametrize("name", WITHOUT)
def test_without(name: str, reader: Reader, vms: list[Vm]) -> None:
    reader.follow(examples(name, WITHOUT[name]))
    assert_unharmed(*vms)


@pytest.mark.qemu
def test_the_pytest_plugin(reader: Reader, vms: list[Vm]) -> None:
    suite = reader.directories.base / "suite"
    suite.mkdir()
    blocks = examples("docs/api.md", [PLUGIN])
    for block in blocks:
        (suite / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)
    names = ["conftest.py", "test_rules.py", "test_sharing.py"]
    assert sorted(file.name for file in suite.iterdir()) == names
    said = reader.run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite))
    assert "4 passed" in said
    assert_unharmed(*vms)


@pytest.mark.unit
def test_every_example_of_api_and_front_pages_is_run() -> None:
    run = [*WITH_DAEMON["docs/api.md"], *WITHOUT["docs/api.md"], PLUGIN]
    for block in page("docs/api.md").blocks:
        assert block.section in run, block.line
        assert block.language in {*RUN, "json"}, block.line
    for name in ("README.md", "docs/cli.md"):
        run = WITH_DAEMON[name] + WITHOUT[name]
        assert set(run) <= {block.section for block in page(name).blocks}
        for block in page(name).blocks:
            if block.language == "python":
                assert block.section in run, block.line
