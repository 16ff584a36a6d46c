"""A host disk that is slow for some processes, by the block I/O controller of cgroup v1.

Owns one control group of its own, which is gone after the block; the processes
must have ended before. QEMU's own throttling would not do: it holds requests back
before the host's kernel pins the guest's pages, the controller after that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONTROLLER = Path("/sys/fs/cgroup/blkio")


def throttle_missing(folder: Path) -> str | None:
    """Why the disk under `folder` cannot be made slow here; None when it can."""
    limit = _CONTROLLER / "blkio.throttle.read_iops_device"
    if not os.access(limit, os.W_OK):
        return "no block I/O controller of cgroup v1 that may be written"
    device = os.stat(folder).st_dev
    if not Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").exists():
        return f"{folder} lies on no block device"
    return None


@contextmanager
def slow_disk(folder: Path, iops: int) -> Iterator[Path]:
    """A control group whose processes read at most `iops` times a second below `folder`.

    Yields the file that takes the id of a process (with all its threads).
    """
    group = _CONTROLLER / f"vmdedup-test-{os.getpid()}"
    group.mkdir()
    try:
        device = os.stat(folder).st_dev
        limit = f"{os.major(device)}:{os.minor(device)} {iops}"
        (group / "blkio.throttle.read_iops_device").write_text(limit)
        yield group / "cgroup.procs"
    finally:
        group.rmdir()
