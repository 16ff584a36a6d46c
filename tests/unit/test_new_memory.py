"""The memory that unmerges at the same time may take."""

from __future__ import annotations

import threading
import time

import pytest

from vmdedup.remap import new_memory
from vmdedup.remap.new_memory import NewMemory
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.unit


class Host:
    """How much memory there is: what is taken of it is there no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
        self.pages = pages
        monkeypatch.setattr(
            new_memory, "spendable", lambda _: (self.pages * PAGE_BYTES, "the host")
        )


def test_one_gets_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, 100)
    memory = NewMemory()
    with memory.granted(1, 60) as pages:
        assert pages == 60
    with memory.granted(1, 200) as pages:
        assert pages == 100
    host.pages = 0
    with memory.granted(1, 10) as pages:
        assert pages == 0


def test_two_share_what_is_enough_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    Host(monkeypatch, 100)
    memory = NewMemory()
    with memory.granted(1, 60) as first, memory.granted(2, 40) as second:
        assert (first, second) == (60, 40)


def test_no_two_count_on_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, and is granted what the first has left."""
    host = Host(monkeypatch, 100)
    memory = NewMemory()
    got = []

    def second() -> None:
        with memory.granted(2, 60) as pages:
            got.append(pages)

    thread = threading.Thread(target=second)
    with memory.granted(1, 60):
        thread.start()
        time.sleep(0.1)
        assert not got
        host.pages -= 60
    thread.join()
    assert got == [40]
