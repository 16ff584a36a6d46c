"""Sketches of real VMs of two daemons, beside what is really in their memory."""

from __future__ import annotations

import secrets
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from tests.harness.kernel import ZERO_CONTENT, Area, ram_areas, snapshot
from tests.harness.vm import Vm
from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import (
    Daemon,
    Directories,
    assert_unharmed,
    merged,
    monitors,
    running,
    store_pages,
    wait_mergeable,
)
from vmdedup.client import ServiceConflictError, ServiceUsageError
from vmdedup.core.digest import zero_digest
from vmdedup.core.sketch import Sketch, shared_contents
from vmdedup.models import VmSketch

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

MIB = 16


@pytest.fixture
def two_hosts() -> Iterator[list[Directories]]:
    """Directories of two daemons that share nothing but, if a test says so, a secret."""
    with ExitStack() as exits:
        yield [exits.enter_context(Directories()) for _ in range(2)]


def with_secret(host: Directories, secret: str) -> None:
    """Have the host's next daemon use this secret."""
    file = host.base / "secret"
    file.write_text(f"{secret}\n")
    file.chmod(0o600)
    host.write(f'sketch_secret = "{file}"\n')


def sample(document: VmSketch) -> Sketch:
    mark = np.frombuffer(b64decode(document.marks), dtype="<u8").astype(np.uint64)
    pages = np.frombuffer(b64decode(document.pages), dtype="<u4").astype(np.uint32)
    return Sketch(document.key_id, document.rate, mark, pages)


def in_memory(vm: Vm, areas: list[Area]) -> set[bytes]:
    """The contents of a VM now, from its memory."""
    return set(snapshot(vm.pid, areas).contents) - {ZERO_CONTENT}


def test_two_hosts_with_a_secret_see_what_their_vms_have_in_common(
    two_hosts: list[Directories], start: Start
) -> None:
    for host in two_hosts:
        with_secret(host, "0123456789abcdef")
    vms = [start(SHARED), start(PRIVATE)]
    areas = [ram_areas(vm.pid, [MIB]) for vm in vms]
    with ExitStack() as exits:
        daemons = [
            exits.enter_context(running(host, *monitors(vm)))
            for host, vm in zip(two_hosts, vms, strict=True)
        ]
        found = []
        for daemon, vm in zip(daemons, vms, strict=True):
            wait_mergeable(daemon, vm)
            daemon.client.merge([vm.name], timeout_s=60)  # each alone: it has looked at all
            document = daemon.client.sketch(vm.name, rate=16)
            assert document.only_here is None
            assert (document.vm, document.pid, document.ram_bytes) == (vm.name, vm.pid, MIB << 20)
            found.append(document)
        assert found[0].key_id == found[1].key_id
        estimate = shared_contents(*map(sample, found))
        truth = len(set.intersection(*map(in_memory, vms, areas)))
        assert truth > 200
        # Two standard errors in 95 of 100 runs; four, so that the other 5 do not fail.
        assert abs(estimate.value - truth) <= 4 * estimate.error
        # One who is on the host sees the digests; nothing of the kind leaves it.
        assert zero_digest(0) not in sample(found[0]).mark.tolist()
        assert_unharmed(*vms)


def test_a_sketch_is_the_same_before_and_after_merging(
    directories: Directories, start: Start
) -> None:
    """A merged page counts by its published digest, also for an engine that came later."""
    with_secret(directories, "another secret of the fleet")
    vms = [start(SHARED), start(PRIVATE)]
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        before = [sample(daemon.client.sketch(vm.name, rate=16)) for vm in vms]
        share = shared_contents(*before).value
        assert share > 0
    assert min(map(store_pages, vms)) > 200
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        after = [sample(daemon.client.sketch(vm.name, rate=16)) for vm in vms]
        assert after[0].key_id == before[0].key_id
        again = shared_contents(*after)
        assert abs(again.value - share) <= 4 * again.error
        for one, other in zip(before, after, strict=True):
            common = len(np.intersect1d(one.mark, other.mark))
            assert common >= 0.8 * max(len(one), len(other))
        assert_unharmed(*vms)


def test_without_a_secret_or_with_a_wrong_one_hosts_cannot_be_compared(
    two_hosts: list[Directories], start: Start
) -> None:
    vms = [start(SHARED), start(SHARED)]
    ids = set()
    for has_secret in (False, True):
        for host, vm in zip(two_hosts, vms, strict=True):
            if has_secret:
                with_secret(host, secrets.token_hex(16))
            with running(host, *monitors(vm)) as daemon:
                wait_mergeable(daemon, vm)
                daemon.client.merge([vm.name], timeout_s=60)
                document = daemon.client.sketch(vm.name)
                ids.add(document.key_id)
                if not has_secret:
                    assert document.only_here == "no sketch_secret is set on this host"
                    refused(daemon, vm)
                daemon.client.set(run=2)  # the next daemon makes a store with its own seed
    assert len(ids) == 4


def refused(daemon: Daemon, vm: Vm) -> None:
    """What has no sketch is told in one line, and the next request works."""
    with pytest.raises(ServiceUsageError, match="nobody"):
        daemon.client.sketch("nobody")
    with pytest.raises(ServiceUsageError, match="power of two"):
        daemon.client.sketch(vm.name, rate=100)
    daemon.client.set(run=2)
    daemon.client.set(run=0, merge_across_nodes=0)
    with pytest.raises(ServiceConflictError, match="merge_across_nodes=0"):
        daemon.client.sketch(vm.name)
    daemon.client.set(run=2)
    daemon.client.set(merge_across_nodes=1)
    assert daemon.client.sketch(vm.name).vm == vm.name


def test_a_secret_that_others_may_read_is_refused(directories: Directories) -> None:
    file = directories.base / "secret"
    file.write_text("0123456789abcdef")
    directories.write(f'sketch_secret = "{file}"\n')
    config = str(directories.config)
    for mode, content, told in (
        (0o644, "0123456789abcdef", "chmod 600"),
        (0o600, "short", "16 to 4096 bytes"),
    ):
        file.write_text(content)
        file.chmod(mode)
        done = directories.verb("run", "--config", config, "--qmp", "/nowhere/*", code=2)
        assert "setting sketch_secret" in done.stderr
        assert told in done.stderr
        assert done.stderr.count("\n") == 1
