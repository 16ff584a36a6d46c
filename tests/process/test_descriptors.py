"""Where descriptors point to, read all at once; and userfaultfds, which nobody else may keep."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.capabilities import root_missing
from tests.process.victims import Victim
from vmdedup.errors import UnsupportedError, VmGoneError
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.descriptors import descriptor_links, userfaultfds
from vmdedup.linux.process import Process
from vmdedup.linux.syscalls import NR, syscall
from vmdedup.linux.userfaultfd import TRACKING_FEATURES, Userfault
from vmdedup.remap import take_userfaultfd
from vmdedup.remap.take_userfaultfd import create_userfault, unused_userfaults

_SETRESUID = 117

pytestmark = pytest.mark.process


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[int]]:
    """A short name, longest names, names that are no text, and what has no name."""
    names = [b"short", b"x" * 255, b"\xff\xfe\n"]
    deep = os.fsencode(tmp_path) + b"/" + b"/".join([b"d" * 200] * 5)
    os.makedirs(deep)
    paths = [os.path.join(os.fsencode(tmp_path), name) for name in names]
    paths += [os.path.join(deep, name) for name in names]
    fds = [os.open(path, os.O_CREAT | os.O_RDWR) for path in paths]
    fds += [*os.pipe(), os.memfd_create("vmdedup-test")]
    yield fds
    for fd in fds:
        os.close(fd)


def test_links_are_those_that_are_read_one_by_one(opened: list[int]) -> None:
    links = descriptor_links(os.getpid())
    assert {fd: links[fd] for fd in opened} == {
        fd: os.readlink(f"/proc/self/fd/{fd}") for fd in opened
    }


def test_descriptors_that_come_and_go_meanwhile(opened: list[int]) -> None:
    end = threading.Event()

    def open_and_close() -> None:
        while not end.is_set():
            os.close(os.dup(opened[1]))

    others = [threading.Thread(target=open_and_close) for _ in range(2)]
    for each in others:
        each.start()
    try:
        for _ in range(300):
            assert set(opened) <= descriptor_links(os.getpid()).keys()
    finally:
        end.set()
        for each in others:
            each.join()


def test_a_process_that_has_ended_is_told() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            descriptor_links(process.pid)


def test_userfaultfds_and_whether_they_are_set_up() -> None:
    if (missing := root_missing()) is not None:
        pytest.skip(missing)
    fds = [syscall(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK) for _ in range(2)]
    with Userfault("us", os.getpid(), fds[0], TRACKING_FEATURES):
        found = userfaultfds(os.getpid(), descriptor_links(os.getpid()))
        assert {fd: found[fd] for fd in fds} == {fds[0]: True, fds[1]: False}
    os.close(fds[1])
    assert not set(fds) & userfaultfds(os.getpid(), descriptor_links(os.getpid())).keys()


def test_a_userfaultfd_that_cannot_be_taken_does_not_stay_in_the_process(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For lack of descriptors here, say: its holder could protect memory with it."""

    def refuse(pidfd: int, number: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with (
        Process("vm", victim.pid) as process,
        RemoteThread("vm", victim.pid, victim.worker) as remote,
    ):
        vm: Any = SimpleNamespace(
            name="vm", pid=victim.pid, process=process, may_hold_userfaults=False
        )
        with monkeypatch.context() as patch:
            patch.setattr(take_userfaultfd, "pidfd_getfd", refuse)
            with pytest.raises(OSError, match="Too many open files"):
                create_userfault(vm, remote)
        assert unused_userfaults(vm) == set()
        # As if killed there: the next session closes it.
        number = remote.call(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        assert unused_userfaults(vm) == {number}
        create_userfault(vm, remote).close()
        assert unused_userfaults(vm) == set()
        victim.kill()
        with pytest.raises(VmGoneError):
            unused_userfaults(vm)


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes another user")
def test_a_process_that_may_make_none_gets_none_by_a_chain(victim: Victim) -> None:
    """Of /dev/userfaultfd only the stub can be sure to close it at once."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("here every process may make a userfaultfd")
    with (
        Process("vm", victim.pid) as process,
        RemoteThread("vm", victim.pid, victim.worker, stub=False) as remote,
    ):
        vm: Any = SimpleNamespace(
            name="vm", pid=victim.pid, process=process, may_hold_userfaults=False
        )
        create_userfault(vm, remote).close()
        set_fs_and_all = (65534, 65534, 65534)
        assert remote.call(_SETRESUID, *set_fs_and_all) == 0
        with pytest.raises(UnsupportedError, match="may make no userfaultfd by itself either"):
            create_userfault(vm, remote)
        assert unused_userfaults(vm) == set()
