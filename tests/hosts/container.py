"""The documented container at work on VMs: `python -m tests.hosts.container ARCHIVE SCENARIO`.

To be run inside a world of its own (tests/platforms/world.py): there the container's host pid
namespace has only VMs of the test, and its folders are those of the documentation. Loads the
image, runs the command line of docs/install.md, and ends with an AssertionError at the first
thing that is not as that page says.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.harness.images import REPOSITORY
from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.podman import Podman
from tests.harness.vm import Backend, Vm
from tests.release.container import IMAGE, documented_run
from tests.service.conftest import PRIVATE, QUIET, SHARED
from tests.service.daemon import assert_unharmed, store_pages
from vmdedup.client import Client, ServiceError
from vmdedup.closing import Closing

NAME = "vmdedup"
RUNTIME = Path("/run/vmdedup")
_OTHERS = ("/etc/vmdedup", "/var/lib/vmdedup")
"""Folders of the documented command that belong to the host, and so are others here."""
_PATIENCE_S = 300
_LEAST_PAGES = 200
_PYTHON = "/opt/vmdedup/bin/python"
_DIES_ONCE = """
import os, signal
from vmdedup import faults
from vmdedup.cli.main import main
def die(step):
    if step == "stopped" and not os.path.exists("/run/vmdedup/died"):
        open("/run/vmdedup/died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
faults.hook = die
main()
"""


class Stage(Closing):
    """VMs, and podman with the image. The container is started by `start`."""

    def __init__(self, archive: Path, *backends: Backend) -> None:
        with ExitStack() as exits:
            self.folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
            self._others = {other: f"{self.folder}{other}" for other in _OTHERS}
            for folder in (*map(Path, self._others.values()), RUNTIME):
                folder.mkdir(parents=True, mode=0o700)
            settings = Path(self._others["/etc/vmdedup"], "vmdedup.toml")
            shutil.copy(REPOSITORY / "configs/default.toml", settings)
            self.podman = exits.enter_context(Podman())
            self.podman.run("load", "--input", archive)
            self.vms = [
                exits.enter_context(
                    Vm("bare", name=f"vm{seed}", backend=each, parameters={"seed": seed, **QUIET})
                )
                for seed, each in enumerate(backends, 1)
            ]
            for vm in self.vms:
                vm.wait_ready()
            self.client = exits.enter_context(Client(RUNTIME / "vmdedup.sock"))
            self._exits = exits.pop_all()

    def start(self, *, program: str | None = None) -> None:
        """Run the documented command; `program`: Python in place of the image's command."""
        _, *words = documented_run()
        for shipped, own in self._others.items():
            words = [word.replace(f"{shipped}:", f"{own}:", 1) for word in words]
        if program is not None:
            at = words.index(IMAGE)
            words[at:at] = ["--entrypoint", _PYTHON]
            words[at + 3 : at + 3] = ["-c", program]
        self.podman.run(*words)

    @property
    def main_pid(self) -> int:
        """The pid of the container's init on the host."""
        return int(self.podman.state(NAME, "Pid"))

    def answers(self) -> bool:
        """Whether the daemon that runs in the container now answers on the host."""
        try:
            return self.client.health().engine.engine_pid == self.main_pid
        except ServiceError:
            return False

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        assert becomes_true(condition, _PATIENCE_S), f"{what}\n{self.said()}"

    def wait_followed(self) -> None:
        """Until a daemon answers that merges all VMs, as the kernel sees it."""
        self.wait(self.answers, "no daemon answers")
        self.wait(self._merges_all, "not all VMs are followed")
        self.wait(lambda: min(self.pages()) > _LEAST_PAGES, "not all VMs are merged")

    def _merges_all(self) -> bool:
        rows = {row.pid: row.mergeable for row in self.client.vms().vms}
        return all(rows.get(vm.pid) for vm in self.vms)

    def pages(self) -> list[int]:
        """By VM: pages that its kernel maps from a store."""
        return [store_pages(vm) for vm in self.vms]

    def require_well(self) -> None:
        """Every guest runs, and has found all of its memory as it wrote it."""
        for vm in self.vms:
            assert qmp(vm.test_qmp_path, "query-status")["status"] == "running", self.said()
        assert_unharmed(*self.vms)

    def said(self) -> str:
        return self.podman.said(NAME)

    def close(self) -> None:
        self._exits.close()


def stop_and_start(archive: Path) -> None:
    """Merged by itself; a stop keeps the merges, a start follows, the verbs work inside."""
    with Stage(archive, SHARED, PRIVATE) as stage:
        stage.start()
        stage.wait_followed()
        stage.require_well()
        first = stage.main_pid
        stage.podman.run("exec", NAME, "vmdedup", "report")
        stage.podman.run("exec", NAME, "vmdedup", "doctor")

        stage.podman.run("stop", NAME)
        assert stage.podman.state(NAME, "ExitCode") == "0", stage.said()
        stage.wait(lambda: not processes(), "something of it is left")
        assert min(stage.pages()) > _LEAST_PAGES, "the merges stay"
        stage.require_well()

        stage.podman.run("start", NAME)
        stage.wait_followed()
        assert stage.main_pid != first
        stage.podman.run("exec", NAME, "vmdedup", "set", "run=2")
        stage.wait(lambda: sum(stage.pages()) == 0, "something is still merged")
        stage.require_well()


def kill_of_its_init(archive: Path) -> None:
    """The guests run on, merged, and podman starts the next one, which follows."""
    with Stage(archive, SHARED, PRIVATE) as stage:
        stage.start()
        stage.wait_followed()
        first = stage.main_pid
        os.kill(first, signal.SIGKILL)
        stage.require_well()
        stage.wait(lambda: stage.main_pid not in (0, first), "podman has not started it again")
        stage.wait_followed()
        stage.require_well()


def kill_in_a_pause(archive: Path) -> None:
    """A VM that is merged in pauses runs again when its engine was killed in one."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        backends = [
            Backend("file", share=True, mib=16, directory=Path(folder)) for folder in (one, other)
        ]
        with Stage(archive, *backends) as stage:
            stage.start(program=_DIES_ONCE)
            stage.wait((RUNTIME / "died").exists, "none was paused")
            stage.wait_followed()
            stage.require_well()


def processes() -> list[str]:
    """Command lines of all processes of vmdedup here."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        words: list[bytes] = []
        with suppress(OSError):  # it has ended
            words = (folder / "cmdline").read_bytes().split(b"\0")
        if any(word.startswith(b"/opt/vmdedup/") for word in words[:2]):
            found.append(b" ".join(words).decode())
    return found


SCENARIOS = {each.__name__: each for each in (stop_and_start, kill_of_its_init, kill_in_a_pause)}


def main(arguments: Sequence[str]) -> None:
    archive, scenario = arguments
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        # Hosts of today have one hierarchy. The mount, as all of this world's, ends with it.
        subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    SCENARIOS[scenario](Path(archive))


if __name__ == "__main__":
    main(sys.argv[1:])
