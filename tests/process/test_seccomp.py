"""System call filters: read from a real process, and believed as the kernel does.

On a filter that kills, one call of ours that it does not list ends the victim.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.filters import (
    ALLOW,
    EQUAL,
    ERRNO,
    KILL,
    LOAD,
    LOG,
    RETURN,
    TRAP,
    allow_list,
    answers,
    answers_argument,
    install,
    program,
)
from tests.process.victims import Victim, fork_and
from tests.property.test_seccomp import programs
from vmdedup.errors import InjectionError, RefusedError
from vmdedup.inject.ptrace import Tracee
from vmdedup.inject.remote import Landmarks, RemoteThread, call_rows
from vmdedup.inject.seccomp import CALLS, Call, possible_answers
from vmdedup.linux import bounded
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process

OWN = [0, 1, 13, 14, 35, 39, 60, 202, 228, 230, 231, 234]
"""What the victim itself calls: read, write, signals, sleep, getpid, futex, clocks, its end."""
OURS = sorted({int(call.number) for call in CALLS})


@contextmanager
def filtered(path: Path, *filters: bytes) -> Iterator[Victim]:
    with Victim(path) as victim:
        for code in filters:
            assert victim.ask(f"filter {code.hex()}") == "0"
        yield victim


def session(victim: Victim, *, stub: bool = True) -> None:
    """Scratch memory, a call, a batch, and all away again."""
    with RemoteThread("victim", victim.pid, victim.worker, stub=stub) as remote:
        assert remote.call(NR.GETPID) == victim.pid
        remote.hold()
        remote.launch(call_rows([(NR.GETPID,), (NR.CLOSE, 9999)] * 100))
        assert (remote.wait(10)[::2] == victim.pid).all()
        remote.room(4)
    victim.require_healthy()
    victim.require_no_scratch()


def refused(victim: Victim, match: str) -> None:
    with (
        pytest.raises(RefusedError, match=match) as failure,
        RemoteThread("victim", victim.pid, victim.worker),
    ):
        pass
    assert failure.value.key == "seccomp"
    victim.require_healthy()
    victim.require_no_scratch()


def test_an_allow_list_that_kills_does_not_end_the_process(programs: dict[str, Path]) -> None:
    with filtered(programs["dynamic"], allow_list(OWN)) as victim:
        refused(victim, r"answers memfd_create with KILL_PROCESS; have the filter allow that call")


def test_an_allow_list_that_has_all_our_calls_is_no_hindrance(
    programs: dict[str, Path], stub: bool
) -> None:
    with filtered(programs["dynamic"], allow_list([*OWN, *OURS])) as victim:
        session(victim, stub=stub)


def test_each_call_that_is_missing_is_named(programs: dict[str, Path]) -> None:
    for number in set(OURS) - set(OWN):
        allowed = allow_list([*OWN, *(each for each in OURS if each != number)])
        with filtered(programs["dynamic"], allowed) as victim:
            refused(victim, f"answers {NR(number).name.lower()} with KILL_PROCESS")


@pytest.mark.parametrize("answer", [KILL, 0, TRAP, ERRNO | 1, 0x7FF0_0000])
def test_every_answer_but_log_is_a_refusal(answer: int, programs: dict[str, Path]) -> None:
    with filtered(programs["dynamic"], answers({NR.MADVISE: answer}, ALLOW)) as victim:
        refused(victim, "answers madvise with")


def test_what_is_only_logged_is_let_through(programs: dict[str, Path]) -> None:
    with filtered(programs["dynamic"], answers({NR.MUNMAP: LOG}, ALLOW)) as victim:
        session(victim)


def test_where_something_milder_follows_an_errno_is_none(programs: dict[str, Path]) -> None:
    """The userfaultfd comes from the device then; where mbind fails QEMU has no policy."""
    milder = answers({NR.USERFAULTFD: ERRNO | 1, NR.MBIND: ERRNO | 38}, ALLOW)
    with filtered(programs["dynamic"], milder) as victim:
        session(victim)
    with filtered(programs["dynamic"], answers({NR.USERFAULTFD: KILL}, ALLOW)) as victim:
        refused(victim, "answers userfaultfd with KILL_PROCESS")


def test_arguments_count(programs: dict[str, Path]) -> None:
    """Executable memory that is denied is done without; where it kills, it is not tried."""
    with filtered(programs["dynamic"], answers_argument(NR.MMAP, 2, 4, ERRNO | 1)) as victim:
        session(victim)
        with RemoteThread("victim", victim.pid, victim.worker) as remote:
            assert not remote.uses_stub
    with filtered(programs["dynamic"], answers_argument(NR.MMAP, 2, 4, KILL)) as victim:
        refused(victim, "answers mmap with KILL_PROCESS")
    with filtered(programs["dynamic"], answers_argument(NR.MMAP, 3, 1 << 18, KILL)) as victim:
        session(victim)  # MAP_HUGETLB, which we never ask for
    with filtered(programs["dynamic"], answers_argument(NR.MMAP, 0, 1 << 46, KILL)) as victim:
        refused(victim, "answers mmap with KILL_PROCESS")  # by the address


def test_the_strictest_of_several_filters_counts(programs: dict[str, Path]) -> None:
    everything, some = answers({}, ALLOW), answers({NR.MREMAP: KILL}, ALLOW)
    for filters in ((everything, some), (some, everything)):
        with filtered(programs["dynamic"], *filters) as victim:
            refused(victim, "answers mremap with KILL_PROCESS")


def test_a_filter_that_comes_later_is_seen(programs: dict[str, Path]) -> None:
    """What was found out is kept for as long as there are no more of them."""
    landmarks = Landmarks()
    with filtered(programs["dynamic"], answers({}, ALLOW)) as victim:
        for code in (b"", answers({NR.CLOSE: KILL}, ALLOW)):
            if code:
                assert victim.ask(f"filter {code.hex()}") == "0"
            remote = RemoteThread("victim", victim.pid, victim.worker, landmarks=landmarks)
            if not code:
                with remote:
                    assert remote.call(NR.GETPID) == victim.pid
                continue
            for _ in range(2):
                with pytest.raises(RefusedError, match="answers close with KILL_PROCESS"):
                    remote.open()
        victim.require_healthy()


def test_a_look_does_for_many_sessions(
    programs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    honest = Tracee.filters

    def counted(self: Tracee) -> tuple[bytes, ...]:
        looks.append(self.tid)
        return honest(self)

    monkeypatch.setattr(Tracee, "filters", counted)
    landmarks = Landmarks()
    with filtered(programs["dynamic"], answers({}, ALLOW)) as victim:
        for _ in range(3):
            with RemoteThread("victim", victim.pid, victim.worker, landmarks=landmarks):
                pass
    assert looks == [victim.worker]


def under(code: bytes, run: Callable[[], None]) -> None:
    """Run it on a thread of ours that is under that filter itself."""

    def filtered_run() -> None:
        install(code)
        run()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(filtered_run).result()


def test_where_the_filters_can_not_be_read_nothing_is_tried(programs: dict[str, Path]) -> None:
    """As in a service with SystemCallFilter=; who is under no filter is used all the same."""

    def try_both() -> None:
        refused(victim, "cannot be read, so that a call might end it .*not under seccomp itself")
        session(free)

    with filtered(programs["dynamic"], answers({}, ALLOW)) as victim:
        with Victim(programs["dynamic"]) as free:
            under(answers({}, ALLOW), try_both)
        session(victim)


@pytest.mark.parametrize(
    ("denied", "match"),
    [
        (NR.PROCESS_VM_READV, "its memory may not be accessed: Operation not permitted"),
        (NR.PIDFD_GETFD, "no descriptor could be copied from it: .*Operation not permitted"),
    ],
)
def test_what_we_may_not_call_ourselves_is_told_and_nothing_stays(
    victim: Victim, monkeypatch: pytest.MonkeyPatch, denied: NR, match: str
) -> None:
    """As in containers: their runtimes deny these calls."""

    def open_session() -> None:
        with pytest.raises(InjectionError, match=match):
            RemoteThread("victim", victim.pid, victim.worker).open()

    monkeypatch.setattr(bounded, "_pool", bounded._Pool())  # its threads get the filter too
    under(answers({denied: ERRNO | 1}, ALLOW), open_session)
    monkeypatch.undo()
    victim.require_no_scratch()
    session(victim)


def test_the_kernel_answers_what_was_foretold() -> None:
    """Random programs, for getpid with arguments: an errno, or its result."""
    chance = random.Random(7)
    tried = 0
    while tried < 60:
        body = programs(chance.getrandbits(32), chance.randrange(1, 30))
        rows = list(struct.iter_unpack("=HBBI", body))
        code = program(
            [(LOAD, 0, 0, 0), (EQUAL, 1, 0, int(NR.GETPID)), (RETURN, 0, 0, ALLOW)]
            + [
                (RETURN, 0, 0, answer_of(k)) if op == RETURN else (op, a, b, k)
                for op, a, b, k in rows
                if op != 0x16
            ]
            + [(RETURN, 0, 0, ERRNO | 99)]
        )
        arguments = tuple(chance.choice([0, 3, chance.getrandbits(64)]) for _ in range(6))
        possible = possible_answers(code, Call(NR.GETPID, arguments))
        if 0 in possible or len(possible) > 1:
            continue  # a division by zero kills, and so much for that
        told = asked(code, arguments)
        if told is None:
            continue
        tried += 1
        (foretold,) = possible
        assert told == (0 if foretold == ALLOW else foretold & 0xFFFF)


def answer_of(k: int) -> int:
    """Of the answers that a process survives, one that tells which it was."""
    return ALLOW if k == ALLOW else ERRNO | (k >> 16 & 0xFF or 1)


def asked(code: bytes, arguments: tuple[int, ...]) -> int | None:
    """The errno of getpid, in a child under that filter; None where the kernel takes none such."""
    hear, tell = os.pipe()

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            install(code)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return
        result = libc.syscall(39, *(ctypes.c_uint64(each) for each in arguments))
        os.write(tell, struct.pack("=i", ctypes.get_errno() if result < 0 else 0))

    child = fork_and(run)
    os.close(tell)
    told = os.read(hear, 4)
    os.close(hear)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return int(struct.unpack("=i", told)[0]) if told else None
