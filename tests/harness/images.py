"""The guests' files, built by images/build.sh when they are not there.

Owns the knowledge of where the recipes leave them. The build is cached by the
recipe itself, so asking costs half a second once a process.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Guest = Literal["tiny", "bare"]

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Image:
    """What QEMU boots: `-kernel`, `-initrd` (tiny only), and the fixed command line."""

    kernel: Path
    initrd: Path | None
    cmdline: str


# Only what makes booting under TCG shorter: no calibration, mitigations or self tests.
_TINY_CMDLINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"
    " random.trust_cpu=on cryptomgr.notests nokaslr"
)


@cache
def image(guest: Guest) -> Image:
    """Build `guest` if needed; raises CalledProcessError when that fails."""
    subprocess.run([REPOSITORY / "images" / "build.sh", guest], check=True)
    directory = REPOSITORY / ".cache" / "images" / guest
    if guest == "bare":
        return Image(directory / "guest.elf", None, "")
    return Image(directory / "vmlinuz", directory / "initrd", _TINY_CMDLINE)
