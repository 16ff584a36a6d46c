"""The rules of KSM against a real kernel's KSM, in a guest: the host's is left alone."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.harness.images import image
from tests.harness.skips import require
from tests.unit.test_known import cpio
from vmdedup.core.counters import sharing_counts
from vmdedup.core.ksm_rules import ksm_sites

pytestmark = pytest.mark.qemu

SOURCE = Path(__file__).with_name("ksm_guest.c")
COUNTS = (300, 257, 1, 513, 256, 255, 2, 1, 600, 40)
"""Pages of each content, around max_page_sharing and its multiples; the last are zeroes."""
_BOOT_LIMIT_S = 240


def told(tmp_path: Path) -> list[dict[str, int]]:
    """What the guest's kernel counts, for each value of use_zero_pages."""
    require(None if shutil.which("gcc") else "gcc is not installed")
    compile_ = ["gcc", "-O1", "-static", "-Wall", f"-DCOUNTS={','.join(map(str, COUNTS))}"]
    subprocess.run([*compile_, "-o", str(tmp_path / "init"), str(SOURCE)], check=True)
    initrd = tmp_path / "initrd"
    program = {"init": (tmp_path / "init").read_bytes()}
    content = cpio(program, mode=0o100755, folders=("dev", "sys"))
    initrd.write_bytes(gzip.compress(content))
    guest, output = image("tiny"), tmp_path / "serial"
    command = ["setpriv", "--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-accel", "tcg"]
    command += ["-m", "128M", "-machine", "pc,mem-merge=off", "-display", "none", "-nodefaults"]
    command += ["-no-reboot", "-serial", f"file:{output}", "-kernel", str(guest.kernel)]
    command += ["-initrd", str(initrd), "-append", guest.cmdline]
    subprocess.run(command, check=True, timeout=_BOOT_LIMIT_S)
    lines = output.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("vmdedup-guest: ")]
    assert not [line for line in said if "failed" in line]
    return [{name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)} for line in said]


def test_the_rules_are_the_kernels(tmp_path: Path) -> None:
    found = told(tmp_path)
    assert [each["use_zero_pages"] for each in found] == [0, 1]
    for each in found:
        counts = COUNTS[:-1] if each["use_zero_pages"] else COUNTS
        digests = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
        zero_pages = COUNTS[-1] if each["use_zero_pages"] else 0
        sites = ksm_sites([digests], each["max_page_sharing"])
        ours = sharing_counts(sites, [zero_pages])
        assert (ours.pages_shared, ours.pages_sharing, ours.zero_pages) == (
            each["pages_shared"],
            each["pages_sharing"],
            each["zero_pages"],
        )
