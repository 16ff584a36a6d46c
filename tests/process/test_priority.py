"""Scheduling of the borrowed thread: real-time while a session is open, then as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.harness.images import REPOSITORY
from tests.process.victims import Victim, fork_and
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.realtime import Company, is_allowed, urgent
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.process

URGENT = os.SCHED_RR | os.SCHED_RESET_ON_FORK


@pytest.fixture(autouse=True)
def _need_privilege() -> None:
    before = os.sched_getscheduler(0)
    with urgent():
        if os.sched_getscheduler(0) == before:
            pytest.skip("real-time scheduling is not permitted here")


def test_a_session_hurries_its_thread_and_gives_it_back(victim: Victim) -> None:
    os.sched_setscheduler(victim.worker, os.SCHED_BATCH, os.sched_param(0))
    with RemoteThread("victim", victim.pid, victim.worker) as remote:
        assert os.sched_getscheduler(victim.worker) == URGENT
        remote.call(NR.GETPID)
    assert os.sched_getscheduler(victim.worker) == os.SCHED_BATCH
    assert os.sched_getscheduler(victim.busy) == os.SCHED_OTHER


def test_after_a_kill_the_next_session_gives_it_back(victim: Victim) -> None:
    def die() -> None:
        with RemoteThread("victim", victim.pid, victim.worker):
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork_and(die), 0)
    assert os.sched_getscheduler(victim.worker) == URGENT
    with RemoteThread("victim", victim.pid, victim.worker):
        pass
    assert os.sched_getscheduler(victim.worker) == os.SCHED_OTHER
    victim.require_healthy()


def test_without_the_privilege_nothing_changes_and_nothing_fails(victim: Victim) -> None:
    def unprivileged() -> None:
        os.setgid(65534)
        os.setuid(65534)
        before = os.sched_getscheduler(0)
        with urgent():
            assert os.sched_getscheduler(0) == before
        assert os.sched_getscheduler(0) == before

    assert os.waitpid(fork_and(unprivileged), 0)[1] == 0


class Member:
    """A thread of a company, until it is told to leave."""

    def __init__(self, company: Company) -> None:
        self._leaves, there = threading.Event(), threading.Event()

        def run() -> None:
            self.tid = threading.get_native_id()
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            with company.joined():
                there.set()
                self._leaves.wait()
            self.left_with = os.sched_getscheduler(0)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        there.wait()

    @property
    def policy(self) -> int:
        return os.sched_getscheduler(self.tid)

    def leave(self) -> int:
        self._leaves.set()
        self._thread.join()
        return self.left_with


def test_who_shares_the_lock_hurries_with_who_is_in_a_hurry() -> None:
    company = Company()
    first = Member(company)
    with company.joined():
        second = Member(company)
        with company.hurrying():
            late = Member(company)
            assert second.policy == URGENT
            assert [os.sched_getscheduler(0), first.policy, late.policy] == [URGENT] * 3
            with company.hurrying():
                pass
            assert first.policy == URGENT, "the first hurry is not over"
            assert late.leave() == os.SCHED_BATCH
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        assert [first.policy, second.policy] == [os.SCHED_BATCH] * 2
    assert first.leave() == second.leave() == os.SCHED_BATCH


def test_several_in_a_hurry_are_never_put_back_by_another() -> None:
    company = Company()
    failed: list[int] = []

    def hurry() -> None:
        with company.joined():
            for _ in range(500):
                with company.hurrying():
                    if os.sched_getscheduler(0) != URGENT:
                        failed.append(threading.get_native_id())
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            failed.append(threading.get_native_id())

    threads = [threading.Thread(target=hurry) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_who_shares_no_lock_hurries_alone() -> None:
    company = Company()
    member = Member(company)
    with company.hurrying():
        assert [os.sched_getscheduler(0), member.policy] == [URGENT, os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    member.leave()


def test_whether_it_is_permitted_is_found_out_by_trying() -> None:
    assert is_allowed()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    ask = [
        sys.executable,
        "-c",
        "from vmdedup.linux.realtime import is_allowed; print(is_allowed())",
    ]
    without = ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-all", *ask]
    said = subprocess.run(without, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert said.stdout == "False\n"
