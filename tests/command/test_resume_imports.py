"""`vmdedup resume` starts on a starved host within systemd's time: it imports little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.command

_RESUME = (
    "import sys\n"
    "from vmdedup.cli.main import main\n"
    "sys.argv = ['vmdedup', 'resume', *sys.argv[1:]]\n"
    "code = 0\n"
    "try:\n"
    "    code = main()\n"
    "except SystemExit as end:\n"
    "    code = end.code\n"
    "print(*sorted(sys.modules))\n"
    "sys.exit(code)\n"
)


def _resume(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _RESUME, *arguments], capture_output=True, text=True, check=False
    )


def test_resume_imports_neither_settings_nor_models(tmp_path: Path) -> None:
    config = tmp_path / "vmdedup.toml"
    config.write_text(f'runtime_dir = "{tmp_path}"\n')
    done = _resume("--config", config)
    assert done.returncode == 0, done.stderr
    assert not {"vmdedup.settings", "vmdedup.models", "numpy", "asyncio"} & set(done.stdout.split())


def test_a_settings_file_that_can_not_be_read_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "vmdedup.toml"
    config.write_text("runtime_dir = 1\n")
    done = _resume("--config", config)
    assert done.returncode == 2
    assert "runtime_dir must be a string" in done.stderr
    assert "Traceback" not in done.stderr
    done = _resume("--config", tmp_path / "none.toml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "none.toml" in done.stderr
