"""The guests' files, built by images/build.sh when they are not there.

Owns the knowledge of where the recipes leave them. The build is cached by the
recipe itself, so asking costs half a second once a process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Guest = Literal["tiny", "stock", "bare", "debian"]

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Image:
    """What QEMU boots. Only the bare guest has no `initrd`, only the Debian guest has a `disk`."""

    kernel: Path
    initrd: Path | None
    cmdline: str
    disk: Path | None = None
    """The root file system. Each guest's writes go to a file of its own, without a name."""

    def command_line(self, parameters: Mapping[str, int | str], *words: str) -> str:
        """The guest's, with the worker's parameters (images/README.md) and further words."""
        worker = [f"vmdedup.{name}={value}" for name, value in parameters.items()]
        return " ".join(filter(None, [self.cmdline, *worker, *words]))


# Only what makes booting under TCG shorter: no calibration, mitigations or self tests.
_LINUX_CMDLINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"
    " random.trust_cpu=on cryptomgr.notests"
)


@cache
def image(guest: Guest, *, kaslr: bool = False) -> Image:
    """Build `guest` if needed; raises CalledProcessError when that fails.

    Its kernel always lies at the same address, which boots faster, unless `kaslr`.
    """
    subprocess.run([REPOSITORY / "images" / "build.sh", guest], check=True)
    directory = REPOSITORY / ".cache" / "images" / guest
    if guest == "bare":
        return Image(directory / "guest.elf", None, "")
    return Image(
        directory / "vmlinuz",
        directory / "initrd",
        _LINUX_CMDLINE if kaslr else f"{_LINUX_CMDLINE} nokaslr",
        directory / "disk" if guest == "debian" else None,
    )
