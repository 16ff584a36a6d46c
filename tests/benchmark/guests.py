"""The guests of a benchmark: started alike, frozen and let go together.

Owns a directory with the files of all of them. Promises that it is gone after `close` on
every path, that a later run's `sweep` removes what a killed one has left, and that no
guest gets huge pages unless asked for: contenders start from 4 KiB pages. Never touches
guest memory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.benchmark.errors import BenchError
from tests.benchmark.restoring import Restoring
from tests.harness.images import Guest, image
from tests.harness.monitor import connected
from tests.harness.vm import Backend, Vm
from vmdedup.closing import Closing

BackendKind = Literal["ram", "memfd"]

WORKLOADS = ("idle", "nginx", "python", "redis")
"""What the Debian image can do."""
TINY = "tiny"
"""The memory worker in an initramfs, for a quick look."""

_NAME = "vmdedup-bench"
_PLACE = Path("/tmp")
"""Short: a Unix socket's path must fit into 107 bytes."""
_STORE_PLACE = Path("/dev/shm")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_BOOT_LIMIT_S = 240.0
_ANSWER_LIMIT_S = 30.0
_PROBE = re.compile(r"(?:ops|checks)=(\d+)(?:.*busy_us=(\d+))?")


@dataclass(frozen=True)
class Probed:
    """What a probe has counted so far, and when it was asked."""

    ops: int
    busy_us: int | None
    """Microseconds of the guest's own clock in which it worked; `None`: all of the time."""
    at_s: float


def require_images(workloads: Sequence[str], tell: Callable[[str], None]) -> None:
    """Have the guests of these workloads built, unless they are there. Raises BenchError."""
    for workload in workloads:
        if workload not in (*WORKLOADS, TINY):
            raise BenchError(f"no workload {workload!r}; there are {', '.join(WORKLOADS)}, {TINY}")
    for guest in dict.fromkeys(map(_guest_of, workloads)):
        tell(f"looking for the {guest} guest (images/build.sh {guest} builds it in a minute)")
        try:
            image(guest)
        except subprocess.CalledProcessError as error:
            raise BenchError(
                f"images/build.sh {guest} ended with exit code {error.returncode};"
                " what it printed above says why"
            ) from error


def own_store_dir() -> Path:
    """Where this benchmark's daemons keep their stores."""
    return _STORE_PLACE / f"{_NAME}-{os.getpid()}"


def huge_pages_by_advice() -> Restoring:
    """Have memory get huge pages where a process asks for them, as QEMU does for guest RAM.

    What holds on this host is put back at the end. Raises BenchError.
    """
    control = _HUGE_PAGES / "enabled"
    if not control.exists():
        raise BenchError("this kernel has no transparent huge pages")
    chosen = control.read_text().partition("[")[2].partition("]")[0]
    restoring = Restoring(_HUGE_PAGES, lambda: [f"enabled={chosen}"])
    control.write_text("madvise")
    return restoring


def sweep() -> None:
    """Remove what benchmarks that were killed have left in /tmp and /dev/shm."""
    for path in (*_PLACE.glob(f"{_NAME}-*"), *_STORE_PLACE.glob(f"{_NAME}-*")):
        pid = path.name.removeprefix(f"{_NAME}-").partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


class Guests(Closing):
    """All guests of a fleet, one for each workload; a context manager.

    Raises GuestError if one does not start or does not become ready.
    """

    def __init__(
        self,
        workloads: Sequence[str],
        backend: BackendKind,
        mib: int,
        tell: Callable[[str], None],
        *,
        huge_pages: bool = False,
    ) -> None:
        with ExitStack() as exits:
            self.directory = Path(tempfile.mkdtemp(prefix=f"{_NAME}-{os.getpid()}-", dir=_PLACE))
            exits.callback(shutil.rmtree, self.directory, ignore_errors=True)
            memory = Backend(backend, share=backend == "memfd", mib=mib)
            self.each: list[Vm] = []
            for number, workload in enumerate(workloads):
                place = self.directory
                vm = _start(number, workload, memory, place, huge_pages=huge_pages)
                exits.enter_context(vm)
                self.each.append(vm)
            for number, vm in enumerate(self.each):
                tell(f"booting: {number} of {len(self.each)} guests ready")
                vm.wait_boot()
            self._exits = exits.pop_all()

    def close(self) -> None:
        """End all of them and remove their files."""
        self._exits.close()

    @property
    def pids(self) -> list[int]:
        """QEMU's processes."""
        return [vm.pid for vm in self.each]

    def stop(self) -> None:
        """Pause all of them: nothing in any guest changes from here on."""
        for vm in self.each:
            _command(vm, "stop")

    def cont(self) -> None:
        """Let all of them go on."""
        for vm in self.each:
            _command(vm, "cont")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing in any guest changes inside the block."""
        self.stop()
        try:
            yield
        finally:
            self.cont()

    def probed(self) -> list[Probed | None]:
        """The latest line of every guest's probe; `None` before the first."""
        return [_probed(vm) for vm in self.each]


def _guest_of(workload: str) -> Guest:
    return "tiny" if workload == TINY else "debian"


def _start(number: int, workload: str, memory: Backend, place: Path, *, huge_pages: bool) -> Vm:
    """QEMU's memory besides the guest's is registered with nobody (`mem-merge=off`)."""
    tiny = {"seed": number + 1, "mib": memory.mib // 4}
    return Vm(
        _guest_of(workload),
        name=f"{number}-{workload}",
        machine="pc,mem-merge=off",
        backend=memory,
        parameters=tiny if workload == TINY else {"workload": workload},
        kaslr=True,
        thp=huge_pages,
        extra=("-name", "debug-threads=on"),
        place=place,
        timeout_s=_BOOT_LIMIT_S,
    )


def _command(vm: Vm, word: str) -> None:
    with connected(vm.test_qmp_path, timeout_s=_ANSWER_LIMIT_S) as execute:
        execute(word)


def _probed(vm: Vm) -> Probed | None:
    for line in reversed(vm.serial.lines()):
        if found := _PROBE.match(line):
            busy_us = int(found[2]) if found[2] else None
            return Probed(int(found[1]), busy_us, time.monotonic())
    return None
