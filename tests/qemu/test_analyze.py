"""Counting running VMs: exact on every backend, and nothing of the VM changes by it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.monitor import qmp
from tests.harness.vm import Backend, Vm
from vmdedup.accounting.analyze import QmpSource, analyze
from vmdedup.linux.pagemap import PRESENT, Pagemap
from vmdedup.linux.smaps import flagged_vmas
from vmdedup.linux.sparse_file import data_segments
from vmdedup.models import ContentAnalysis

from .conftest import Boot

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

PAGE = 4096
ZERO = bytes(PAGE)
MIB = 16

BACKENDS = [
    Backend("memfd", share=True, mib=MIB),
    Backend("memfd", share=False, mib=MIB),
    Backend("file", share=True, mib=MIB),
    Backend("file", share=False, mib=MIB),
    Backend("ram", share=True, mib=MIB),
    Backend("ram", share=False, mib=MIB),
]
IDS = [f"{backend.kind}-{'shared' if backend.share else 'private'}" for backend in BACKENDS]


@pytest.fixture
def own_directories(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A runtime and a store directory of this test alone."""
    store = tempfile.mkdtemp(prefix="vmdedup-test-", dir="/dev/shm")
    try:
        yield {"VMDEDUP_RUNTIME_DIR": str(tmp_path / "run"), "VMDEDUP_STORE_DIR": store}
    finally:
        shutil.rmtree(store, ignore_errors=True)  # unmerge removes it when it is empty


def vmdedup(*arguments: str, **environment: str) -> Any:
    """The JSON document that the command prints."""
    command = [sys.executable, "-c", "from vmdedup.cli.main import main; main()", *arguments]
    done = subprocess.run(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout)


def pause(vm: Vm) -> None:
    """Stop the vCPUs, so that the memory stands still."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(vm.test_qmp_path))
        with connection.makefile("rwb") as stream:
            stream.readline()
            for command in ("qmp_capabilities", "stop"):
                stream.write(b'{"execute": "%s"}\n' % command.encode())
                stream.flush()
                while b'"return"' not in stream.readline():
                    continue


def ram_start(vm: Vm) -> int:
    """Where the RAM lies; right only while nothing has been remapped."""
    (start,) = [
        vma.start for vma in flagged_vmas(vm.name, vm.pid) if vma.end - vma.start == MIB << 20
    ]
    return start


def footprint(vm: Vm, start: int) -> tuple[int, int]:
    """(pages of the RAM in QEMU's page tables, bytes of data that its RAM file has).

    Not the file's blocks: a filesystem on disk counts its own among them, and changes
    these as it writes.
    """
    with Pagemap(vm.name, vm.pid) as pagemap:
        present = (pagemap.categories(start, (MIB << 20) // PAGE) & PRESENT) != 0
    file = vm.directories.ram / "ram0"
    if not file.exists():
        return int(present.sum()), 0
    with file.open("rb") as ram:
        os.fsync(ram.fileno())  # a write that is delayed changes where data seems to be
        segments = list(data_segments(ram.fileno(), file.stat().st_size))
    return int(present.sum()), sum(high - low for low, high in segments)


def contents(vm: Vm, start: int) -> Counter[bytes]:
    """Every page as the guest would read it. (This does allocate absent pages.)"""
    with Path(f"/proc/{vm.pid}/mem").open("rb", buffering=0) as memory:
        raw = os.pread(memory.fileno(), MIB << 20, start)
    return Counter(raw[at : at + PAGE] for at in range(0, len(raw), PAGE))


def count(*vms: Vm) -> ContentAnalysis:
    warnings: list[str] = []
    sources = [QmpSource(str(vm.qmp_path)) for vm in vms]
    counts = analyze(sources, warn=warnings.append)
    assert warnings == []
    return counts


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_counts_are_exact_and_nothing_is_touched(boot: Boot, backend: Backend) -> None:
    vm = boot("bare", backend=backend, parameters={"mib": 2})
    pause(vm)
    start = ram_start(vm)
    before = footprint(vm, start)
    counts = count(vm)
    assert footprint(vm, start) == before
    assert before[0] < (MIB << 20) // PAGE  # otherwise absent pages were not tried

    held = contents(vm, start)
    assert counts.total_pages == (MIB << 20) // PAGE
    assert counts.zero_pages == held[ZERO]
    assert counts.distinct_pages == len(held.keys() - {ZERO})
    assert counts.matrix == [[counts.duplicate_pages]]
    assert [each.name for each in counts.vms] == [vm.name]


@pytest.mark.parametrize("share", [True, False])
def test_a_page_of_the_ram_file_that_no_page_table_shows(boot: Boot, share: bool) -> None:
    """A template's content, or what came back by an unmerge: there, though not mapped in."""
    vm = boot("bare", backend=Backend("file", share=share, mib=MIB), parameters={"mib": 2})
    pause(vm)
    start = ram_start(vm)
    with Pagemap(vm.name, vm.pid) as pagemap:
        present = (pagemap.categories(start, (MIB << 20) // PAGE) & PRESENT) != 0
    absent = [page for page, here in enumerate(present.tolist()) if not here][-3:]
    earlier = count(vm)
    with (vm.directories.ram / "ram0").open("r+b") as file:
        for page in absent:
            file.seek(page * PAGE)
            file.write(b"only in the file" * (PAGE // 16))
    before = footprint(vm, start)
    counts = count(vm)
    assert footprint(vm, start) == before
    assert counts.zero_pages == earlier.zero_pages - 3
    assert counts.distinct_pages == earlier.distinct_pages + 1
    assert counts.duplicate_pages == earlier.duplicate_pages + 2


def test_counts_stay_through_merge_and_unmerge(boot: Boot, own_directories: dict[str, str]) -> None:
    vms = [
        boot("bare", backend=backend, parameters={"mib": 2, "seed": 1 + seed})
        for seed, backend in enumerate(BACKENDS)
    ]
    for vm in vms:
        pause(vm)
    starts = [ram_start(vm) for vm in vms]
    qmp = [word for vm in vms for word in ("--qmp", str(vm.qmp_path))]
    plain = vmdedup("analyze", *qmp)
    report = vmdedup("run", "--once", *qmp, **own_directories)
    assert report["host"]["pages_sharing"] > 0
    before = [footprint(vm, start) for vm, start in zip(vms, starts, strict=True)]
    merged = vmdedup("analyze", *qmp, **own_directories)
    assert [footprint(vm, start) for vm, start in zip(vms, starts, strict=True)] == before
    vmdedup("unmerge", *qmp, **own_directories)
    assert merged == plain
    assert vmdedup("analyze", *qmp) == plain


def test_argument_order(boot: Boot, tmp_path: Path) -> None:
    first = boot("bare", name="first", backend=Backend(mib=MIB), parameters={"mib": 1})
    second = boot("bare", name="second", backend=Backend(mib=MIB), parameters={"mib": 1})
    image = tmp_path / "image"
    image.write_bytes(b"x" * PAGE)
    sources = ["--qmp", str(second.qmp_path), f"--ram-file={image}", "--qmp", str(first.qmp_path)]
    names = [vm["name"] for vm in vmdedup("analyze", *sources)["vms"]]
    assert names == ["second", str(image), "first"]


def test_a_vm_that_must_not_be_merged_is_counted(boot: Boot) -> None:
    vm = boot(
        "bare",
        backend=Backend(mib=MIB),
        parameters={"mib": 1},
    )
    by_file = {"capability": "x-ignore-shared", "state": True}
    qmp(vm.test_qmp_path, "migrate-set-capabilities", capabilities=[by_file])
    assert count(vm).nonzero_pages > 0


def test_what_is_not_there_is_left_out_with_a_line(boot: Boot) -> None:
    gone = boot("bare", name="gone", backend=Backend(mib=MIB), parameters={"mib": 1})
    vm = boot(
        "bare",
        name="half",
        backend=Backend("ram", share=False, mib=MIB, options="prealloc=on"),
        parameters={"mib": 1},
    )
    good = boot("bare", name="good", backend=Backend(mib=MIB), parameters={"mib": 1})
    gone.kill()
    warnings: list[str] = []
    sources = [QmpSource(str(each.qmp_path)) for each in (gone, vm, good)]
    counts = analyze(sources, warn=warnings.append)
    assert [each.name for each in counts.vms] == ["good"]
    assert [str(gone.qmp_path) in warnings[0], "prealloc" in warnings[1]] == [True, True]
    assert len(warnings) == 2
