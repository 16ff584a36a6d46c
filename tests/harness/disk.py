"""A disk for a guest with `dma=1`: each 4 KiB block's content follows from its number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tests.harness.content import DISK_SEED, PAGE_BYTES, Kind, content_key, pages_of_keys


@dataclass(frozen=True)
class Disk:
    """How a VM uses the image at `path`.

    `iops` throttles it, so that reads stay in flight for long; `iothread` moves
    its work off QEMU's main thread.
    """

    path: Path
    cache: Literal["none", "writeback", "writethrough", "directsync", "unsafe"] = "none"
    aio: Literal["threads", "native", "io_uring"] = "threads"
    iops: int | None = None
    iothread: bool = False

    def arguments(self) -> list[str]:
        """QEMU's arguments for it."""
        drive = f"file={self.path},format=raw,if=none,id=disk0,cache={self.cache},aio={self.aio}"
        device = "virtio-blk-pci,drive=disk0"
        arguments = []
        if self.iops is not None:
            drive += f",throttling.iops-total={self.iops}"
        if self.iothread:
            arguments += ["-object", "iothread,id=iothread0"]
            device += ",iothread=iothread0"
        return [*arguments, "-drive", drive, "-device", device]


def write_image(path: Path, mib: int = 16) -> Path:
    """Write such an image of `mib` MiB to `path`."""
    blocks = (mib << 20) // PAGE_BYTES
    keys = np.array(
        [content_key(Kind.DISK_BLOCK, DISK_SEED, block) for block in range(blocks)],
        dtype=np.uint64,
    )
    pages_of_keys(keys).tofile(path)
    return path
