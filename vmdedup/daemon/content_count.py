"""The counting after a look at all contents: a process of its own.

Owns that process. It reads files and disk images that a client has named, runs debugfs and
qemu-img on them, and computes for long: none of that may hold up the engine, or a closed
gate. Promises to end with the engine, to leave nothing behind, and to keep no
capability but the one to read other users' images. What it answers is checked by the engine.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from vmdedup.accounting.content_sources import HeldContents, content_sources
from vmdedup.accounting.ksm_comparison import KsmContents, ksm_comparison
from vmdedup.daemon.command_errors import refusal_of
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.ipc.protocol import Refusal
from vmdedup.known.cache import known_pages_of
from vmdedup.linux import capabilities
from vmdedup.linux.ksm import KernelKsm
from vmdedup.linux.process import end_with
from vmdedup.models import ContentSources, KsmComparison, Model

REFUSED = 3
"""Exit code with a Refusal as the answer."""
_NICE = 10


@dataclass(frozen=True)
class SourcesCount:
    """Count by known files."""

    known: Sequence[str]
    folders: Sequence[str] | None
    """Folders that the files must be below, and the backing files of images; `None`: they may be
    anywhere."""

    def result(self, held: Sequence[HeldContents]) -> ContentSources:
        """Raises UsageError for a file that cannot be used."""
        paths = [self._allowed(path) for path in self.known]
        return content_sources(held, [known_pages_of(path, self._allowed) for path in paths])

    def _allowed(self, path: str) -> str:
        """The path without links, so that what is looked at is what was judged."""
        if self.folders is None:
            return path
        real = os.path.realpath(path)
        if not any(Path(real).is_relative_to(os.path.realpath(each)) for each in self.folders):
            raise UsageError(
                f"known file {path}: it is below no folder of the setting known_folders, which"
                " counts because others than root may ask (api_group)"
            )
        return real


@dataclass(frozen=True)
class KsmCount:
    """Count by KSM's rules and ours."""

    kernel: KernelKsm
    seed: int

    def result(self, contents: Sequence[KsmContents]) -> KsmComparison:
        """Never fails."""
        return ksm_comparison(contents, self.kernel, self.seed)


Count = SourcesCount | KsmCount


def main() -> None:
    """The process: `content_count --engine-pid N --count-fd N --answer-fd N`."""
    capabilities.keep_only(capabilities.COUNTING)
    parser = argparse.ArgumentParser(prog="vmdedup-count")
    for name in ("engine-pid", "count-fd", "answer-fd"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    end_with(arguments.engine_pid)
    os.nice(_NICE)
    answer: Model
    try:
        with os.fdopen(arguments.count_fd, "rb") as file:
            count, *contents = _pickles(file)
        answer = count.result(contents)
    except VmdedupError as error:
        answer = refusal_of(error)
    except MemoryError:
        answer = refusal_of(VmdedupError("counting the contents takes more memory than there is"))
    with os.fdopen(arguments.answer_fd, "w") as file:
        file.write(answer.model_dump_json())
    sys.exit(REFUSED if isinstance(answer, Refusal) else 0)


def _pickles(file: BinaryIO) -> Iterator[Any]:
    """A `Count`, then what was read of each VM."""
    with suppress(EOFError):
        while True:
            yield pickle.load(file)


def _end(_number: int, _frame: FrameType | None) -> None:
    """An exception, so that a program that is running here is ended too."""
    sys.exit(1)
