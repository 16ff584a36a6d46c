"""The process that counts contents, without an engine: its answers and refusals."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmdedup.daemon.content_count import REFUSED, Count, SourcesCount
from vmdedup.ipc.protocol import Refusal
from vmdedup.models import ContentSources

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))


def counted(count: Count, below: Sequence[str] = ()) -> tuple[int, bytes]:
    """Exit code and answer of the process, started `below` another command."""
    answer_fd = os.memfd_create("answer")
    with os.fdopen(os.memfd_create("count"), "wb") as file, os.fdopen(answer_fd, "rb") as answer:
        pickle.dump(count, file)
        file.flush()
        file.seek(0)
        command = [*below, sys.executable, "-c", "from vmdedup.daemon import content_count as it"]
        command[-1] += "; it.main()"
        command += ["--engine-pid", str(os.getpid()), "--count-fd", str(file.fileno())]
        done = subprocess.run(
            [*command, "--answer-fd", str(answer_fd)],
            check=False,
            capture_output=True,
            pass_fds=(file.fileno(), answer_fd),
        )
        assert done.stderr == b""
        return done.returncode, os.pread(answer.fileno(), 1 << 20, 0)


def test_it_answers_or_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    code, answer = counted(SourcesCount([], [str(tmp_path / "file")], None))
    assert code == 0
    assert ContentSources.model_validate_json(answer).known[0].pages == 1
    code, answer = counted(SourcesCount([], [str(tmp_path / "none")], None))
    assert code == REFUSED
    assert Refusal.model_validate_json(answer).message.endswith("No such file or directory")


def test_memory_that_is_not_there_is_a_refusal(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(b"\x7fELF")
    os.truncate(packed, 1 << 30)  # read whole
    below = ["prlimit", f"--as={1 << 30}", "--core=0"]
    code, answer = counted(SourcesCount([], [str(packed)], None), below)
    assert code == REFUSED
    assert "more memory than there is" in Refusal.model_validate_json(answer).message
