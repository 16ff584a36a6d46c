"""When something runs out: a clean partial result, its reason, and the retry works."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true, mappings
from tests.harness.limits import (
    MemoryGroup,
    limited,
    memory_group_missing,
    open_count,
    private_bytes,
    resize_tmpfs,
    small_tmpfs,
    swap,
    swap_missing,
    swapped_bytes,
)
from tests.harness.monitor import qmp
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, assert_nothing_of_ours, attached, boot_fleet
from vmdedup import faults
from vmdedup.errors import VmdedupError
from vmdedup.linux.syscalls import process_madvise
from vmdedup.remap.merge_vm import Planned, ReadyVm, merge_vm

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

Need = Callable[[str | None], None]

HELD: dict[str, Any] = {"mib": 8, "hold": 1, "run_pages": 2, "check_per_s": 16384}
SHARED = Backend("memfd", mib=24)
PRIVATE = Backend("ram", share=False, mib=24)
_MADV_PAGEOUT = 21


@pytest.fixture(autouse=True)
def _no_hook(need: Need) -> Iterator[None]:
    need(root_missing())
    yield
    faults.hook = None


def unharmed(members: list[Member]) -> None:
    for member in members:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0, member.vm.serial.complaints()


def at(step: str, action: Callable[[], object], occurrence: int = 0) -> None:
    """Have `action` done when a step is reached for that time."""
    seen = 0

    def hook(reached: str) -> None:
        nonlocal seen
        if reached == step:
            if seen == occurrence:
                action()
            seen += 1

    faults.hook = hook


def test_a_full_store_shares_what_it_holds_and_goes_on_when_there_is_room(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    much = {**HELD, "mib": 16, "shared_mib": 8, "repeat_mib": 2, "zero_mib": 2}
    backends = [Backend("memfd", mib=32), Backend("ram", share=False, mib=32)]
    members = boot_fleet(boot, backends, parameters=much)
    with small_tmpfs(tmp_path / "vmdedup", 6 << 10) as path:
        own = settings(store_dir=path / "store", controls={"use_zero_pages": 0})
        with attached(own, members) as dedup:
            full = dedup.run(passes=3)
            assert all("No space left" in (row.reason or "") for row in full.vms), full.vms
            assert full.host.pages_shared > 0
            assert dedup.verify().ok
            unharmed(members)
            resize_tmpfs(path, 32 << 10)
            roomy = dedup.run(passes=2)
            assert [row.reason for row in roomy.vms] == [None, None]
            assert roomy.host.pages_shared > full.host.pages_shared
            assert dedup.verify().ok
            assert dedup.unmerge().store_removed
    for member in members:
        assert_nothing_of_ours(member)
    unharmed(members)


_ENGINE = """
import json, sys
from vmdedup.deduplicator import Deduplicator
from vmdedup.settings import Settings
sys.stdin.readline()
with Deduplicator(Settings(**json.loads(sys.argv[1]))) as dedup:
    dedup.attach(json.loads(sys.argv[2]))
    for line in sys.stdin:
        done = dedup.run(passes=2) if line.strip() == "run" else dedup.unmerge()
        print(done.model_dump_json(), flush=True)
"""


def test_limits_of_our_own_cgroup_are_kept(settings: MakeSettings, boot: Boot, need: Need) -> None:
    """Store pages and, at the unmerge, pages of RAM files are charged to the engine."""
    import json

    need(memory_group_missing())
    members = boot_fleet(boot, [SHARED, SHARED], parameters={**HELD, "unique": 0, "mib": 12})
    own = settings(controls={"use_zero_pages": 0}).model_dump(mode="json")
    sockets = [str(member.vm.qmp_path) for member in members]
    with MemoryGroup() as group:
        engine = subprocess.Popen(
            [sys.executable, "-c", _ENGINE, json.dumps(own), json.dumps(sockets)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert engine.stdin is not None
        assert engine.stdout is not None

        def ask(word: str) -> dict[str, Any]:
            assert engine.stdin is not None
            assert engine.stdout is not None
            engine.stdin.write(word + "\n")
            engine.stdin.flush()
            line = engine.stdout.readline()
            assert line, "the engine was killed"
            answer: dict[str, Any] = json.loads(line)
            return answer

        try:
            group.add(engine.pid)
            engine.stdin.write("go\n")
            engine.stdin.flush()
            assert ask("run")["host"]["pages_shared"] > 0
            group.set_limit(group.used_bytes + (17 << 20))
            kept = ask("unmerge")
            reasons = [row["reason"] or "" for row in kept["vms"]]
            assert any(row["remaining_pages"] for row in kept["vms"])
            assert any("may be taken of cgroup" in reason for reason in reasons), reasons
            unharmed(members)
            assert group.kills == 0
            group.set_limit(None)
            assert ask("unmerge")["store_removed"]
            assert group.kills == 0
        finally:
            engine.stdin.close()
            engine.stdout.close()
            engine.kill()
            engine.wait()
    for member in members:
        assert_nothing_of_ours(member)
    unharmed(members)


def test_a_store_that_does_not_fit_our_cgroup_waits(
    settings: MakeSettings, boot: Boot, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(memory_group_missing())
    members = boot_fleet(boot, [SHARED, SHARED], parameters=HELD)
    with MemoryGroup() as group, attached(settings(), members) as dedup:
        group.add(os.getpid())
        group.set_limit(group.used_bytes + (12 << 20))
        scarce = dedup.run(passes=2)
        assert all("leaves us" in (row.reason or "") for row in scarce.vms), scarce.vms
        assert group.kills == 0
        group.set_limit(None)
        ample = dedup.run(passes=1)
        assert [row.reason for row in ample.vms] == [None, None]
        assert ample.host.pages_shared > 0
        dedup.unmerge()
    unharmed(members)


def test_limits_of_the_vms_cgroup_are_kept(settings: MakeSettings, boot: Boot, need: Need) -> None:
    need(memory_group_missing())
    members = boot_fleet(boot, [PRIVATE, PRIVATE], parameters=HELD)
    first = members[0]
    with MemoryGroup() as group, attached(settings(), members) as dedup:
        group.add(first.pid)
        group.set_limit(group.used_bytes + (512 << 10))
        full = dedup.run(passes=2)
        row = next(row for row in full.vms if row.name == first.name)
        assert "is full" in (row.reason or "")
        assert row.merged_pages == 0

        group.set_limit(group.used_bytes + (64 << 20))
        merged = dedup.run(passes=2)
        assert all(row.merged_pages for row in merged.vms)
        group.set_limit(group.used_bytes + (17 << 20))
        kept = dedup.unmerge([first.name]).vms[0]
        assert kept.restored_pages > 0
        assert kept.remaining_pages > 0
        assert "may be taken of cgroup" in (kept.reason or "")
        unharmed(members)
        assert dedup.verify().ok
        assert group.kills == 0

        group.set_limit(None)
        assert [row.remaining_pages for row in dedup.unmerge().vms] == [0, 0]
        assert group.kills == 0
    for member in members:
        assert_nothing_of_ours(member)
    unharmed(members)


@pytest.mark.parametrize("step", ["verified", "burst-verified"])
@pytest.mark.parametrize("which", ["VMAs", "data"])
def test_mappings_that_fail_in_the_middle_of_a_batch(
    settings: MakeSettings, boot: Boot, monkeypatch: pytest.MonkeyPatch, which: str, step: str
) -> None:
    """RLIMIT_DATA counts each private mapping over share=on RAM; RLIMIT_AS fails them all."""
    members = boot_fleet(boot, [SHARED, SHARED], parameters=HELD)
    first = members[0]
    kind = resource.RLIMIT_DATA if which == "data" else resource.RLIMIT_AS
    before = resource.prlimit(first.pid, kind)
    mine = threading.local()

    def merging(ready: ReadyVm, plan: Planned) -> None:
        mine.pid = ready.vm.pid
        merge_vm(ready, plan)

    def hook(reached: str) -> None:
        if getattr(mine, "pid", None) != first.pid:
            return
        if reached == step:
            soft = private_bytes(first.pid) + (60 << 10) if which == "data" else 1 << 20
            resource.prlimit(first.pid, kind, (soft, before[1]))
        elif reached == "gate-done":
            resource.prlimit(first.pid, kind, before)

    monkeypatch.setattr("vmdedup.engine.domain_merge.merge_vm", merging)
    mask = frozenset({"compiled-gates"} if step == "verified" else ())
    with attached(settings(gate_runs=16, mask=mask), members) as dedup:
        faults.hook = hook
        failed = dedup.run(passes=2)
        faults.hook = None
        row = next(row for row in failed.vms if row.name == first.name)
        assert "Cannot allocate memory" in (row.reason or ""), row
        assert all(row.status != "gone" for row in failed.vms)
        assert dedup.verify().ok
        unharmed(members)
        merged = dedup.run(passes=2)
        assert [row.reason for row in merged.vms] == [None, None]
        assert all(row.merged_pages for row in merged.vms)
        assert dedup.unmerge().store_removed
    unharmed(members)


@pytest.mark.parametrize("backend", [SHARED, PRIVATE], ids=["shared", "private"])
def test_mappings_that_fail_in_an_unmerge(
    settings: MakeSettings, boot: Boot, backend: Backend
) -> None:
    members = boot_fleet(boot, [backend, backend], parameters=HELD)
    first = members[0]
    before = resource.prlimit(first.pid, resource.RLIMIT_AS)
    step = "checked" if backend is SHARED else "inject-opened"
    with attached(settings(), members) as dedup:
        dedup.run(passes=2)
        at(
            step,
            lambda: resource.prlimit(first.pid, resource.RLIMIT_AS, (1 << 20, before[1])),
        )
        failed = dedup.unmerge([first.name]).vms[0]
        faults.hook = None
        resource.prlimit(first.pid, resource.RLIMIT_AS, before)
        assert failed.remaining_pages > 0
        assert "Cannot allocate memory" in (failed.reason or ""), failed
        assert "RLIMIT_AS" in (failed.reason or ""), failed
    unharmed(members)
    with attached(settings(), members) as dedup:
        assert dedup.verify().ok
        assert [row.remaining_pages for row in dedup.unmerge().vms] == [0, 0]
    for member in members:
        assert_nothing_of_ours(member)
    unharmed(members)


def test_at_its_most_mappings_a_vm_can_still_map(settings: MakeSettings, boot: Boot) -> None:
    """With the budget used up QEMU plugs memory in, and its guest can be dumped."""
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    alternate = {"mib": 8, "hold": 1, "run_pages": 1, "check_per_s": 16384}
    (member,) = boot_fleet(
        boot, [PRIVATE], parameters=alternate, extra=["-m", "24M,slots=2,maxmem=256M"]
    )
    used = len(mappings(member.pid))
    own = settings(vma_headroom=max(256, most - used - 400))
    with attached(own, [member]) as dedup:
        report = dedup.run(passes=3)
        (row,) = report.vms
        assert row.deferred_pages
        assert row.needed_max_map_count is not None
        assert len(mappings(member.pid)) <= most - own.vma_headroom
        qmp(member.vm.test_qmp_path, "dump-guest-memory", paging=False, protocol="file:/dev/null")
        qmp(
            member.vm.test_qmp_path,
            "object-add",
            **{"qom-type": "memory-backend-ram", "id": "more", "size": 128 << 20},
        )
        qmp(member.vm.test_qmp_path, "device_add", driver="pc-dimm", id="dimm", memdev="more")
        assert dedup.verify().ok
        dedup.unmerge()
    unharmed([member])


def test_a_vm_without_free_descriptors(settings: MakeSettings, boot: Boot) -> None:
    members = boot_fleet(boot, [SHARED, PRIVATE], parameters=HELD)
    first = members[0]
    reasons = set()
    with attached(settings(), members) as dedup:
        for spare in range(6):
            with limited(first.pid, resource.RLIMIT_NOFILE, open_count(first.pid) + spare):
                report = dedup.run(passes=2)
                row = next(row for row in report.vms if row.name == first.name)
                assert row.status != "gone", row
                reasons.add(row.reason)
                assert all(each.reason is None for each in report.vms if each is not row)
                assert dedup.verify().ok
        assert any(reasons - {None}), "nothing ran out"
        recovered = dedup.run(passes=2)
        assert [row.reason for row in recovered.vms] == [None, None]
        assert all(row.merged_pages for row in recovered.vms)
        assert dedup.unmerge().store_removed
    assert_nothing_of_ours(first)
    unharmed(members)


def test_an_engine_without_free_descriptors(settings: MakeSettings, boot: Boot) -> None:
    """Wherever the next descriptor is refused: a reason, no traceback, and a retry that works."""
    members = boot_fleet(boot, [SHARED, PRIVATE], parameters=HELD)
    failures = set()
    for spare in range(0, 24, 2):
        own = settings()
        with attached(own, members) as dedup:
            if spare % 3 == 0:
                dedup.run(passes=1)
            with limited(os.getpid(), resource.RLIMIT_NOFILE, _limit_for(spare)):
                for work in (lambda: dedup.run(passes=1), dedup.unmerge):
                    try:
                        result: Any = work()
                    except VmdedupError as error:
                        failures.add(str(error))
                    else:
                        failures |= {row.reason for row in result.vms if row.reason}
        for member in members:
            assert member.run_state() == "running"
    assert failures, "nothing ran out"
    print(failures)
    with attached(settings(), members) as dedup:
        dedup.run(passes=2)
        assert dedup.verify().ok
        assert dedup.unmerge().store_removed
    for member in members:
        assert_nothing_of_ours(member)
    unharmed(members)


def _limit_for(spare: int) -> int:
    """The limit below which so many descriptor numbers are free."""
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in range(1 << 16) if number not in used)
    return next(number for number, _ in zip(free, range(spare + 1), strict=False) if _ == spare)


@pytest.mark.alone
@pytest.mark.parametrize("backend", [PRIVATE, SHARED], ids=["private", "shared"])
def test_guests_that_are_swapped_out_while_merged(
    settings: MakeSettings, boot: Boot, need: Need, backend: Backend
) -> None:
    need(swap_missing())
    rewriting = {"mib": 8, "rewrite_per_s": 2000, "check_per_s": 16384}
    members = boot_fleet(boot, [backend, backend], parameters=rewriting)
    with swap(), attached(settings(), members) as dedup:
        dedup.run(passes=2)
        assert becomes_true(lambda: any(row.cow_broken_pages for row in dedup.report().vms))
        for member in members:
            qmp(member.vm.test_qmp_path, "stop")
            page_out(member)
        swapped = [swapped_bytes(member.pid) for member in members]
        print("swapped", swapped)
        assert all(swapped)
        assert [row.wrong_pages for row in dedup.verify().vms] == [0, 0]
        dedup.run(passes=1)
        for member in members:
            page_out(member)
        assert [row.remaining_pages for row in dedup.unmerge([members[0].name]).vms] == [0]
        for member in members:
            qmp(member.vm.test_qmp_path, "cont")
        unharmed(members)
        dedup.run(passes=3)
        for member in members:
            page_out(member)
        unharmed(members)
        dedup.run(passes=2)
        assert dedup.verify().ok
        assert [row.remaining_pages for row in dedup.unmerge().vms] == [0, 0]
    for member in members:
        assert_nothing_of_ours(member)
    unharmed(members)


def page_out(member: Member) -> None:
    """Have the kernel reclaim the VM's RAM, as it would under pressure."""
    pidfd = os.pidfd_open(member.pid)
    try:
        for mapping in member.mappings():
            process_madvise(pidfd, [(mapping.start, mapping.end - mapping.start)], _MADV_PAGEOUT)
    finally:
        os.close(pidfd)
