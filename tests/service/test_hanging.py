"""A VM whose storage or monitor does not answer, beside others, in a daemon."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.disk import write_image
from tests.harness.hanging import Storage, server_missing, stands_still
from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.vm import Vm
from tests.qemu.conftest import Boot
from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import (
    ALLOWANCE,
    Daemon,
    Directories,
    assert_unharmed,
    monitors,
    running,
    store_pages,
    wait_mergeable,
)
from vmdedup.attach.monitor import COMMAND_TIMEOUT_S

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

_READER = {"mib": 2, "rewrite_per_s": 32, "dma": 1, "dma_mib": 2, "dma_hold_ms": 100}


@pytest.fixture
def storage(need: Callable[[str | None], None], tmp_path: Path) -> Iterator[Storage]:
    need(root_missing() or server_missing("nbd"))
    with Storage("nbd", write_image(tmp_path / "image", mib=4), tmp_path) as served:
        yield served


def _reader(boot: Boot, storage: Storage) -> Vm:
    disk = ["-blockdev", storage.node("disk"), "-device", "virtio-blk-pci,drive=disk"]
    return boot(name="reader", parameters=_READER, extra=disk)


@contextmanager
def _frozen(vm: Vm) -> Iterator[None]:
    """QEMU waits with its big lock for requests that do not end: what a drain would do."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.connect(str(vm.test_qmp_path))
        connection.sendall(b'{"execute": "qmp_capabilities"}\n')
        connection.sendall(b'{"execute": "transaction", "arguments": {"actions": []}}\n')
        time.sleep(0.5)
        yield


def _is_said(daemon: Daemon, vm: Vm, words: str) -> bool:
    """Whether `vms` and `report` say it of the VM."""
    reports = [row.reason or "" for row in daemon.client.report().vms if row.pid == vm.pid]
    is_attached, listed = daemon.row_of(vm)
    return is_attached and words in (listed or "") and any(words in each for each in reports)


def _goes_on(daemon: Daemon, vm: Vm) -> bool:
    return daemon.row_of(vm) == (True, None) and store_pages(vm) > 100


def _tell_all(daemon: Daemon, others: list[Vm]) -> float:
    """Ask what may not be delayed; how long that took."""
    began = time.monotonic()
    daemon.client.set(sleep_millisecs=33)
    daemon.client.report(fresh=True)
    assert daemon.client.merge([vm.name for vm in others], timeout_s=60).converged
    daemon.client.set(sleep_millisecs=20)
    return time.monotonic() - began


def test_a_monitor_that_is_silent_delays_nobody(
    directories: Directories, boot: Boot, start: Start, storage: Storage
) -> None:
    reader = _reader(boot, storage)
    others = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(reader, *others)) as daemon:
        wait_mergeable(daemon, reader, *others)
        daemon.client.merge(timeout_s=60)
        before = store_pages(reader)
        assert before > 100
        alone_s = _tell_all(daemon, others)
        with storage.hung():
            assert becomes_true(lambda: stands_still(reader))
            with _frozen(reader):
                assert _tell_all(daemon, others) < COMMAND_TIMEOUT_S + 2 * alone_s
                assert becomes_true(
                    lambda: _is_said(daemon, reader, "does not answer since"), 4 * ALLOWANCE
                )
                # Now that it is known nobody waits for it once more.
                assert _tell_all(daemon, others) < COMMAND_TIMEOUT_S / 2 + 2 * alone_s
                assert daemon.client.unmerge([others[0].name]).vms[0].remaining_pages == 0
                assert daemon.client.merge(timeout_s=60).converged
        assert becomes_true(lambda: _goes_on(daemon, reader), 6 * ALLOWANCE)
        assert daemon.happened("dropped") == []
        assert "does not answer since" in daemon.happened("waits")[0]
        assert len(daemon.happened("goes-on")) == 1
        assert daemon.client.merge(timeout_s=60).converged
        assert_unharmed(reader, *others)


def test_storage_that_hangs_is_said_and_delays_nobody(
    directories: Directories, boot: Boot, start: Start, storage: Storage
) -> None:
    reader = _reader(boot, storage)
    others = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(reader, *others)) as daemon:
        wait_mergeable(daemon, reader, *others)
        alone_s = _tell_all(daemon, others)
        daemon.client.unmerge()
        with storage.hung():
            assert becomes_true(lambda: stands_still(reader))
            assert daemon.client.merge(timeout_s=120).converged
            assert _is_said(daemon, reader, "not end since")
            assert min(map(store_pages, others)) > 200
            assert _tell_all(daemon, others) < COMMAND_TIMEOUT_S / 2 + 2 * alone_s
            checks = reader.status().checks
            assert becomes_true(lambda: reader.status().checks > checks)
            assert qmp(reader.test_qmp_path, "query-status")["status"] == "running"
        assert becomes_true(lambda: _goes_on(daemon, reader), 6 * ALLOWANCE)
        assert "not end since" in daemon.happened("waits")[0]
        assert daemon.happened("goes-on") != []
        assert daemon.happened("dropped") == []
        assert_unharmed(reader, *others)
