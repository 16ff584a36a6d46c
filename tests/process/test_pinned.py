"""A process that is kept hold of."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

import pytest

from tests.harness.limits import limited
from tests.process.victims import fork_and
from vmdedup.errors import MergeError, VmGoneError
from vmdedup.linux.process import Process

pytestmark = pytest.mark.process

LOOKS = [Process.status, Process.cgroups]


def lowest_free() -> int:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


@pytest.mark.parametrize("free", [0, 1])
def test_without_a_descriptor_of_ours_it_has_not_ended(free: int) -> None:
    """Neither for the process itself nor, with one left, for what tells who it is."""
    with (
        limited(os.getpid(), resource.RLIMIT_NOFILE, lowest_free() + free),
        pytest.raises(MergeError, match="Too many open files"),
    ):
        Process("vm", os.getppid())


@pytest.mark.parametrize("look", LOOKS)
def test_nor_later_when_it_is_looked_at(look: Callable[[Process], object]) -> None:
    with (
        Process("vm", os.getppid()) as process,
        limited(os.getpid(), resource.RLIMIT_NOFILE, lowest_free()),
        pytest.raises(MergeError, match="Too many open files"),
    ):
        look(process)


@pytest.mark.parametrize("look", LOOKS)
def test_one_that_ended_is_told(look: Callable[[Process], object]) -> None:
    child = fork_and(signal.pause)
    with Process("vm", child) as process:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with pytest.raises(VmGoneError):
            look(process)
        with pytest.raises(VmGoneError):
            process.require_alive()
    with pytest.raises(VmGoneError):
        Process("vm", child)
