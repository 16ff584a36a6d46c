"""The fixtures: merged VMs, their report, and the pages broken between two points.

Owns how the VMs of a test are merged. If a daemon runs, it does the work and keeps the
merges; else the VMs are unmerged when the fixture ends. Without a daemon only one engine
can work: the workers of pytest-xdist then wait for each other. A VM that cannot be merged
fails the test with the reason; `vmdedup_strict = false` leaves that to the test.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmdedup.client import Client
    from vmdedup.models import Judgement, SharingReport, VmListing

MERGED = "vmdedup_merged"
"""Name of the fixture that merges, for tests that are only marked."""
SCOPES = ("function", "class", "module", "package", "session")
_LOCK_NAME = "vmdedup-xdist.lock"


@dataclass(frozen=True)
class Merged:
    """Merged VMs: the report after that, and a way to look at them again."""

    report: SharingReport
    look: Callable[[], SharingReport]


def _scope(fixture_name: str, config: pytest.Config) -> Any:
    scope = str(config.getini("vmdedup_scope") or "function")
    if scope not in SCOPES:
        raise pytest.UsageError(f"vmdedup_scope = {scope}: choose one of {', '.join(SCOPES)}")
    return scope


@pytest.fixture(scope=_scope)
def vmdedup_vms(pytestconfig: pytest.Config) -> Sequence[str | os.PathLike[str]]:
    """QMP sockets of the VMs to merge: override it, or use `--vmdedup-qmp`."""
    given: list[str] = pytestconfig.getoption("--vmdedup-qmp") or pytestconfig.getini("vmdedup_qmp")
    if not given:
        pytest.fail(
            "fixture vmdedup: no VM given; override the fixture vmdedup_vms (QMP sockets), or use"
            " --vmdedup-qmp PATH",
            pytrace=False,
        )
    return given


@pytest.fixture(scope=_scope)
def vmdedup_merged(
    vmdedup_vms: Sequence[str | os.PathLike[str]],
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Merged]:
    """The merged VMs; for the fixtures below."""
    from vmdedup.errors import VmdedupError

    timeout_s = _timeout_s(pytestconfig)
    paths = [os.fspath(path) for path in vmdedup_vms]
    is_worker = hasattr(pytestconfig, "workerinput")
    lock = tmp_path_factory.getbasetemp().parent / _LOCK_NAME if is_worker else None
    try:
        with _merged(paths, timeout_s, lock) as merged:
            if pytestconfig.getini("vmdedup_strict"):
                _require_merged(merged.report)
            yield merged
    except VmdedupError as error:
        raise pytest.fail.Exception(f"vmdedup: {error}", pytrace=False) from None


@pytest.fixture(scope=_scope)
def vmdedup(vmdedup_merged: Merged) -> SharingReport:
    """The report after the VMs are merged and more passes would bring nothing."""
    return vmdedup_merged.report


@dataclass
class BrokenPages:
    """Writes to merged pages between two points; empty until the second one."""

    pages: dict[str, int] = field(default_factory=dict)
    """Number of writes by the VM's name."""

    @property
    def total(self) -> int:
        """Over all VMs."""
        return sum(self.pages.values())


@pytest.fixture
def vmdedup_broken(
    vmdedup_merged: Merged,
) -> Callable[..., AbstractContextManager[BrokenPages]]:
    """Counts the writes to merged pages inside a `with`; fails above `max_pages`."""

    @contextmanager
    def between(max_pages: int | None = None) -> Iterator[BrokenPages]:
        from vmdedup.report.expectations import Expectations, broken_pages, judge

        found, before = BrokenPages(), vmdedup_merged.look()
        yield found
        now = vmdedup_merged.look()
        found.pages = broken_pages(before, now)
        require(judge(Expectations(max_broken_pages=max_pages), now, before))

    return between


def require(judgement: Judgement) -> None:
    """Fail the test with a line for each rule that is broken."""
    broken = [f"{rule.rule}: {rule.message}" for rule in judgement.rules if not rule.holds]
    if broken:
        pytest.fail(f"vmdedup: {'; '.join(broken)}", pytrace=False)


def _timeout_s(config: pytest.Config) -> float:
    text = str(config.getini("vmdedup_timeout"))
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s <= 3600:
        raise pytest.UsageError(f"vmdedup_timeout = {text}: write seconds, up to 3600")
    return timeout_s


@contextmanager
def _merged(paths: list[str], timeout_s: float, lock: Path | None) -> Iterator[Merged]:
    """Merged VMs; without a daemon they are unmerged at the end.

    `lock`: the file that tells workers which of them merges, while no daemon does.
    """
    from vmdedup.cli.service import daemon_if_running

    service = daemon_if_running(None)
    if service is not None:
        with service:
            report = _merged_by(service, paths, timeout_s)
            yield Merged(report, lambda: service.report(fresh=True))
        return
    from vmdedup.deduplicator import Deduplicator

    with nullcontext() if lock is None else _held(lock), Deduplicator() as dedup:
        _require_attached(dedup.attach(paths).vms)
        report = dedup.run(until_converged=True, timeout_s=timeout_s)
        try:
            yield Merged(report, dedup.report)
        finally:
            dedup.unmerge()


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold the lock, which ends with this process at the latest; waits for the other worker."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _merged_by(service: Client, paths: list[str], timeout_s: float) -> SharingReport:
    """The daemon's report of these VMs; it first attaches to those it does not follow yet."""
    from vmdedup.attach.discover import expand

    wanted = [str(path.absolute()) for found in expand(paths) for path in found.sockets]
    known = {vm.qmp: vm for vm in service.vms().vms if vm.qmp is not None}
    rows = [known[path] if path in known else service.attach(path) for path in wanted]
    _require_attached(rows)
    # Two VMs may share a name; a pid belongs to one VM.
    return service.merge([str(row.pid) for row in rows], timeout_s=timeout_s)


def _require_attached(rows: Sequence[VmListing]) -> None:
    lost = [f"{row.name}: {row.reason or 'not attached'}" for row in rows if not row.mergeable]
    if not rows or len(lost) == len(rows):
        pytest.fail(f"vmdedup: no VM can be merged: {'; '.join(lost) or 'none'}", pytrace=False)


def _require_merged(report: SharingReport) -> None:
    lost = [f"{vm.name}: {vm.reason}" for vm in report.vms if not vm.is_served]
    if lost:
        pytest.fail(f"vmdedup: not merged: {'; '.join(lost)}", pytrace=False)
    if not report.converged:
        pytest.fail("vmdedup: did not converge in time (ini option vmdedup_timeout)", pytrace=False)
