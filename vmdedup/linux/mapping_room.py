"""The room for new mappings in QEMU, and the limit that was met if there was none.

Up to Linux 6.11 a MAP_FIXED that fails for lack of memory has unmapped the old page before
(mm/mmap.c: mmap_region). So every limit is checked before a session, and a refusal names
the limit that is met. Reads only. Promises nothing: others take memory too.
"""

from __future__ import annotations

from contextlib import suppress

from vmdedup.errors import VmError
from vmdedup.linux.cgroup import headroom
from vmdedup.linux.limits import address_space_left_bytes, commit_left_bytes, max_map_count
from vmdedup.linux.maps import read_maps
from vmdedup.units import MIB

_MAPPINGS_BYTES = MIB
"""Memory to be left, bytes: more than the mappings and page tables of one gate take."""
_SCRATCH_BYTES = 16 * MIB
"""Address space to be left, bytes: more than a session's scratch memory and its view of the
store's pages take."""
_FEW_MAPPINGS = 16


def shortage(pid: int, *, committed_bytes: int) -> str | None:
    """The reason why new mappings could have the VM killed, `None` if there is none.

    `committed_bytes`: shared memory that is to be mapped privately, which counts against
    the memory the host may promise.
    """
    found = headroom(pid)
    if found is not None and found.left_bytes + found.swap_bytes < _MAPPINGS_BYTES:
        return f"its cgroup {found.group} is full: raise its limit"
    left_bytes = commit_left_bytes()
    if left_bytes is not None and left_bytes < committed_bytes + _MAPPINGS_BYTES:
        return (
            f"the host may promise {max(0, left_bytes) // MIB} MiB more and"
            f" {committed_bytes // MIB} MiB are needed: raise vm.overcommit_ratio, or set"
            " vm.overcommit_memory to 0"
        )
    with suppress(OSError):
        left_bytes = address_space_left_bytes(pid)
        if left_bytes is not None and left_bytes < _SCRATCH_BYTES:
            return f"its address space limit (RLIMIT_AS) leaves {max(0, left_bytes) // MIB} MiB"
    return None


def limit_met(pid: int) -> str:
    """The limit that a mapping which failed with ENOMEM has met, and the remedy."""
    mappings = 0
    with suppress(VmError):
        mappings = len(read_maps("", pid))
    if mappings >= max_map_count() - _FEW_MAPPINGS:
        return "no VMA left; raise vm.max_map_count or set vma_budget"
    return shortage(pid, committed_bytes=0) or "the host is out of memory"
