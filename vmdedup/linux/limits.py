"""The limits that may deny a process a further mapping.

Owns the reading of three of them: the number of its mappings (vm.max_map_count), its
address space (RLIMIT_AS), and the memory the host may promise (vm.overcommit_memory=2).
The fourth, its cgroup's memory, is `cgroup`'s. Reads only; others may take the rest.
"""

from __future__ import annotations

import re
import resource

from vmdedup.linux.proc_file import read_record

_STRICT = "2"
"""Value of vm.overcommit_memory with which the host promises no more memory than it has
(OVERCOMMIT_NEVER)."""


def max_map_count() -> int:
    """vm.max_map_count: the most mappings a process may have."""
    return int(read_record("/proc/sys/vm/max_map_count"))


def commit_left_bytes() -> int | None:
    """Memory that the host may still promise; `None` if it promises without a limit."""
    if read_record("/proc/sys/vm/overcommit_memory").strip() != _STRICT:
        return None
    fields = dict(
        re.findall(r"(CommitLimit|Committed_AS): +(\d+) kB", read_record("/proc/meminfo"))
    )
    return (int(fields["CommitLimit"]) - int(fields["Committed_AS"])) * 1024


def address_space_left_bytes(pid: int) -> int | None:
    """Address space that RLIMIT_AS leaves a process; `None` without a limit. Raises OSError."""
    limit_bytes, _ = resource.prlimit(pid, resource.RLIMIT_AS)
    if limit_bytes == resource.RLIM_INFINITY:
        return None
    found = re.search(r"^VmSize:\s+(\d+) kB", read_record(f"/proc/{pid}/status"), re.MULTILINE)
    return limit_bytes - (int(found[1]) * 1024 if found else 0)
