"""podman with settings and storage of its own: the machine's containers and images are not seen.

    with Podman() as podman:
        podman.run("load", "--input", archive)
        podman.run("run", "--rm", "--network=none", image, "--version")

Owns a folder with all of podman's state, and the containers in it: both are gone after `close()`.
podman reads the paths of its settings from the environment, so a command line that users have
runs unchanged. podman itself keeps a small cache below /var/lib/containers.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.harness.capabilities import capability_missing, root_missing
from tests.harness.kernel import becomes_true
from vmdedup.closing import Closing

_WITHIN_S, _END_S = 300.0, 30.0
_CAP_SYS_RESOURCE = 24
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_PARENT = "libpod_parent"
"""podman's cgroup for all of its containers, where systemd does not make them."""


@cache
def podman_missing() -> str | None:
    """Why no container can be had on this machine; None where podman is there."""
    if reason := root_missing():
        return reason
    for program in ("podman", _runtime()):
        if shutil.which(program) is None:
            return (
                f"no {program} on this machine: apt-get install --no-install-recommends {program}"
            )
    return None


def _runtime() -> str:
    """podman's usual one; without CAP_SYS_RESOURCE the one that does not insist on more memlock."""
    return "runc" if capability_missing(_CAP_SYS_RESOURCE, "load device rules") else "crun"


class Podman(Closing):
    """podman, and all of its state in a folder on disk."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="podman-"))
        engine, storage = self._folder / "containers.conf", self._folder / "storage.conf"
        engine.write_text(self._engine_settings())
        storage.write_text(self._storage_settings())
        paths = {"CONTAINERS_CONF": str(engine), "CONTAINERS_STORAGE_CONF": str(storage)}
        self._environment = {**os.environ, **paths}

    def _engine_settings(self) -> str:
        _, nofile = resource.getrlimit(resource.RLIMIT_NOFILE)
        _, nproc = resource.getrlimit(resource.RLIMIT_NPROC)
        # podman lowers its own to this.
        most = int(Path("/proc/sys/kernel/pid_max").read_text())
        nproc = most if nproc == resource.RLIM_INFINITY else min(nproc, most)
        return f"""
[containers]
# podman's own are the highest there are, which a root without CAP_SYS_RESOURCE may not set.
default_ulimits = ["nofile={nofile}:{nofile}", "nproc={nproc}:{nproc}"]
# The hierarchy of the tests has no controllers where the machine mounts the older kind.
pids_limit = 0
[engine]
runtime = "{_runtime()}"
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
# Where podman expects them below `graphroot`: its process that cleans up is not told of others.
static_dir = "{self._folder}/storage/libpod"
tmp_dir = "{self._folder}/tmp"
volume_path = "{self._folder}/storage/volumes"
[network]
network_config_dir = "{self._folder}/networks"
"""

    def _storage_settings(self) -> str:
        return f"""
[storage]
driver = "overlay"
graphroot = "{self._folder}/storage"
runroot = "{self._folder}/run"
"""

    def run(self, *words: str | Path, within_s: float = _WITHIN_S) -> str:
        """What `podman WORDS` printed. Raises AssertionError where it failed."""
        done = self._call(*words, within_s=within_s)
        said = f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
        assert done.returncode == 0, f"podman {' '.join(map(str, words))}: {said}"
        return done.stdout

    def _call(self, *words: str | Path, within_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["podman", *words],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=within_s,
            env=self._environment,
        )

    def state(self, container: str, field: str) -> str:
        """A field of `podman inspect`'s State, as `Pid` or `ExitCode`."""
        (found,) = json.loads(self.run("inspect", "--type=container", container))
        return str(found["State"][field])

    def said(self, container: str) -> str:
        """How a container is, and what it has said; for messages."""
        listed = self._call("ps", "--all", within_s=_WITHIN_S)
        logs = self._call("logs", container, within_s=_WITHIN_S)
        return f"{listed.stdout}{listed.stderr}{logs.stdout}{logs.stderr}"

    def close(self) -> None:
        """End its containers and remove everything; again is harmless."""
        if not self._folder.exists():
            return
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("rm", "--all", "--force", "--time=0")
        # A process of podman's that cleans up after a container may still be at it.
        assert becomes_true(self._is_removed, _END_S), f"{self._folder} cannot be removed"
        for group in sorted((_CGROUPS / _OWN_PARENT).rglob("*"), reverse=True):
            with suppress(OSError):  # another podman's
                group.rmdir()
        with suppress(OSError):
            (_CGROUPS / _OWN_PARENT).rmdir()

    def _is_removed(self) -> bool:
        for mount in _mounts_below(self._folder):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)
        return not self._folder.exists()


def _mounts_below(folder: Path) -> list[str]:
    """What is mounted there, the deepest first."""
    points = re.findall(r"^\S+ \S+ \S+ \S+ (\S+)", Path("/proc/self/mountinfo").read_text(), re.M)
    return sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True)
