"""Scarcity for tests: small file systems, memory cgroups, resource limits, swap.

Each is a context manager that puts back what it found, and has a probe that
tries it for real.
"""

from __future__ import annotations

import os
import re
import resource
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal

_GROUPS = Path("/sys/fs/cgroup")
_ZRAM = Path("/sys/block/zram0")
_DEVICE = "/dev/zram0"
_ZSWAP = Path("/sys/module/zswap/parameters/enabled")
_LABEL = "vmdedup-test"
_SWAP_FILE = Path("/var/tmp") / f"{_LABEL}.swap"

SwapKind = Literal["zram", "file", "zswap"]


@contextmanager
def small_tmpfs(path: Path, size_kib: int) -> Iterator[Path]:
    """A tmpfs of that size at `path`."""
    path.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k,mode=700", "vmdedup-test", path],
        check=True,
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def resize_tmpfs(path: Path, size_kib: int) -> None:
    """Give a mounted tmpfs another size."""
    subprocess.run(["mount", "-o", f"remount,size={size_kib}k", path], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """The filesystem of a folder, without a block left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20) if free_bytes(folder) > 1 << 20 else bytes(4096))
    assert free_bytes(folder) == 0
    try:
        yield
    finally:
        path.unlink()


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


class MemoryGroup:
    """A memory cgroup of our own below our own, of either hierarchy."""

    def __init__(self) -> None:
        self._home = _own_group()
        self._path = self._home / f"vmdedup-test-{secrets.token_hex(4)}"
        self._path.mkdir()
        unified = (self._path / "memory.current").exists()
        self._limit = self._path / ("memory.max" if unified else "memory.limit_in_bytes")
        self._usage = self._path / ("memory.current" if unified else "memory.usage_in_bytes")
        self._events = self._path / ("memory.events" if unified else "memory.oom_control")
        self._swap = self._path / ("memory.swap.max" if unified else "memory.swappiness")
        self._reclaim = self._path / ("memory.reclaim" if unified else "memory.force_empty")
        self.may_swap(False)

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.set_limit(None)
        deadline = time.monotonic() + 10
        while True:
            for pid in (self._path / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    (self._home / "cgroup.procs").write_text(pid)
            try:
                self._path.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def add(self, pid: int) -> None:
        """Move a process here; what it has already stays charged elsewhere."""
        (self._path / "cgroup.procs").write_text(str(pid))

    def release(self, pid: int) -> None:
        """Move a process back; what it has taken stays charged here."""
        (self._home / "cgroup.procs").write_text(str(pid))

    def reclaim(self) -> None:
        """Have the kernel take back all it can, as under pressure."""
        size = self.used_bytes
        with suppress(BlockingIOError, InterruptedError):  # not all of it could be had
            self._reclaim.write_text(str(size) if self._reclaim.name == "memory.reclaim" else "0")

    @property
    def folder(self) -> Path:
        return self._path

    @property
    def used_bytes(self) -> int:
        return int(self._usage.read_text())

    def set_limit(self, size_bytes: int | None) -> None:
        """Limit the group's memory; None is no limit."""
        none = "max" if self._limit.name == "memory.max" else "-1"
        self._limit.write_text(none if size_bytes is None else str(size_bytes))

    def may_swap(self, may: bool) -> None:
        """Whether the group's memory may be swapped out; at first it may not."""
        with suppress(FileNotFoundError):  # a kernel that does not account for swap
            may_be = "max" if self._swap.name == "memory.swap.max" else "60"
            self._swap.write_text(may_be if may else "0")

    @property
    def kills(self) -> int:
        """How many processes the OOM killer has ended here."""
        found = re.search(r"^oom_kill (\d+)", self._events.read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


def _own_group() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _GROUPS / "memory" / name.lstrip("/")
        if not controllers and (_GROUPS / "cgroup.controllers").exists():
            return _GROUPS / name.lstrip("/")
    raise FileNotFoundError("no memory cgroup above this process")


@cache
def memory_group_missing() -> str | None:
    """Whether a memory cgroup can be made."""
    try:
        with MemoryGroup() as group:
            group.set_limit(1 << 30)
            assert group.kills == 0
    except (OSError, AssertionError) as error:
        return f"no memory cgroup can be made: {error}"
    return None


@contextmanager
def limited(pid: int, which: int, soft: int) -> Iterator[None]:
    """A soft resource limit of a process for the block."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (soft, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, which, before)


@cache
def swap_missing(kind: SwapKind = "zram") -> str | None:
    """Whether this host can swap in this way: tried, where nobody else uses the device."""
    _end_swap_of_a_killed_run()
    if kind == "zram":
        if not (_ZRAM / "disksize").exists():
            return "no zram device to swap to"
        if (_ZRAM / "disksize").read_text().strip() != "0":
            return "zram0 is in use"
    if kind == "zswap" and not _ZSWAP.exists():
        return "this kernel has no zswap"
    try:
        with swap(kind=kind):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{kind} cannot be swapped to: {error}"


@contextmanager
def swap(size_mib: int = 512, *, kind: SwapKind = "zram") -> Iterator[None]:
    """Swap for the block: to a zram device or a file, with zswap before it or without."""
    with ExitStack() as exits:
        if kind != "zram":
            was = _ZSWAP.read_text() if _ZSWAP.exists() else None
            if was is not None:
                exits.callback(_ZSWAP.write_text, was)
                _ZSWAP.write_text("Y" if kind == "zswap" else "N")
            exits.callback(_SWAP_FILE.unlink, missing_ok=True)
            fd = os.open(_SWAP_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(fd, 0, size_mib << 20)
            finally:
                os.close(fd)
        else:
            exits.callback((_ZRAM / "reset").write_text, "1")
            (_ZRAM / "disksize").write_text(f"{size_mib}M")
        place = _DEVICE if kind == "zram" else str(_SWAP_FILE)
        _call("mkswap", "-L", _LABEL, place)
        _call("swapon", place)
        exits.callback(_call, "swapoff", place)
        yield


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _end_swap_of_a_killed_run() -> None:
    """Free what bears our label: tests that swap run alone."""
    named = subprocess.run(["swaplabel", _DEVICE], capture_output=True, text=True, check=False)
    if f"LABEL: {_LABEL}\n" in named.stdout:
        if _DEVICE in Path("/proc/swaps").read_text():
            _call("swapoff", _DEVICE)
        (_ZRAM / "reset").write_text("1")
    if _SWAP_FILE.exists():
        if str(_SWAP_FILE) in Path("/proc/swaps").read_text():
            _call("swapoff", str(_SWAP_FILE))
        _SWAP_FILE.unlink()


def swapped_bytes(pid: int) -> int:
    """VmSwap of a process."""
    found = re.search(r"VmSwap:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


def private_bytes(pid: int) -> int:
    """VmData of a process: what RLIMIT_DATA is compared with."""
    found = re.search(r"VmData:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def open_count(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
