"""Looks at all contents through the daemon: their counts, and what goes on meanwhile."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.kernel import ZERO_CONTENT, Area, becomes_true, ram_areas, snapshot
from tests.harness.vm import Vm
from tests.qemu.test_analyze import PAGE, pause
from tests.qemu.test_content_sources import digests_of
from tests.service.conftest import PRIVATE, SHARED, Start, over
from tests.service.daemon import (
    ALLOWANCE,
    Daemon,
    Directories,
    assert_unharmed,
    merged,
    monitors,
    running,
    wait_mergeable,
)
from vmdedup.client import ServiceBusyError, ServiceError, ServiceUsageError
from vmdedup.deduplicator import Deduplicator
from vmdedup.linux import capabilities
from vmdedup.linux.capabilities import Capability
from vmdedup.models import ContentSources, SharingReport
from vmdedup.settings import Settings

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

MIB = 16
SLOW_FILES, SLOW_BYTES = 50, 48 << 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the daemon's cache; it is in a unit."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CACHE_DIRECTORY", str(folder))
    return folder


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def some_pages(vm: Vm, areas: list[Area], number: int) -> bytes:
    """Some contents of the VM's memory, one page of each."""
    found: dict[bytes, bytes] = {}
    with Path(f"/proc/{vm.pid}/mem").open("rb") as memory:
        for area in areas:
            for at in range(area.start, area.end, PAGE):
                memory.seek(at)
                page = memory.read(PAGE)
                if any(page) and len(found) < number:
                    found.setdefault(page, page)
    assert len(found) == number
    return b"".join(found)


def map_all(vm: Vm, areas: list[Area]) -> None:
    """Have every page in the page table: a merged one that nobody has read since is not."""
    with Path(f"/proc/{vm.pid}/mem").open("rb") as memory:
        for area in areas:
            memory.seek(area.start)
            memory.read(area.end - area.start)


def slow_files(tmp_path: Path) -> list[str]:
    """Files that take some seconds to be digested, each anew."""
    content = os.urandom(1 << 20) * (SLOW_BYTES >> 20)
    first = tmp_path / "slow0"
    first.write_bytes(content)
    names = [tmp_path / f"slow{number}" for number in range(SLOW_FILES)]
    for name in names[1:]:
        os.link(first, name)
    return [str(name) for name in names]


def counting_process(daemon: Daemon) -> int | None:
    """The pid of the engine's child that counts."""
    for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                if b"content_count" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
            except FileNotFoundError:
                continue
    return None


def waits(condition: Callable[[], object]) -> None:
    assert becomes_true(lambda: bool(condition()), 10 * ALLOWANCE)


def test_counts_are_those_of_another_reading(
    directories: Directories, start: Start, tmp_path: Path, own_cache: Path
) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    for vm in vms:
        vm.wait_ready()
    areas = [ram_areas(vm.pid, [MIB]) for vm in vms]
    known = tmp_path / "known"
    known.write_bytes(some_pages(vms[0], areas[0], 60))
    wanted = digests_of(known)
    with running(directories, *monitors(*vms)) as daemon:
        merged(daemon, *vms)
        for vm, area in zip(vms, areas, strict=True):
            pause(vm)
            map_all(vm, area)
        held = [snapshot(vm.pid, area).contents for vm, area in zip(vms, areas, strict=True)]
        times = Counter(each for mine in held for each in mine if each != ZERO_CONTENT)
        found = daemon.client.content_sources([known])
        assert [(each.path, each.kind) for each in found.known] == [(str(known), "disk image")]
        assert found.shared_pages == sum(number for number in times.values() if number > 1)
        by_name = {told.name: told for told in found.vms}
        assert len(by_name) == len(vms)
        for vm, mine in zip(vms, held, strict=True):
            told = by_name[vm.name]  # the daemon attaches in an order of its own
            pages = sum(row.shared_pages + row.unique_pages for row in told.sources)
            assert pages == len([each for each in mine if each != ZERO_CONTENT])
            rows = [row for row in told.sources if row.source is not None]
            pages = sum(row.shared_pages + row.unique_pages for row in rows)
            assert pages == sum(each in wanted for each in mine)
        assert sum(each in wanted for each in held[0]) > 20
        assert list((own_cache / "known").iterdir())

        sharing = daemon.client.compare_with_ksm()
        assert sharing.ksm is not None
        assert sharing.host.saved_bytes > 0
        words = ["--contents", "--known", str(known), "--json"]
        asked = ContentSources.model_validate_json(directories.verb("explain", *words).stdout)
        assert asked == found
        words = ["--compare", "KSM", "--known", str(known), "--format", "json"]
        both = SharingReport.model_validate_json(directories.verb("report", *words).stdout)
        assert (both.ksm, both.sources) == (sharing.ksm, found)
        assert daemon.end() >= 0
    settings = Settings(runtime_dir=directories.runtime, store_dir=directories.store)
    with Deduplicator(settings) as dedup:
        monitor_of = {vm.name: str(vm.qmp_path) for vm in vms}
        dedup.attach([monitor_of[told.name] for told in found.vms], merging=False)
        assert dedup.compare_with_ksm().ksm == sharing.ksm


def test_the_daemon_goes_on_while_one_counts(
    directories: Directories, start: Start, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    vms = [start(SHARED), start(PRIVATE)]
    slow = slow_files(tmp_path)
    with running(directories, *monitors(*vms)) as daemon:
        wait_mergeable(daemon, *vms)
        asked = pool.submit(daemon.client.content_sources, slow)
        waits(lambda: counting_process(daemon))
        with pytest.raises(ServiceBusyError, match=r"another look"):
            daemon.client.compare_with_ksm()
        report = daemon.client.merge(timeout_s=60)
        assert report.converged
        assert report.host.saved_bytes > 0
        assert not asked.done(), "too fast to show anything: make SLOW_FILES larger"
        child = counting_process(daemon)
        assert child is not None
        # It gives up the others when it has read its program.
        waits(lambda: capabilities_of(child) == {Capability.DAC_OVERRIDE})
        assert set(capabilities.COUNTING) == {Capability.DAC_OVERRIDE}
        assert becomes_true(lambda: os.getpriority(os.PRIO_PROCESS, child) > 0, 10)
        found = asked.result(timeout=200)
        assert len(found.known) == SLOW_FILES
        assert {vm.name for vm in found.vms} == {vm.name for vm in vms}
        assert counting_process(daemon) is None
        assert_unharmed(*vms)


def capabilities_of(pid: int) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("CapEff:"))
    return {number for number in range(64) if int(line.split()[1], 16) >> number & 1}


def test_a_killed_count_is_an_error_and_the_next_one_works(
    directories: Directories, start: Start, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    vm = start(SHARED)
    slow = slow_files(tmp_path)
    with running(directories, *monitors(vm)) as daemon:
        wait_mergeable(daemon, vm)
        asked = pool.submit(daemon.client.content_sources, slow)
        child = killed_count(daemon)
        with pytest.raises(ServiceError, match=r"ended with -9"):
            asked.result(timeout=100)
        assert daemon.client.compare_with_ksm().ksm is not None
        assert not Path(f"/proc/{child}").exists()
        assert_unharmed(vm)


def killed_count(daemon: Daemon) -> int:
    waits(lambda: counting_process(daemon))
    child = counting_process(daemon)
    assert child is not None
    os.kill(child, signal.SIGKILL)
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_count_ends_with_its_daemon(
    directories: Directories,
    start: Start,
    tmp_path: Path,
    pool: ThreadPoolExecutor,
    number: signal.Signals,
) -> None:
    vm = start(SHARED)
    slow = slow_files(tmp_path)
    with running(directories, *monitors(vm)) as daemon:
        merged_first(daemon, vm)
        asked = pool.submit(daemon.client.content_sources, slow)
        waits(lambda: counting_process(daemon))
        child = counting_process(daemon)
        daemon.signal(number)
        with pytest.raises(ServiceError):
            asked.result(timeout=100)
        waits(lambda: not Path(f"/proc/{child}").exists())
        daemon.process.wait(60)
    with running(directories, *monitors(vm)) as daemon:
        wait_mergeable(daemon, vm)
        assert daemon.client.compare_with_ksm().ksm is not None
        assert_unharmed(vm)


def merged_first(daemon: Daemon, vm: Vm) -> None:
    wait_mergeable(daemon, vm)
    assert daemon.client.merge([vm.name], timeout_s=60).converged


def test_a_vm_that_ends_meanwhile_is_left_out(
    directories: Directories, start: Start, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    stays, ends = start(SHARED), start(PRIVATE)
    with running(directories, *monitors(stays, ends)) as daemon:
        wait_mergeable(daemon, stays, ends)
        daemon.signal(signal.SIGSTOP)
        asked: Future[ContentSources] = pool.submit(daemon.client.content_sources, [str(tmp_path)])
        time.sleep(0.5)  # the request waits for the engine
        ends.kill()
        daemon.signal(signal.SIGCONT)
        assert [vm.name for vm in asked.result(timeout=100).vms] == [stays.name]
        assert_unharmed(stays)


def test_what_may_be_named(directories: Directories, start: Start, tmp_path: Path) -> None:
    vm = start(SHARED)
    allowed, other = tmp_path / "images", tmp_path / "other"
    for folder in (allowed, other):
        folder.mkdir()
        (folder / "file").write_bytes(b"content")
    (allowed / "link").symlink_to(other / "file")
    with running(directories, *monitors(vm)) as daemon:
        wait_mergeable(daemon, vm)
        with pytest.raises(ServiceUsageError, match=r"^known file /nothing: No such file"):
            daemon.client.content_sources(["/nothing"])
        with over(daemon.client.socket) as http:
            for paths in (["etc"], [], ["/x"] * 51, None):
                answer = http.post("/v1/content-sources", json={"known": paths})
                assert answer.status_code == 422
        assert daemon.client.content_sources([other / "file"]).known
        assert daemon.end() >= 0
    directories.write(f'api_group = "0"\nknown_folders = ["{allowed}"]\n')
    with running(directories, *monitors(vm)) as daemon:
        wait_mergeable(daemon, vm)
        assert daemon.client.content_sources([allowed / "file"]).known
        for path in (other / "file", allowed / "link", allowed / "../other/file"):
            with over(daemon.client.socket) as http:
                answer = http.post("/v1/content-sources", json={"known": [str(path)]})
            assert answer.status_code == 422
            assert "known_folders" in json.loads(answer.text)["error"]


def test_without_vms_there_is_nothing_to_look_at(directories: Directories) -> None:
    with running(directories, "--qmp", str(directories.base / "*.qmp")) as daemon:
        with pytest.raises(ServiceUsageError, match=r"no VM is attached"):
            daemon.client.content_sources(["/"])
        with pytest.raises(ServiceUsageError, match=r"no VM is attached"):
            daemon.client.compare_with_ksm()
