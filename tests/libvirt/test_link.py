"""The connection to libvirt while calls are stuck."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.libvirtd import Domain, Libvirtd
from tests.libvirt.conftest import Start
from vmdedup.attach.libvirt.link import LibvirtLink, bindings

pytestmark = pytest.mark.libvirt

_TIMEOUT_S = 20.0


@contextmanager
def standing_still(domain: Domain) -> Iterator[None]:
    """Its QEMU answers nobody in the block."""
    os.kill(domain.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(domain.pid, signal.SIGCONT)


def test_no_call_shares_the_connection_of_a_stuck_one(libvirtd: Libvirtd, start: Start) -> None:
    """Two calls on one connection can crash the process inside libvirt's client."""
    _, libvirt_qemu = bindings()
    stuck, other = start("stuck"), start("other")
    used: list[Any] = []
    ended = threading.Event()

    def ask(domain: Any) -> str:
        used.append(domain.connect())
        return str(libvirt_qemu.qemuMonitorCommand(domain, '{"execute": "query-status"}', 0))

    def ask_and_tell(domain: Any) -> str:
        try:
            return ask(domain)
        finally:
            ended.set()

    with LibvirtLink(libvirtd.uri) as link:
        link.connect(_TIMEOUT_S)
        with standing_still(stuck):
            with pytest.raises(TimeoutError):
                link.call_domain(stuck.uuid, ask_and_tell, 0.5)
            assert link.outage is None, "its daemon answers"
            for _ in range(3):
                assert "running" in link.call_domain(other.uuid, ask, _TIMEOUT_S)
            assert not ended.is_set()
            assert used[0] not in used[1:]
            assert len(set(map(id, used))) == 2, "the others took turns on one"
        assert ended.wait(_TIMEOUT_S)
        # It is free again, and the first to be taken, as it hears of events.
        assert becomes_true(lambda: link.call(lambda connection: connection is used[0], _TIMEOUT_S))
