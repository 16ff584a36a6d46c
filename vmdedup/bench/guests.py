"""The guests of a benchmark: started alike, frozen and let go together.

Owns QEMU's processes and their files. Promises that both are gone after `close`
on every path, that QEMU ends with the thread that started it, and that no guest
gets huge pages: all contenders start from 4 KiB pages. Never touches guest memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vmdedup.closing import Closing
from vmdedup.errors import VmdedupError

BackendKind = Literal["ram", "memfd"]

WORKLOADS = ("idle", "nginx", "python", "redis")
"""What the Debian image can do."""
TINY = "tiny"
"""The memory worker in an initramfs, for a quick look."""

_REPOSITORY = Path(__file__).resolve().parents[2]
_RECIPES = _REPOSITORY / "images" / "build.sh"
_CMDLINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"
    " random.trust_cpu=on cryptomgr.notests"
)
_NAME = "vmdedup-bench"
_PLACE = Path("/tmp")
"""Short: a Unix socket's path must fit into 107 bytes."""
_STORE_PLACE = Path("/dev/shm")
_PR_SET_THP_DISABLE = 41
_POLL_S = 0.05
_BOOT_LIMIT_S = 240.0
_ANSWER_LIMIT_S = 30.0
_END_GRACE_S = 5.0
_OPS = re.compile(r"vmdedup-guest: (?:ops|checks)=(\d+)(?:[^\n]*busy_us=(\d+))?")
_READY = "vmdedup-guest: ready"
_FAILED = "vmdedup-guest: failed"


class BenchError(VmdedupError):
    """The benchmark could not be done; what it changed has been put back."""


@dataclass(frozen=True)
class Spec:
    """One guest to start."""

    name: str
    workload: str
    backend: BackendKind
    mib: int


@dataclass(frozen=True)
class Probed:
    """What a probe has counted so far, and when it was asked."""

    ops: int
    busy_us: int | None
    """Microseconds of the guest's own clock in which it worked; None: all of the time."""
    at_s: float


def default_images() -> Path:
    """Where images/build.sh leaves its guests: beside the package's source."""
    return _REPOSITORY / ".cache" / "images"


def require_images(directory: Path, workloads: Sequence[str], tell: Callable[[str], None]) -> None:
    """Have the guests of these workloads in `directory`.

    What is missing in the default place is built, by root in under a minute. Raises
    BenchError, which names the command that builds it elsewhere.
    """
    for workload in workloads:
        if workload not in (*WORKLOADS, TINY):
            raise BenchError(f"no workload {workload!r}; there are {', '.join(WORKLOADS)}, {TINY}")
        image = _image_of(workload)
        if (directory / image / "vmlinuz").exists():
            continue
        if directory != default_images() or not _RECIPES.exists():
            raise BenchError(
                f"no {image} guest in {directory}: images/build.sh {image} of the repository"
                " builds it; or name --images DIR"
            )
        tell(f"building the {image} guest (images/build.sh {image}; about a minute)")
        built = subprocess.run([_RECIPES, image], check=False, capture_output=True, text=True)
        if built.returncode != 0:
            said = built.stderr.strip().splitlines()[-1:] or ["it failed"]
            raise BenchError(f"images/build.sh {image}: {said[0]}")


def own_store_dir() -> Path:
    """Where this benchmark's daemons keep their stores."""
    return _STORE_PLACE / f"{_NAME}-{os.getpid()}"


def sweep() -> None:
    """Remove what benchmarks that were killed have left in /tmp and /dev/shm."""
    for path in (*_PLACE.glob(f"{_NAME}-*"), *_STORE_PLACE.glob(f"{_NAME}-*")):
        pid = path.name.removeprefix(f"{_NAME}-").partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _image_of(workload: str) -> str:
    return "tiny" if workload == TINY else "debian"


class Guest:
    """A running QEMU. Raises BenchError when it does not start."""

    def __init__(self, spec: Spec, number: int, images: Path, directory: Path) -> None:
        self.spec = spec
        self._directory = directory
        self.qmp_path = directory / f"{spec.name}.qmp"
        """The monitor that is left to vmdedup."""
        self._own_qmp_path = directory / f"{spec.name}.own.qmp"
        self._serial_path = directory / f"{spec.name}.serial"
        self._log_path = directory / f"{spec.name}.log"
        command = [
            "qemu-system-x86_64",
            *self._arguments(number, images / _image_of(spec.workload)),
        ]
        environment = {**os.environ, "TMPDIR": str(directory)}
        try:
            with self._log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
        except OSError as error:
            raise BenchError(f"setpriv: {error.strerror}") from error

    def _arguments(self, number: int, image: Path) -> list[str]:
        spec = self.spec
        share = "on" if spec.backend == "memfd" else "off"
        backend = f"memory-backend-{spec.backend},id=ram0,size={spec.mib}M,merge=on,share={share}"
        words = ["-name", f"{spec.name},debug-threads=on", "-display", "none", "-nodefaults"]
        words += ["-no-user-config", "-no-reboot", "-accel", "tcg,tb-size=64"]
        words += [
            "-m",
            f"{spec.mib}M",
            "-machine",
            "pc,memory-backend=ram0,mem-merge=off",
            "-object",
            backend,
        ]
        for path in (self.qmp_path, self._own_qmp_path):
            words += ["-qmp", f"unix:{path},server=on,wait=off"]
        words += ["-serial", f"file:{self._serial_path}"]
        words += ["-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd")]
        if spec.workload == TINY:
            worker = f"vmdedup.seed={number + 1} vmdedup.mib={spec.mib // 4}"
        else:
            worker = f"vmdedup.workload={spec.workload}"
            # Its writes go to a file of its own, without a name.
            words += ["-drive", f"file={image / 'disk'},format=raw,if=virtio,snapshot=on"]
        return [*words, "-append", f"{_CMDLINE} {worker}"]

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    @property
    def rcu_tid(self) -> int:
        """The thread that vmdedup borrows: QEMU's second."""
        return int(os.listdir(f"/proc/{self.pid}/task")[1])

    def wait_ready(self, tell: Callable[[], None]) -> None:
        """Until the workload runs. Raises BenchError."""
        self._wait(lambda: _READY in self._said(), "it did not become ready", tell)

    def probed(self) -> Probed | None:
        """The probe's latest line; None before the first."""
        found = _OPS.findall(self._said())
        if not found:
            return None
        ops, busy_us = found[-1]
        return Probed(int(ops), int(busy_us) if busy_us else None, time.monotonic())

    def stop(self) -> None:
        """Pause the guest: nothing of it changes from here on."""
        self._qmp("stop")

    def cont(self) -> None:
        """Let it go on."""
        self._qmp("cont")

    def close(self) -> None:
        """End QEMU. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def _said(self) -> str:
        if not self._serial_path.exists():
            return ""
        text = self._serial_path.read_bytes().decode(errors="replace").replace("\r", "")
        return text[: text.rfind("\n") + 1]

    def _wait(self, holds: Callable[[], bool], what: str, tell: Callable[[], None]) -> None:
        deadline = time.monotonic() + _BOOT_LIMIT_S
        while not holds():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline or _FAILED in self._said():
                log = self._log_path.read_text(errors="replace")
                last = [*log.splitlines()[-2:], *self._said().splitlines()[-2:]]
                raise BenchError(f"guest {self.spec.name}: {what}: {' / '.join(last)}")
            tell()
            time.sleep(_POLL_S)

    def _qmp(self, command: str) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_ANSWER_LIMIT_S)
            connection.connect(str(self._own_qmp_path))
            stream = connection.makefile("rw")
            stream.readline()
            for word in ("qmp_capabilities", command):
                stream.write(json.dumps({"execute": word, "id": word}) + "\n")
                stream.flush()
                while True:
                    line = stream.readline()
                    if not line:
                        raise BenchError(f"guest {self.spec.name}: its monitor is gone")
                    answer = json.loads(line)
                    if answer.get("id") == word:
                        break
            return answer.get("return")


class Guests(Closing):
    """All guests of a fleet; a context manager."""

    def __init__(self, specs: Sequence[Spec], images: Path, tell: Callable[[str], None]) -> None:
        with contextlib.ExitStack() as exits:
            self.directory = Path(tempfile.mkdtemp(prefix=f"{_NAME}-{os.getpid()}-", dir=_PLACE))
            exits.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.each: list[Guest] = []
            with _no_huge_pages():
                for number, spec in enumerate(specs):
                    guest = Guest(spec, number, images, self.directory)
                    self.each.append(guest)
                    exits.callback(guest.close)
            for number, guest in enumerate(self.each):
                tell(f"booting: {number} of {len(self.each)} guests ready")
                guest.wait_ready(lambda: None)
            self._exits = exits.pop_all()

    def close(self) -> None:
        """End all of them and remove their files."""
        self._exits.close()

    @property
    def pids(self) -> list[int]:
        """QEMU's processes."""
        return [guest.pid for guest in self.each]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing in any guest changes inside the block."""
        for guest in self.each:
            guest.stop()
        try:
            yield
        finally:
            for guest in self.each:
                guest.cont()

    def probed(self) -> list[Probed | None]:
        """Every guest's probe."""
        return [guest.probed() for guest in self.each]


@contextlib.contextmanager
def _no_huge_pages() -> Iterator[None]:
    """Processes started inside, and what they run, get no huge pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)  # inherited over fork and exec
    try:
        yield
    finally:
        libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
