"""VMs on every backend under write load, and what must hold for them after a crash."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.chaos.engines import Job
from tests.harness.kernel import PAGE_BYTES, mappings
from tests.harness.monitor import qmp
from tests.harness.vm import Backend, Vm
from vmdedup.deduplicator import Deduplicator
from vmdedup.linux.flock import lock_holder
from vmdedup.settings import Settings

BACKENDS = (
    Backend("memfd", share=True, mib=32),
    Backend("memfd", share=False, mib=32),
    Backend("file", share=True, mib=32),
    Backend("file", share=False, mib=32),
    Backend("ram", share=True, mib=32),
    Backend("ram", share=False, mib=32),
)
WRITING = {"mib": 4, "rewrite_per_s": 1500, "check_per_s": 8192, "run_pages": 4}
"""Each page is rewritten every 0.7 s and checked eight times a second."""

HANG_LIMIT_MS = 400
"""Of engines that are to die. Those of the test's own process are given time: a busy
host keeps a process waiting for longer."""
_PATIENT_MS = 10_000
BOUND_S = 60.0
"""Longest time until anything that must happen has happened, on a busy host."""
_MOST_PASSES = 10


def becomes_true(condition: Callable[[], bool], within_s: float = BOUND_S) -> bool:
    """Whether `condition` holds at some moment from now on."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    """Whether a process that may be another's child still runs."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat[stat.rindex(")") + 2] not in "ZX"
    return False


def run_state(vm: Vm) -> str:
    """QEMU's own word, over the monitor that is the test's."""
    return str(qmp(vm.test_qmp_path, "query-status")["status"])


def waiting_in_userfault(pid: int) -> list[str]:
    """Threads that wait in the kernel for somebody to serve their fault."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            if (task / "wchan").read_text() == "handle_userfault":
                found.append(task.name)
    return found


def held_threads(pid: int) -> list[str]:
    """Threads that a tracer or a signal keeps stopped."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            stat = (task / "stat").read_text()
            if stat[stat.rindex(")") + 2] in "tT":
                found.append(task.name)
    return found


def registered_mappings(pid: int) -> int:
    """Mappings that are registered with any userfaultfd (VmFlags um, uw)."""
    count = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("VmFlags:"):
            count += bool({"um", "uw"} & set(line.split()))
    return count


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process stand for, sorted."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}").split(":[")[0])
    return sorted(found)


def merged_pages(pid: int) -> int:
    """Pages that the kernel maps privately from a store or the zero device.

    A shared mapping of the store is one that a session compares pages with in place.
    """
    ours = (m for m in mappings(pid) if m.is_store or m.path == "/dev/zero")
    found = (m for m in ours if m.permissions.endswith("p"))
    return sum(m.pages for m in found)


def scratch_rooms(pid: int) -> list[tuple[int, int]]:
    """Scratch memory of an unmerge: from the first to the last page of ours around it."""
    ends: dict[int, list[int]] = {}
    for m in mappings(pid):
        if "vmdedup-table" in m.path and m.offset:
            ends.setdefault(m.start - m.offset, []).extend((m.start, m.end))
    return [(min(found), max(found)) for found in ends.values()]


def unused_store_pages(store_dir: Path, vms: Sequence[Vm]) -> int:
    """Pages that stores occupy and that none of the VMs maps."""
    mapped: set[tuple[int, int]] = set()
    for vm in vms:
        for m in mappings(vm.pid):
            if m.is_store:
                first = m.offset // PAGE_BYTES
                pages = range(first, first + m.pages)
                mapped |= {(m.inode, page) for page in pages}
    occupied = sum(path.stat().st_blocks * 512 for path in store_dir.glob("*.store"))
    return occupied // PAGE_BYTES - len(mapped)


def kept_stores(store_dir: Path) -> list[str]:
    """Why stores are still there: who holds each, and who names it among its mappings."""
    found = []
    for path in store_dir.glob("*.store"):
        with path.open("rb") as file:
            holder = lock_holder(file.fileno())
        needle = f" {path.stat().st_ino} "
        lines = [
            f"{maps.parent.name}: {line}"
            for maps in Path("/proc").glob("[0-9]*/maps")
            for line in _text_of(maps).splitlines()
            if needle in line or "memfd:vmdedup-" in line
        ]
        found.append(f"{path.name} held by {holder}: {lines}")
    return found


def _text_of(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _runs(vm: Vm) -> bool:
    return run_state(vm) == "running"


def _has_no_held_thread(pid: int) -> bool:
    return not held_threads(pid)


def _has_passed(vm: Vm, passes: int) -> bool:
    return vm.status().passes >= passes


def _has_files(pid: int, files: list[str]) -> bool:
    return open_files(pid) == files


def _merge_on(dedup: Deduplicator) -> None:
    """Pass until every VM shares something; what guests write all the time takes some."""
    for _ in range(_MOST_PASSES):
        rows = dedup.run(passes=1).vms
        assert {row.status for row in rows} <= {"scanning", "merged"}, rows
        if all(row.merged_pages for row in rows):
            return
    pytest.fail(f"after {_MOST_PASSES} passes: {rows}")


class Fleet:
    """Running VMs that share one engine's settings. A context manager that ends them."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.vms: list[Vm] = []
        store = Path("/dev/shm") / f"vmdedup-chaos-{os.getpid()}-{folder.name}"
        values: dict[str, Any] = {
            "first_look_ms": 20,
            "hang_limit_ms": _PATIENT_MS,
            "controls": {"gate_deadline_ms": 1000},
            # Many gates, however short they are: kills want the fourth of each kind.
            "gate_runs": 64,
            "gate_pages": 512,
        }
        values |= settings
        self.settings = Settings(runtime_dir=folder / "run", store_dir=store, **values)
        self._exits = ExitStack()
        self._exits.callback(shutil.rmtree, store, ignore_errors=True)
        self._files: dict[str, list[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for vm in self.vms:
                print(f"--- {vm.name}\n{vm.transcript()}")
        self._exits.close()

    def boot(self, *options: dict[str, Any]) -> Self:
        """Start VMs with these arguments of Vm, and wait until all are ready."""
        for option in options:
            number = len(self.vms)
            parameters = {**WRITING, "seed": number + 1, **option.get("parameters", {})}
            given = {"guest": "bare", "name": f"vm{number}", **option}
            vm = self._exits.enter_context(Vm(**{**given, "parameters": parameters}))
            self.vms.append(vm)
        for vm in self.vms:
            vm.wait_ready()
            self._files[vm.name] = open_files(vm.pid)
        return self

    def boot_all_backends(self) -> Self:
        """One bare guest a backend."""
        return self.boot(*({"backend": backend} for backend in BACKENDS))

    @property
    def sockets(self) -> list[str]:
        return [str(vm.qmp_path) for vm in self.vms]

    def job(self, **choices: Any) -> Job:
        """A job on all VMs with the fleet's settings, changed by `settings=`."""
        settings = self.settings.model_dump(mode="json") | {"hang_limit_ms": HANG_LIMIT_MS}
        settings |= choices.pop("settings", {})
        return Job(qmp=self.sockets, settings=settings, **choices)

    # ---- what must hold ----

    def require_released(self, vms: Sequence[Vm] | None = None) -> None:
        """Nothing holds a VM: it runs, and no protection of ours is on it."""
        for vm in self.vms if vms is None else vms:
            assert vm.alive, vm.transcript()
            assert becomes_true(partial(_runs, vm)), run_state(vm)
            assert becomes_true(partial(_has_no_held_thread, vm.pid)), held_threads(vm.pid)
            assert registered_mappings(vm.pid) == 0
            assert waiting_in_userfault(vm.pid) == []

    def require_unharmed(self, vms: Sequence[Vm] | None = None) -> None:
        """Every guest gets on, and finds its whole memory as it wrote it."""
        chosen = list(self.vms if vms is None else vms)
        starts = [vm.status() for vm in chosen]
        for vm, start in zip(chosen, starts, strict=True):
            assert becomes_true(partial(_has_passed, vm, start.passes + 2)), (
                f"{vm.name} does not get on: {vm.transcript()}"
            )
            assert vm.errors == 0, vm.serial.complaints()

    def require_takeover(self, *, unmerge: bool = True) -> None:
        """A fresh engine goes on with the merging, finds all right, and can take it all back."""
        rooms = {vm.pid: scratch_rooms(vm.pid) for vm in self.vms}
        with Deduplicator(self.settings) as dedup:
            began_s = time.process_time()
            vms = dedup.attach(self.sockets).vms
            assert [f"{vm.name}: {vm.reason}" for vm in vms if not vm.mergeable] == []
            for row in dedup.report().vms:
                taken_over = row.merged_pages + row.zero_pages + row.cow_broken_pages
                assert row.pid is not None
                assert taken_over == merged_pages(row.pid), row
            assert time.process_time() - began_s < BOUND_S, "a takeover takes seconds"
            self._require_no_room(rooms)
            _merge_on(dedup)
            verified = dedup.verify()
            assert verified.ok, verified
            assert unused_store_pages(self.settings.store_dir, self.vms) == 0
            if not unmerge:
                return
            unmerged = dedup.unmerge()
            assert [row.remaining_pages for row in unmerged.vms] == [0] * len(self.vms), unmerged
            assert unmerged.store_removed, kept_stores(self.settings.store_dir)
        self.require_nothing_left()

    def _require_no_room(self, rooms: dict[int, list[tuple[int, int]]]) -> None:
        """What a killed unmerge had filled is unmapped, named or not."""
        for pid, left in rooms.items():
            for m in mappings(pid):
                assert not any(m.start < end and start < m.end for start, end in left), m

    def require_nothing_left(self) -> None:
        """No mapping, descriptor, store, note or draft of ours is left anywhere."""
        for vm in self.vms:
            assert [each.path for each in mappings(vm.pid) if each.is_ours] == []
            assert becomes_true(partial(_has_files, vm.pid, self._files[vm.name])), (
                open_files(vm.pid),
                self._files[vm.name],
            )
        assert not self.settings.store_dir.exists()
        left = [path.name for path in self.settings.runtime_dir.iterdir()]
        assert left == ["engine.lock"], left

    def require_all_well(self, *, unmerge: bool = True) -> None:
        """All of it."""
        self.require_released()
        self.require_unharmed()
        self.require_takeover(unmerge=unmerge)
        self.require_unharmed()
