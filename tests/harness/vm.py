"""One QEMU with a test guest in it, from start to removal.

    with Vm("tiny", name="web", backend=Backend("file", share=True)) as vm:
        vm.wait_ready()
        vm.wait_passes(2)
        assert vm.errors == 0

Owns the process and every file it needs: a directory of its own for sockets and
logs, and one in tmpfs for RAM files. Both are gone after `close()`, on every
path; QEMU itself also ends when the thread that started it does, however that
happens, so start VMs from the main thread. Never touches guest memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests.harness.disk import Disk
from tests.harness.images import Guest, Image, image
from tests.harness.serial import Serial
from tests.harness.talk import Talk

_PR_SET_THP_DISABLE = 41
_END_GRACE_S = 5

# As libvirt starts QEMU.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Backend:
    """One memory backend of a VM.

    `directory` holds the RAM file of kind "file"; by default one in tmpfs.
    `options` are further properties, as `prealloc=on`.
    """

    kind: Literal["ram", "memfd", "file", "shm"] = "memfd"
    share: bool = True
    merge: bool = True
    mib: int = 96
    directory: Path | None = None
    options: str = ""


@dataclass(frozen=True)
class Directories:
    """Where one VM's files lie; `ram` is in tmpfs unless the VM was told its place."""

    run: Path
    ram: Path


@contextlib.contextmanager
def _huge_pages(allowed: bool) -> Iterator[None]:
    """Processes started inside, and what they run, get no huge pages unless `allowed`."""
    if allowed:
        yield
        return
    _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)  # inherited over fork and exec
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)


def _on(value: bool) -> str:
    return "on" if value else "off"


def _backend_arguments(number: int, backend: Backend, directories: Directories) -> list[str]:
    spec = f"memory-backend-{backend.kind},id=ram{number},size={backend.mib}M"
    spec += f",share={_on(backend.share)},merge={_on(backend.merge)}"
    if backend.kind == "file":
        spec += f",mem-path={(backend.directory or directories.ram) / f'ram{number}'}"
    if backend.options:
        spec += f",{backend.options}"
    return ["-object", spec]


class Vm(Talk):
    """A running VM. Made running by the constructor, not yet ready then.

    `parameters` are the guest's (images/README.md). More than one backend
    become NUMA nodes in order. `thp=False` keeps huge pages out of the process.
    `kaslr=True` lets the guest's kernel choose its own address, as it does outside tests.
    `uid` runs QEMU as that user. `extra` goes onto QEMU's command line as it is.
    `place` is where both directories of its own are made, instead of the usual ones.
    Raises GuestError where QEMU does not start; everything is removed then.
    """

    def __init__(
        self,
        guest: Guest = "tiny",
        *,
        name: str = "guest",
        accel: Literal["tcg", "kvm"] = "tcg",
        machine: str = "pc",
        backend: Backend | Sequence[Backend] = Backend(),
        parameters: Mapping[str, int | str] | None = None,
        disk: Disk | None = None,
        thp: bool = True,
        kaslr: bool = False,
        uid: int | None = None,
        sandbox: bool = False,
        extra: Sequence[str] = (),
        place: Path | None = None,
        timeout_s: float = 180,
    ) -> None:
        self.guest = guest
        self.name = name
        self.accel = accel
        self.backends = (backend,) if isinstance(backend, Backend) else tuple(backend)
        self.parameters = dict(parameters or {})
        self._timeout_s = timeout_s
        with contextlib.ExitStack() as stack:
            self.directories = self._make_directories(stack, place, uid)
            self.qmp_path = self.directories.run / "qmp.sock"
            """The monitor that is left to vmdedup."""
            self.test_qmp_path = self.directories.run / "test-qmp.sock"
            """A second monitor, for the test itself."""
            self.serial = Serial(
                self.directories.run / "serial.log", self.directories.run / "serial.sock"
            )
            boot = image(guest, kaslr=kaslr)
            command = ["qemu-system-x86_64", *self._arguments(boot, accel, machine, uid)]
            command += [*(disk.arguments() if disk else []), *extra]
            if sandbox:
                command += ["-sandbox", _SANDBOX]
            self._process = self._start(command, uid, thp)
            stack.callback(self._end)
            self._wait(self.test_qmp_path.exists, "QEMU did not start")
            self._stack = stack.pop_all()

    def _make_directories(
        self, stack: contextlib.ExitStack, place: Path | None, uid: int | None
    ) -> Directories:
        made = []
        for parent in (place or tempfile.gettempdir(), place or "/dev/shm"):
            path = Path(tempfile.mkdtemp(prefix="guest-", dir=parent))
            stack.callback(shutil.rmtree, path)
            if uid is not None:
                os.chown(path, uid, uid)
            made.append(path)
        return Directories(*made)

    def _arguments(self, boot: Image, accel: str, machine: str, uid: int | None) -> list[str]:
        run = self.directories.run
        files = [boot.kernel, *([boot.initrd] if boot.initrd else [])]
        if uid is not None:  # the repository may lie where that user cannot look
            files = [Path(shutil.copy(file, run)) for file in files]
        several = len(self.backends) > 1
        arguments = ["-name", self.name, "-display", "none", "-nodefaults", "-no-user-config"]
        arguments += ["-no-reboot", "-accel", "tcg,tb-size=64" if accel == "tcg" else accel]
        arguments += ["-m", f"{sum(backend.mib for backend in self.backends)}M"]
        arguments += ["-machine", machine + ("" if several else ",memory-backend=ram0")]
        for number, backend in enumerate(self.backends):
            arguments += _backend_arguments(number, backend, self.directories)
            if several:
                arguments += ["-numa", f"node,memdev=ram{number}"]
        for path in (self.qmp_path, self.test_qmp_path):
            arguments += ["-qmp", f"unix:{path},server=on,wait=off"]
        serial = f"socket,id=serial0,path={run / 'serial.sock'},server=on,wait=off"
        arguments += ["-chardev", f"{serial},logfile={run / 'serial.log'}"]
        arguments += ["-serial", "chardev:serial0", "-kernel", str(files[0])]
        if boot.initrd:
            arguments += ["-initrd", str(files[1])]
        if boot.disk:
            arguments += ["-drive", f"file={boot.disk},format=raw,if=virtio,snapshot=on"]
        return [*arguments, "-append", boot.command_line(self.parameters)]

    def _start(self, command: list[str], uid: int | None, thp: bool) -> subprocess.Popen[bytes]:
        with (self.directories.run / "qemu.log").open("wb") as log, _huge_pages(thp):
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The file of a disk's snapshot is made there.
                env={**os.environ, "TMPDIR": str(self.directories.run)},
                user=uid,
                group=uid,
                extra_groups=None if uid is None else [],
            )

    # ---- the process ----

    @property
    def pid(self) -> int:
        """QEMU's process id; ours alone until `close()`, for it is not waited for before."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether QEMU still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as a crash would; the files stay until `close()`."""
        self._process.kill()
        self._process.wait()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_GRACE_S)
        except subprocess.TimeoutExpired:  # it may be stopped, or stuck in a gate
            self.kill()

    def close(self) -> None:
        """End QEMU and remove every file; again is harmless."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- for Talk ----

    def transcript(self) -> str:
        """The last lines of QEMU and of the guest."""
        log = self.directories.run / "qemu.log"
        said = log.read_text(errors="replace") if log.exists() else ""
        return "\n".join([*said.splitlines()[-5:], *self.serial.text().splitlines()[-10:]])

    def state(self) -> str:
        """Whether QEMU runs, for messages."""
        return "running" if self.alive else f"ended with {self._process.returncode}"
