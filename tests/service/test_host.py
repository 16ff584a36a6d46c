"""What registering says of the host, in madvise's words: EINVAL, EAGAIN, ENOMEM."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.vm import Backend, Vm
from tests.service.conftest import PRIVATE, Start
from tests.service.daemon import Daemon, Directories, assert_unharmed, merged, monitors, running
from vmdedup.client import ServiceBusyError, ServiceUsageError

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

BIG_BYTES = 64 << 30
"""Needs 224 MiB of rows; it is sparse, and never plugged into the guest."""
ROOM_BYTES = 64 << 20

DENIED = """
import ctypes, struct, sys
from vmdedup.cli.main import main
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER, PTRACE, EPERM = 38, 22, 2, 101, 1
LOAD, EQUAL, RETURN, ALLOW, ERRNO = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
rows = [(LOAD, 0, 0, 0), (EQUAL, 0, 1, PTRACE)]
rows += [(RETURN, 0, 0, ERRNO | EPERM), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
program = struct.pack("HxxxxxxP", len(rows), ctypes.addressof(code))
prctl = ctypes.CDLL(None).prctl
prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
buffer = ctypes.create_string_buffer(program)
assert prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.addressof(buffer), 0, 0) == 0
main()
"""
"""The command in a sandbox that denies ptrace, as some container runtimes do."""


def listed(daemon: Daemon, vm: Vm) -> bool:
    return vm.name in daemon.names()


def test_a_host_that_denies_ptrace_can_not_merge(directories: Directories, start: Start) -> None:
    vm = start([PRIVATE, Backend("memfd", share=True, mib=16, merge=False)])
    with running(directories, *monitors(vm), program=DENIED) as daemon:
        for backend in ("ram0", "ram1"):
            with pytest.raises(ServiceUsageError, match=r"ptrace.* \(EINVAL\)") as refused:
                daemon.client.register(vm.name, backend)
            assert refused.value.status == 422
        line = directories.verb("register", vm.name, "ram1", code=2).stderr
        assert "this host cannot merge" in line
        assert daemon.happened("registered") == []
        assert_unharmed(vm)
    with running(directories, *monitors(vm)) as daemon:
        assert becomes_true(lambda: listed(daemon, vm), 10)
        assert daemon.client.register(vm.name, "ram1").complete


def test_a_host_without_a_place_for_the_store_can_not_merge(
    directories: Directories, start: Start, tmp_path: Path
) -> None:
    vm = start()
    text = directories.config.read_text().replace(str(directories.store), str(tmp_path / "store"))
    directories.config.write_text(text)
    with running(directories, *monitors(vm)) as daemon:
        with pytest.raises(ServiceUsageError, match="not on tmpfs"):
            daemon.client.register(vm.name, "ram0")
        assert any("not on tmpfs" in line for line in daemon.happened("failed"))
        assert_unharmed(vm)


def test_too_little_memory_now_is_told_and_the_next_try_works(
    directories: Directories, start: Start
) -> None:
    """The daemon's own limit stands in for a host whose memory is used up."""
    vm = start()
    big = {"qom-type": "memory-backend-memfd", "id": "big", "size": BIG_BYTES, "merge": False}
    qmp(vm.test_qmp_path, "object-add", **big, share=True)
    with running(directories, *monitors(vm)) as daemon:
        merged(daemon, vm)
        daemon.client.set(run=0)
        statm = Path(f"/proc/{daemon.process.pid}/statm").read_text().split()
        room = int(statm[0]) * 4096 + ROOM_BYTES
        _, most = resource.prlimit(daemon.process.pid, resource.RLIMIT_AS)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_AS, (room, most))
        with pytest.raises(ServiceBusyError, match=r"try again later .*\(EAGAIN\)") as refused:
            daemon.client.register(vm.name, "big")
        assert refused.value.status == 503
        assert "EAGAIN" in directories.verb("register", vm.name, "big", code=1).stderr
        assert daemon.happened("registered") == []
        part = daemon.client.register(vm.name, "big", length_bytes=1 << 30)
        assert [it.length_bytes for it in part.registered] == [1 << 30]

        resource.prlimit(daemon.process.pid, resource.RLIMIT_AS, (most, most))
        done = daemon.client.register(vm.name, "big")
        assert [it.length_bytes for it in done.registered] == [BIG_BYTES]
        daemon.client.set(run=1)
        assert_unharmed(vm)


def test_a_hole_in_the_range_is_told_and_the_rest_is_registered(
    directories: Directories, start: Start
) -> None:
    vm = start([PRIVATE, Backend("memfd", share=True, mib=16, merge=False)])
    with running(directories, *monitors(vm)) as daemon:
        assert becomes_true(lambda: listed(daemon, vm), 10)
        beyond = ["--offset", str(15 << 20), "--length", str(4 << 20)]
        done = directories.verb("register", vm.name, "ram1", *beyond)
        assert f"{16 << 20:#x}+{3 << 20:#x} left out" in done.stderr
        assert "ENOMEM" in done.stderr
        assert f"{15 << 20:#x}+{1 << 20:#x}" in done.stdout
        assert_unharmed(vm)
