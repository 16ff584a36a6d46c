"""The QEMUs that VMs of tests can be: the installed one, and that of the release's backports.

Owns the choice between them, which is made by PATH: whatever a test starts, also
through a daemon or a verb, runs the QEMU that comes first there. images/qemu.sh
fetches the second and leaves the installed one alone.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Literal

from tests.harness.images import REPOSITORY

Qemu = Literal["installed", "backports"]

QEMUS: tuple[Qemu, ...] = ("installed", "backports")


class QemuMissingError(Exception):
    """Why backports' QEMU is not to be had here."""


def chosen_qemus(core: bool) -> tuple[Qemu, ...]:
    """The QEMUs that a test runs on; `core`: it is one of those that differ most between them.

    By VMDEDUP_QEMUS: `all`, `installed` or `backports` for every test; by default core
    tests run on both, others on the installed one.
    """
    wanted = os.environ.get("VMDEDUP_QEMUS", "core")
    choices: dict[str, tuple[Qemu, ...]] = {
        "core": QEMUS if core else ("installed",),
        "all": QEMUS,
        "installed": ("installed",),
        "backports": ("backports",),
    }
    if wanted not in choices:
        raise ValueError(f"VMDEDUP_QEMUS={wanted}: it is one of {', '.join(choices)}")
    return choices[wanted]


@cache
def _backports_folder() -> Path | str:
    """Where backports' qemu-system-x86_64 lies, or why there is none."""
    fetched = subprocess.run(
        [REPOSITORY / "images" / "qemu.sh"], capture_output=True, text=True, check=False
    )
    if fetched.returncode == 0:
        return Path(fetched.stdout.strip())
    told = fetched.stderr.strip().splitlines()
    return told[-1] if told else f"images/qemu.sh ended with {fetched.returncode}"


def backports_missing() -> str | None:
    """Whether backports' QEMU is here or can be fetched."""
    found = _backports_folder()
    return found if isinstance(found, str) else None


def backports_path() -> str:
    """A PATH that has backports' QEMU first; QemuMissingError where there is none."""
    found = _backports_folder()
    if isinstance(found, str):
        raise QemuMissingError(found)
    return f"{found}:{os.environ['PATH']}"


def hidden_from_others() -> str | None:
    """Whether another user can run the QEMU that comes first in PATH."""
    for folder in os.environ["PATH"].split(":"):
        program = Path(folder) / "qemu-system-x86_64"
        if program.exists():
            closed = [str(each) for each in program.parents if not each.stat().st_mode & 0o001]
            return f"another user cannot look into {closed[0]}" if closed else None
    return "no qemu-system-x86_64 in PATH"
