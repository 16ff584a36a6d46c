"""The machine code is what its source says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.skips import require
from vmdedup.inject.stub import STUB
from vmdedup.linux.bounded import SERVE
from vmdedup.linux.syscall_batch import LOOP

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("name", "bytes_"), [("stub.S", STUB), ("loop.S", LOOP), ("serve.S", SERVE)]
)
def test_the_code_is_its_source_assembled(tmp_path: Path, name: str, bytes_: bytes) -> None:
    if shutil.which("gcc") is None or shutil.which("objcopy") is None:
        require("needs gcc and objcopy")
    source, assembled, code = Path(__file__).with_name(name), tmp_path / "o", tmp_path / "bin"
    subprocess.run(["gcc", "-c", str(source), "-o", str(assembled)], check=True)
    command = ["objcopy", "-O", "binary", "-j", ".text", str(assembled), str(code)]
    subprocess.run(command, check=True)
    assert code.read_bytes() == bytes_
