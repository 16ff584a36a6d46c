"""Looks at all contents that a client waits for: known files, or the comparison with KSM.

Owns the one look that is under way. The engine reads a piece of a VM's memory in each turn of
its loop, so that merges, requests and hazards wait for a piece at most, or for the digests of
one VM to be put aside; then `content_count` counts in a process of its own. Promises one answer
within `LIMIT_S`, and that a VM that ends or cannot be read meanwhile is left out. Refuses a
second look at the same time: each keeps 8 bytes of every page in memory.
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import ValidationError

from vmdedup.accounting.content_sources import held_contents
from vmdedup.accounting.ksm_comparison import ksm_contents
from vmdedup.closing import Closing
from vmdedup.daemon.api_process import ApiServer
from vmdedup.daemon.command_errors import LookUnderWayError, NotFoundError, refusal_of
from vmdedup.daemon.content_count import REFUSED, Count, KsmCount, SourcesCount
from vmdedup.daemon.own_program import command_of
from vmdedup.engine.fleet import Fleet
from vmdedup.errors import VmdedupError, VmError
from vmdedup.ipc.protocol import CompareWithKsm, ReadContentSources, Refusal, Request
from vmdedup.linux import malloc
from vmdedup.linux.ksm import read_ksm
from vmdedup.models import ContentSources, KsmComparison, Model
from vmdedup.vm.attached_vm import AttachedVm

LIMIT_S = 540.0
"""Longest time until the answer, seconds; clients wait a little longer."""
_END_LIMIT_S = 3.0
_MOST_ANSWER_BYTES = 64 << 20

_Steps = Generator[None, None, Any]


@dataclass
class _Counting:
    process: subprocess.Popen[bytes]
    answer_fd: int

    def end(self) -> None:
        """Kill it, with the programs that it runs, and forget it."""
        # It has a session of its own, so its group is only its own. Its files have no names.
        with suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        os.close(self.answer_fd)
        # A hanging disk may delay its end even now; the engine must go on.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_LIMIT_S)


@dataclass
class _Look:
    request_id: int
    task: BinaryIO
    """Pickles: the `Count`, then the contents of each VM."""
    left: list[AttachedVm]
    """VMs that are not read yet."""
    read: Callable[[AttachedVm], _Steps]
    answer: Callable[[bytes], Model]
    deadline: float
    """On CLOCK_MONOTONIC, seconds."""
    reading: tuple[AttachedVm, _Steps] | None = None
    counting: _Counting | None = None

    def end(self) -> None:
        """Forget what was read, and end the counting."""
        with suppress(OSError):  # what it could not keep
            self.task.close()
        if self.counting is not None:
            self.counting.end()


class ContentLooks(Closing):
    """The look that a client waits for, if one does."""

    def __init__(self, fleet: Fleet, server: ApiServer) -> None:
        self._fleet = fleet
        self._server = server
        self._look: _Look | None = None

    @property
    def reads(self) -> bool:
        """Whether a piece can be read now."""
        return self._look is not None and self._look.counting is None

    def add(self, request: Request) -> None:
        """Begin a look for a client. Raises VmdedupError."""
        if self._look is not None:
            raise LookUnderWayError("another look at all contents is under way: try again")
        vms = list(self._fleet.engine.vms)
        if not vms:
            raise NotFoundError("no VM is attached")
        deadline = time.monotonic() + LIMIT_S
        command, seed = request.command, secrets.randbits(63)
        if isinstance(command, ReadContentSources):
            known, settings = command.known, self._fleet.settings
            folders = settings.known_folders if settings.api_group is not None else None
            task = _task(SourcesCount(known, folders))
            answer = ContentSources.model_validate_json
            self._look = _Look(request.id, task, vms, held_contents, answer, deadline)
        else:
            assert isinstance(command, CompareWithKsm)
            task = _task(KsmCount(read_ksm(), seed))
            self._look = _Look(
                request.id, task, vms, lambda vm: ksm_contents(vm, seed), self._with_ksm, deadline
            )

    def step(self) -> None:
        """Read a piece, or see whether the counting has ended."""
        look = self._look
        if look is None:
            return
        try:
            if time.monotonic() > look.deadline:
                raise VmdedupError(f"looking at all contents took over {LIMIT_S:.0f} s: given up")
            if look.counting is not None:
                answer = self._counted(look, look.counting)
            else:
                answer = None
                self._read_piece(look)
        except VmdedupError as error:
            answer = refusal_of(error)
        if answer is not None:
            self.close()
            self._server.reply(look.request_id, answer)

    def _read_piece(self, look: _Look) -> None:
        if look.reading is None:
            if not look.left:
                look.counting = _begin(look.task)
                return
            vm = look.left.pop(0)
            look.reading = vm, look.read(vm)
        vm, steps = look.reading
        if vm not in self._fleet.engine.vms:
            look.reading = None
            return
        try:
            next(steps)
        except StopIteration as end:
            _put(look.task, end.value)
            look.reading = None
            malloc.give_back()
        except VmError:
            look.reading = None

    def _counted(self, look: _Look, counting: _Counting) -> Model | None:
        """The answer; `None` as long as there is none. Raises VmdedupError."""
        code = counting.process.poll()
        if code is None:
            return None
        content = os.pread(counting.answer_fd, _MOST_ANSWER_BYTES, 0)
        try:
            if code == REFUSED:
                return Refusal.model_validate_json(content)
            if code == 0:
                return look.answer(content)
        except ValidationError as error:
            raise VmdedupError(f"counting the contents gave no answer: {error}") from error
        raise VmdedupError(f"counting the contents ended with {code}")

    def _with_ksm(self, content: bytes) -> Model:
        compared = KsmComparison.model_validate_json(content)
        return self._fleet.report(converged=None).model_copy(update={"ksm": compared})

    def close(self) -> None:
        """Give up the look: its client has its answer, or has lost its connection. Idempotent."""
        look, self._look = self._look, None
        if look is not None:
            look.end()


def _task(count: Count) -> BinaryIO:
    """A file that begins with this. Raises VmdedupError."""
    try:
        file = os.fdopen(os.memfd_create("vmdedup-count"), "wb")
    except OSError as error:
        raise VmdedupError(f"counting the contents cannot begin: {error}") from error
    _put(file, count)
    return file


def _put(file: BinaryIO, value: object) -> None:
    """Raises VmdedupError."""
    try:
        pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)
        file.flush()
    except OSError as error:
        raise VmdedupError(f"the contents cannot be kept: {error}") from error


def _begin(task: BinaryIO) -> _Counting:
    """Start the process that counts. Raises VmdedupError."""
    answer_fd = os.memfd_create("vmdedup-answer")
    try:
        task.seek(0)
        numbers = {"engine-pid": os.getpid(), "count-fd": task.fileno(), "answer-fd": answer_fd}
        words = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
        process = subprocess.Popen(
            [*command_of("vmdedup.daemon.content_count"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(task.fileno(), answer_fd),
            start_new_session=True,
        )
    except OSError as error:
        os.close(answer_fd)
        raise VmdedupError(f"counting the contents cannot begin: {error}") from error
    task.close()
    return _Counting(process, answer_fd)
