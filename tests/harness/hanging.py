"""Storage on this host that can be made to hang, and to answer again.

Owns a server process over an image: `qemu-nbd`, whose socket QEMU itself connects to, or
`qemu-storage-daemon`, which shows the image as a file through FUSE ("fuse"), and a loop
device on that file ("loop"), to which native AIO does not block. SIGSTOP makes it hang;
`stands_still` tells when a guest's reads do.
Ends the process by its pid, running, so that nobody is left waiting for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from tests.harness.vm import Vm
from vmdedup.closing import Closing

Kind = Literal["nbd", "fuse", "loop"]

_START_S = 20.0


def server_missing(kind: Kind) -> str | None:
    """Why there can be no such server here; None where there can."""
    program = "qemu-nbd" if kind == "nbd" else "qemu-storage-daemon"
    if shutil.which(program) is None:
        return f"no {program}"
    if kind != "nbd" and not os.access("/dev/fuse", os.W_OK):
        return "no /dev/fuse"
    if kind == "loop" and not os.access("/dev/loop-control", os.W_OK):
        return "no loop devices"
    return None


class Storage(Closing):
    """The image at `image`, served. A context manager."""

    def __init__(self, kind: Kind, image: Path, folder: Path) -> None:
        self.kind = kind
        self.path = folder / f"{image.name}.{kind}"
        """The socket, or the file."""
        self._loop: str | None = None
        if kind == "nbd":
            command = ["qemu-nbd", "-k", str(self.path), "-f", "raw", "-t", "-e", "8", str(image)]
        else:
            self.path.touch()
            blockdev = f"driver=file,node-name=image,filename={image}"
            export = f"fuse,id=export,node-name=image,mountpoint={self.path},writable=on"
            command = ["qemu-storage-daemon", "--blockdev", blockdev, "--export", export]
        self._empty = None if kind == "nbd" else os.stat(self.path).st_dev
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            self._wait_until_served()
            if kind == "loop":
                self._loop = _losetup("--find", "--show", str(self.path))
        except BaseException:
            self.close()
            raise

    def _wait_until_served(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._is_served():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the {self.kind} server did not start")
            time.sleep(0.02)

    def _is_served(self) -> bool:
        if self.kind == "nbd":
            return self.path.exists()
        return os.stat(self.path).st_dev != self._empty

    def node(self, name: str, aio: str = "threads") -> str:
        """The `-blockdev` argument of a raw node on it."""
        if self.kind == "nbd":
            where = f"file.driver=nbd,file.server.type=unix,file.server.path={self.path}"
        else:
            driver = "file" if self._loop is None else "host_device"
            where = f"file.driver={driver},file.filename={self._loop or self.path},file.aio={aio}"
            where += ",file.cache.direct=on,file.locking=off"
        return f"driver=raw,node-name={name},{where}"

    @contextmanager
    def hung(self) -> Iterator[None]:
        """For the block it does not answer."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the server. Those who still use the image get errors."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
        if self._loop is not None:
            _losetup("--detach", self._loop)
        if self.kind != "nbd":
            subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True)
        self._process.terminate()
        self._process.wait()


def stands_still(vm: Vm) -> bool:
    """Whether no read of the guest has ended for a moment in which the guest itself got on.

    A guest that the busy host does not run ends no read either, and has none in flight.
    """
    before = vm.status()
    time.sleep(1.2)
    now = vm.status()
    return now.dma_reads == before.dma_reads and now.rewrites >= before.rewrites + 8


def _losetup(*arguments: str) -> str:
    return subprocess.run(
        ["losetup", *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
