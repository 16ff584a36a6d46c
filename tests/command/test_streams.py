"""Standard streams that are closed, full or read no further: no verb stumbles over them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.command

COMMAND = f"{sys.executable} -c 'from vmdedup.cli.main import main; main()'"
REFUSED = "run --once --qmp /nowhere"


def shell(line: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line.replace("vmdedup", COMMAND)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "VMDEDUP_RUNTIME_DIR": str(tmp_path), **environment},
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize(("verb", "code"), [("schema report", 0), (REFUSED, 1)])
def test_a_closed_stream_is_nobodys_wish(closed: str, verb: str, code: int, tmp_path: Path) -> None:
    """Its number goes to no file that is opened later, either."""
    done = shell(f"vmdedup {verb} {closed}", tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done
    if not closed.startswith(">") and code == 0:
        assert json.loads(done.stdout)


def test_what_can_not_be_printed_is_said(tmp_path: Path) -> None:
    done = shell("vmdedup schema all >/dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, "vmdedup: stdout: No space left on device\n")
    done = shell(f"vmdedup {REFUSED} 2>/dev/full", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_reader_that_leaves_is_no_error_to_speak_of(tmp_path: Path) -> None:
    done = shell("(vmdedup schema all; echo $? >&2) | true", tmp_path)
    assert done.stderr == "1\n"
    done = shell(f"(vmdedup {REFUSED}; echo $?) 2> >(exec true)", tmp_path)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_has_not_is_escaped(encoding: str, tmp_path: Path) -> None:
    """In JSON it stays what it is."""
    (tmp_path / "vm-ü中😀").write_bytes(bytes(4096))
    line = f"vmdedup analyze --ram-file {tmp_path}/vm-ü中😀 --json"
    done = shell(line, tmp_path, LC_ALL="C.UTF-8", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done
    assert "vm-ü中😀" in json.loads(done.stdout)["vms"][0]["name"]
    done = shell(f"vmdedup run --once --qmp {tmp_path}/ü中", tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, "u4e2d" in done.stderr) == (1, True), done
