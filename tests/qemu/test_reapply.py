"""What QEMU set on guest RAM is on its new mappings too, and back after an unmerge."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness.vm import Backend
from tests.qemu.conftest import Boot
from vmdedup import Deduplicator, Settings

pytestmark = pytest.mark.qemu

SET_BY_QEMU = {"dc", "dd", "hg", "mg", "sh"}


def policies(pid: int, name: str) -> set[str]:
    """NUMA policies of the mappings whose file has `name` in it."""
    lines = Path(f"/proc/{pid}/numa_maps").read_text().splitlines()
    return {line.split()[1] for line in lines if name in line}


def flags(pid: int, name: str) -> set[str]:
    """VmFlags lines of those mappings, of those that QEMU sets."""
    found, inside = set(), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = name in line
        elif inside and line.startswith("VmFlags:"):
            found.add(" ".join(sorted(set(line.split()[1:]) & SET_BY_QEMU)))
    return found


def test_numa_policy_and_dump_flags_survive(boot: Boot, tmp_path: Path) -> None:
    options = "policy=bind,host-nodes=0,dump=off"
    vm = boot(backend=Backend("memfd", share=True, options=options), parameters={"mib": 8})
    before = flags(vm.pid, "memfd:")
    store = Path("/dev/shm") / f"vmdedup-{tmp_path.name}-{vm.pid}"
    with Deduplicator(Settings(runtime_dir=tmp_path, store_dir=store)) as dedup:
        dedup.attach([str(vm.qmp_path)])
        report = dedup.run(passes=1)
        assert report.host.pages_sharing > 0
        assert policies(vm.pid, ".store") == {"bind:0"}
        assert policies(vm.pid, "/dev/zero") == {"bind:0"}
        assert flags(vm.pid, ".store") == {"dc dd"}
        dedup.unmerge()
    assert policies(vm.pid, "memfd:") == {"bind:0"}
    assert flags(vm.pid, "memfd:") == before
    vm.wait_passes(1)
    assert vm.errors == 0
