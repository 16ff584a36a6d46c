"""NUMA nodes, as the kernel tells them."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vmdedup.linux.numa import (
    NO_NODE,
    allocating_on,
    has_several_nodes,
    nodes_of,
    nodes_of_file,
)
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = 64


def node_of_own(address: int) -> set[int]:
    """The nodes that numa_maps names for the mapping at `address`."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if int(line.split()[0], 16) == address:
            return {int(node) for node in re.findall(r"N(\d+)=", line)}
    raise AssertionError(f"no mapping at {address:#x}")


def test_present_pages_have_the_kernels_node_and_absent_ones_none() -> None:
    with mmap.mmap(-1, PAGES * PAGE_BYTES) as memory:
        content = np.frombuffer(memory, dtype=np.uint8)
        base = content.ctypes.data
        memory[: PAGES // 2 * PAGE_BYTES] = b"\x01" * (PAGES // 2 * PAGE_BYTES)
        nodes = nodes_of(os.getpid(), base + np.arange(PAGES, dtype=np.int64) * PAGE_BYTES)
        assert set(nodes[: PAGES // 2].tolist()) == node_of_own(base)
        assert set(nodes[PAGES // 2 :].tolist()) == {NO_NODE}
        del content


def test_pages_of_a_file(tmp_path: Path) -> None:
    fd = os.memfd_create("nodes")
    try:
        os.pwrite(fd, b"\x02" * 8 * PAGE_BYTES, 0)
        page = np.array([1, 3, 7], dtype=np.int64)
        assert (nodes_of_file(fd, page) != NO_NODE).all()
        assert len(nodes_of_file(fd, page[:0])) == 0
    finally:
        os.close(fd)


def test_a_process_that_ended_is_an_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(ProcessLookupError):
        nodes_of(ended.pid, np.array([PAGE_BYTES], dtype=np.int64))


def test_pages_are_made_where_asked_and_the_policy_ends_with_the_block() -> None:
    def policy_of_new_page() -> tuple[str, int]:
        with mmap.mmap(-1, PAGE_BYTES) as memory:
            memory[0] = 1
            content = np.frombuffer(memory, dtype=np.uint8)
            address = content.ctypes.data
            del content
            (line,) = [
                line
                for line in Path("/proc/self/numa_maps").read_text().splitlines()
                if int(line.split()[0], 16) <= address
            ][-1:]
            node = int(nodes_of(os.getpid(), np.array([address]))[0])
            return line.split()[1], node

    before = policy_of_new_page()
    node = before[1]
    with allocating_on(node):
        assert policy_of_new_page() == (f"prefer:{node}", node)
    assert policy_of_new_page() == before
    with allocating_on(NO_NODE):
        assert policy_of_new_page() == before


def test_whether_there_are_several_nodes() -> None:
    nodes = Path("/sys/devices/system/node").glob("node*/meminfo")
    sizes = [int(re.findall(r"MemTotal:\s+(\d+)", node.read_text())[0]) for node in nodes]
    assert has_several_nodes() == (len([size for size in sizes if size]) > 1)


@pytest.mark.parametrize(("nodes", "several"), [("0", False), ("0-1", True), ("1,3", True)])
def test_a_list_of_nodes_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: str, several: bool
) -> None:
    listed = tmp_path / "has_memory"
    listed.write_text(f"{nodes}\n")
    monkeypatch.setattr("vmdedup.linux.numa._NODES_WITH_MEMORY", listed)
    assert has_several_nodes() == several
