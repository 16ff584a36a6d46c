"""Ways to lose a VM in the middle of the engine's work, at chosen steps.

Owns the fault hook of an engine that runs in the test's own process. Each step
takes another VM: the one that is worked on when the step is reached.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.harness.monitor import qmp
from tests.harness.serial import GuestError
from tests.harness.vm import Vm
from vmdedup import faults
from vmdedup.vm.attached_vm import AttachedVm

Lose = Callable[[Vm], None]


def kill(vm: Vm) -> None:
    """SIGKILL. Not waited for: a thread that we hold ends only when we let it."""
    os.kill(vm.pid, signal.SIGKILL)


def end(vm: Vm) -> None:
    """`quit`, over the other monitor. QEMU ends when its vCPUs let it.

    Not waited for: in a gate QEMU may be unable to answer before the gate is opened, and
    a gate that is not opened within `hang_limit_ms` has the guardian kill the engine: us.
    """
    threading.Thread(target=_quit, args=(vm.test_qmp_path,), name="quit", daemon=True).start()


def _quit(path: Path) -> None:
    with suppress(OSError, ValueError, GuestError):  # it has gone before it could answer
        qmp(path, "quit")


def disconnect(vm: Vm) -> None:
    """Cut the connection of the engine's monitor."""
    for name in os.listdir("/proc/self/fd"):
        if not Path(f"/proc/self/fd/{name}").is_socket():
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as found:
            if found.family == socket.AF_UNIX and found.getpeername() == str(vm.qmp_path):
                found.shutdown(socket.SHUT_RDWR)


class Loser:
    """The hook: at each of `steps`, once, loses the VM at hand if it may be lost.

    Several VMs may reach a step at once, each on a worker's thread: one is taken.
    """

    def __init__(self, lose: Lose, steps: Iterable[str], victims: Iterable[Vm]) -> None:
        self._lose = lose
        self.left = list(steps)
        self._victims = {vm.pid: vm for vm in victims}
        self.lost: dict[str, Vm] = {}
        self._choosing = threading.Lock()

    def __call__(self, step: str) -> None:
        attached = vm_at_hand() if step in self.left else None
        if attached is not None and (vm := self._chosen(step, attached)) is not None:
            self._lose(vm)

    def _chosen(self, step: str, attached: AttachedVm) -> Vm | None:
        with self._choosing:
            if step not in self.left or attached.pid not in self._victims:
                return None
            vm = self.lost[step] = self._victims.pop(attached.pid)
            self.left.remove(step)
            return vm


def vm_at_hand() -> AttachedVm | None:
    """The VM that the engine works on, as its stack tells."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("vm"), AttachedVm):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


@contextmanager
def hooked(hook: Callable[[str], None]) -> Iterator[None]:
    """While in the block, `hook` is told of every step."""
    faults.hook = hook
    try:
        yield
    finally:
        faults.hook = None


def descriptors(path: Path = Path("/proc/self/fd")) -> list[str]:
    """What the descriptors of this process stand for, sorted."""
    found = []
    for name in os.listdir(path):
        with suppress(FileNotFoundError):
            found.append(os.readlink(path / name).split(":[")[0])
    return sorted(found)
