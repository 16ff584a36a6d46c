"""The process that counts contents, without an engine: its answers and refusals."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmdedup.accounting.content_sources import HeldContents
from vmdedup.daemon.content_count import REFUSED, Count, SourcesCount
from vmdedup.ipc.protocol import Refusal
from vmdedup.known.pages import page_digests
from vmdedup.models import ContentSources

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))


def counted(count: Count, *held: HeldContents, below: Sequence[str] = ()) -> tuple[int, bytes]:
    """Exit code and answer of the process, started `below` another command."""
    answer_fd = os.memfd_create("answer")
    with os.fdopen(os.memfd_create("count"), "wb") as file, os.fdopen(answer_fd, "rb") as answer:
        for value in (count, *held):
            pickle.dump(value, file)
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
    vms = [HeldContents(f"vm{n}", n, 7, page_digests(b"content")) for n in range(3)]
    code, answer = counted(SourcesCount([str(tmp_path / "file")], None), *vms)
    assert code == 0
    found = ContentSources.model_validate_json(answer)
    assert (found.known[0].pages, found.shared_pages, found.explained_pages) == (1, 3, 3)
    assert [vm.name for vm in found.vms] == ["vm0", "vm1", "vm2"]
    code, answer = counted(SourcesCount([str(tmp_path / "none")], None))
    assert code == REFUSED
    assert Refusal.model_validate_json(answer).message.endswith("No such file or directory")


def test_memory_that_is_not_there_is_a_refusal(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(b"\x7fELF")
    os.truncate(packed, 1 << 30)  # read whole
    below = ["prlimit", f"--as={1 << 30}", "--core=0"]
    code, answer = counted(SourcesCount([str(packed)], None), below=below)
    assert code == REFUSED
    assert "more memory than there is" in Refusal.model_validate_json(answer).message
