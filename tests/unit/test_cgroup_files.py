"""Both versions' files of a memory cgroup, as Documentation/admin-guide has them.

A kernel has the memory controller in one of the versions only. The other one's files are
written here; `process/test_cgroup.py` has real groups.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vmdedup.linux import cgroup
from vmdedup.linux.cgroup import limited_groups

pytestmark = pytest.mark.unit

MIB = 1 << 20
UNIFIED = {
    "memory.max": "max",
    "memory.high": "max",
    "memory.current": str(100 * MIB),
    "memory.stat": f"anon 1\ninactive_file {3 * MIB}\nactive_file {2 * MIB}\nshmem 9\n",
    "memory.swap.max": "max",
    "memory.swap.current": "0",
}
OLDER = {
    "memory.limit_in_bytes": str(2**63 - 4096),
    "memory.usage_in_bytes": str(100 * MIB),
    "memory.stat": f"rss 1\ntotal_inactive_file {3 * MIB}\ntotal_active_file {2 * MIB}\n",
    "memory.swappiness": "60",
    "memory.memsw.limit_in_bytes": str(2**63 - 4096),
    "memory.memsw.usage_in_bytes": str(110 * MIB),
}


@pytest.fixture
def swap_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "swap_free_bytes", lambda: 1000 * MIB)


def write(folder: Path, files: dict[str, str], **changed: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in {**files, **changed}.items():
        (folder / name).write_text(text.rstrip() + "\n")


@pytest.mark.usefixtures("swap_free")
@pytest.mark.parametrize("version", ["unified", "older"])
def test_each_limit_above_counts_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    top, slice_, vm = tmp_path, tmp_path / "machine", tmp_path / "machine/web"
    if version == "unified":
        write(top, {})
        write(slice_, UNIFIED, **{"memory.high": str(400 * MIB), "memory.swap.max": str(30 * MIB)})
        write(vm, UNIFIED, **{"memory.max": str(120 * MIB)})
        files = cgroup._UNIFIED
    else:
        write(top, OLDER)
        write(slice_, OLDER, **{"memory.limit_in_bytes": str(400 * MIB)})
        (slice_ / "memory.memsw.limit_in_bytes").write_text(str(440 * MIB))
        write(vm, OLDER, **{"memory.limit_in_bytes": str(120 * MIB)})
        files = cgroup._OLDER
    monkeypatch.setattr(cgroup, "_groups", lambda _: [(vm, top, files)])
    found = {group.folder: group for group in limited_groups(1)}
    assert found.keys() == {vm, slice_}
    assert found[vm].limit_bytes() == 120 * MIB
    assert found[vm].left_bytes() == 25 * MIB, "its file cache is given back"
    assert found[slice_].left_bytes() == 305 * MIB
    # The slice: 30 MiB of swap; or 440 for both, 400 of it memory, 10 swapped out by now.
    assert found[slice_].swap_bytes() == 30 * MIB
    assert found[vm].swap_bytes() == 30 * MIB, "those above it forbid more"
