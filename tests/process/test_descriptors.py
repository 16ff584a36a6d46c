"""Where descriptors point to, read all at once."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from vmdedup.linux.descriptors import descriptor_links, userfaultfds
from vmdedup.linux.syscalls import NR, syscall
from vmdedup.linux.userfaultfd import TRACKING_FEATURES, Userfault

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
