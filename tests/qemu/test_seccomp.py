"""System call filters of real QEMUs, and the list of calls that is put to them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.filters import ALLOW, KILL, answers
from tests.harness.images import REPOSITORY
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings, Need
from tests.qemu.fleet import EVERY_BACKEND, attached, boot_fleet, merge
from vmdedup.deduplicator import Deduplicator
from vmdedup.inject.borrow import BorrowedThread
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import RemoteThread
from vmdedup.inject.seccomp import CALLS
from vmdedup.linux.syscalls import NR

pytestmark = pytest.mark.qemu

QUICK = {"mib": 4, "check_per_s": 8192}
NOBODY = 65534

# Runs what follows on its command line under a filter: the first argument, in hex.
UNDER_A_FILTER = """
import os, sys
from tests.harness.filters import install
install(bytes.fromhex(sys.argv[1]))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def filtered_qemu(folder: Path, code: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a QEMU that is started runs under this filter."""
    path = os.environ["PATH"]
    program = folder / "qemu-system-x86_64"
    program.write_text(
        f"#!/bin/sh\nPATH={path}\nexport PYTHONPATH={REPOSITORY}\n"
        f"exec {sys.executable} -c '{UNDER_A_FILTER}' {code.hex()} qemu-system-x86_64 \"$@\"\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{path}")


def test_a_vm_whose_filter_would_kill_is_refused_and_the_others_are_merged(
    settings: MakeSettings, boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [Backend(mib=16), Backend(mib=16)]
    free = boot_fleet(boot, two, prefix="free-", parameters=QUICK)
    with monkeypatch.context() as patch:
        filtered_qemu(tmp_path, answers({NR.MBIND: KILL}, ALLOW), patch)
        (bound,) = boot_fleet(boot, two[:1], prefix="bound-", parameters=QUICK)
    with Deduplicator(settings()) as dedup:
        listing = dedup.attach([str(member.vm.qmp_path) for member in [bound, *free]])
        rows = {row.name: row for row in listing.vms}
        assert not rows[bound.name].mergeable
        assert "answers mbind with KILL_PROCESS" in (rows[bound.name].reason or "")
        report = dedup.run(until_converged=True, timeout_s=20)
        assert {vm.name: vm.status for vm in report.vms} == {
            bound.name: "refused",
            **{member.name: "merged" for member in free},
        }
    for member in [bound, *free]:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


@pytest.mark.both_qemus
@pytest.mark.parametrize("own_filter", [False, True])
def test_qemus_own_sandbox_is_no_hindrance(
    own_filter: bool, settings: MakeSettings, boot: Boot, need: Need
) -> None:
    """Its filter is read; where we are under one ourselves, the command line tells."""
    need(root_missing())
    fleet = boot_fleet(
        boot, [Backend(mib=16), Backend(mib=16)], sandbox=True, uid=NOBODY, parameters=QUICK
    )
    for member in fleet:
        assert "Seccomp_filters:\t1" in Path(f"/proc/{member.pid}/status").read_text()
    if own_filter:
        outcome = run_filtered(settings, [str(member.vm.qmp_path) for member in fleet])
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        assert all(any(m.is_store for m in member.mappings()) for member in fleet)
    else:
        report = merge(settings(), fleet)
        assert [vm.status for vm in report.vms] == ["merged", "merged"]
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def run_filtered(
    settings: MakeSettings, monitors: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    """`vmdedup run --once` under a filter that lets everything through."""
    own = settings()
    program = [str(Path(sys.executable).parent / "vmdedup"), "run", "--once"]
    program += [f"--qmp={path}" for path in monitors]
    directories = {
        "VMDEDUP_RUNTIME_DIR": str(own.runtime_dir),
        "VMDEDUP_STORE_DIR": str(own.store_dir),
    }
    return subprocess.run(
        [sys.executable, "-c", UNDER_A_FILTER, answers({}, ALLOW).hex(), *program],
        cwd=REPOSITORY,
        env={**os.environ, **directories},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_call_that_a_session_runs_is_on_the_list(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merge and unmerge of each kind of memory, by stub and by chain, live and while stopped."""
    seen: set[tuple[int, ...]] = set()
    stack, launch = BorrowedThread.run_on_stack, RemoteThread.launch

    def on_stack(self: BorrowedThread, calls: npt.NDArray[np.uint64], data: bytes = b"") -> None:
        seen.update(map(tuple, calls.tolist()))
        stack(self, calls, data)

    def launched(
        self: RemoteThread,
        calls: npt.NDArray[np.uint64],
        floors: npt.NDArray[np.int64] | None = None,
        guard: Guard | None = None,
        *,
        keep: bool = False,
    ) -> None:
        seen.update(map(tuple, calls.tolist()))
        launch(self, calls, floors, guard, keep=keep)

    monkeypatch.setattr(BorrowedThread, "run_on_stack", on_stack)
    monkeypatch.setattr(RemoteThread, "launch", launched)
    numa = Backend("memfd", mib=16, options="policy=bind,host-nodes=0,dump=off")
    fleet = boot_fleet(boot, [*EVERY_BACKEND, numa, numa], parameters=QUICK)
    for masked in ({"compiled-gates"}, {"compiled-gates", "stub"}):
        with attached(settings(mask=frozenset(masked)), fleet) as dedup:
            report = dedup.run(until_converged=True, timeout_s=40)
            assert {vm.status for vm in report.vms} == {"merged"}
            assert dedup.unmerge().store_removed
    rows = [row for row in seen if row[0] < 1 << 63]  # the others read pages in place
    assert {NR.MMAP, NR.MREMAP, NR.MADVISE, NR.MBIND, NR.USERFAULTFD} <= {row[0] for row in rows}
    for row in rows:
        assert any(call.covers(row) for call in CALLS), row
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0
