"""Work for several VMs at a time."""

from __future__ import annotations

import threading
import time

import pytest

from vmdedup.engine.workers import Workers
from vmdedup.errors import VmError, VmGoneError

pytestmark = pytest.mark.unit


@pytest.fixture(params=[1, 2, 4])
def most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As on a host with processors for all."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    return int(request.param)


class Work:
    """Notes who works at the same time; the first ones wait until `meet` do."""

    def __init__(self, meet: int = 1) -> None:
        self._meet = meet
        self.now: set[int] = set()
        self.at_once = 0
        self.done: dict[int, object] = {}
        self._changes = threading.Condition()

    def __call__(self, item: int) -> int:
        with self._changes:
            self.now.add(item)
            self.at_once = max(self.at_once, len(self.now))
            self._changes.notify_all()
            self._changes.wait_for(lambda: self.at_once >= self._meet, timeout=30)
        time.sleep(0.02)
        with self._changes:
            self.now.remove(item)
        if item == 3:
            raise VmGoneError("vm3", "it ended")
        if item == 13:
            raise RuntimeError("a defect")
        return item * 10

    def tell(self, item: int, result: int | VmError) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.done[item] = result


def test_each_is_done_and_no_more_at_once_than_allowed(most: int) -> None:
    work = Work(meet=most)
    Workers(most, threading.Event()).each(range(8), work, work.tell)
    assert work.at_once == most
    assert isinstance(work.done.pop(3), VmGoneError)
    assert work.done == {item: item * 10 for item in range(8) if item != 3}


def test_what_is_left_is_hurried_once_somebody_waits(most: int) -> None:
    threads: dict[int, str] = {}

    def work(item: int) -> None:
        threads[item] = threading.current_thread().name

    def is_foreground() -> bool:
        return len(threads) >= 3

    workers = Workers(most, threading.Event())
    workers.each(range(8), work, lambda *_: None, is_foreground=is_foreground)
    here = threading.current_thread().name
    in_turn = [item for item, thread in threads.items() if thread == here]
    assert in_turn == list(range(8 if most == 1 else 3))
    assert sorted(threads) == list(range(8))


def test_no_more_at_once_than_there_are_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    work = Work()
    Workers(4, threading.Event()).each(range(4), work, work.tell)
    assert work.at_once == 1


def test_a_defect_ends_all_and_nothing_goes_on_behind_it(most: int) -> None:
    work = Work()
    stop = threading.Event()
    with pytest.raises(RuntimeError, match="a defect"):
        Workers(most, stop).each([13, *range(20, 40)], work, work.tell)
    assert not work.now
    assert len(work.done) < 10
    assert not stop.is_set(), "those who merge on are not told to stop"


def test_interrupted_work_is_told_to_end_soon(most: int) -> None:
    """What was begun is not left alone, and the next is not begun."""
    stop = threading.Event()
    begun = []

    def work(item: int) -> bool:
        begun.append(item)
        return stop.wait(10) if item else False

    def done(item: int, _: bool | VmError) -> None:
        if item == 0:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Workers(most, stop).each(range(9), work, done)
    assert time.monotonic() - began < 10
    assert len(begun) <= most + 1
    assert not stop.is_set(), "another run can follow"
