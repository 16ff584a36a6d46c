"""pytest fixture `vmdedup`: merge the VMs of a test run and get the typed report.

    # conftest.py
    pytest_plugins = ["vmdedup.pytest_plugin"]          # or: pytest -p vmdedup.pytest_plugin

    @pytest.fixture
    def vmdedup_vms(my_vms):
        return [vm.qmp_path for vm in my_vms]           # QMP sockets, or globs

    def test_sharing(vmdedup):
        assert vmdedup.host.saved_bytes > 0

Owns the fixture and its options. Opt-in: there is no entry point, so that pytest
loads nothing of vmdedup unless a suite asks for it. If a daemon runs, it does the
work and keeps the merges; else the VMs are unmerged when the fixture ends.
A VM that cannot be merged fails the test with the reason; `vmdedup_strict = false`
leaves that to the test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmdedup.client import Client
    from vmdedup.models import SharingReport, VmListing

_SCOPES = ("function", "class", "module", "package", "session")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--vmdedup-qmp` and the ini options."""
    group = parser.getgroup("vmdedup", "merging the memory of VMs")
    group.addoption(
        "--vmdedup-qmp",
        action="append",
        metavar="PATH",
        help="QMP socket (or glob) of a VM for the fixture vmdedup; repeatable",
    )
    parser.addini("vmdedup_qmp", "QMP sockets or globs for the fixture vmdedup", type="args")
    parser.addini("vmdedup_scope", f"scope of the fixture vmdedup: {', '.join(_SCOPES)}")
    parser.addini("vmdedup_timeout", "seconds that merging may take", default="120")
    parser.addini(
        "vmdedup_strict",
        "whether a VM that is not merged fails the test",
        type="bool",
        default=True,
    )


def _scope(fixture_name: str, config: pytest.Config) -> Any:
    scope = str(config.getini("vmdedup_scope") or "function")
    if scope not in _SCOPES:
        raise pytest.UsageError(f"vmdedup_scope = {scope}: choose one of {', '.join(_SCOPES)}")
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
def vmdedup(
    vmdedup_vms: Sequence[str | os.PathLike[str]], pytestconfig: pytest.Config
) -> Iterator[SharingReport]:
    """The report after the VMs are merged and more passes would bring nothing."""
    from vmdedup.errors import VmdedupError

    timeout_s = _timeout_s(pytestconfig)
    paths = [os.fspath(path) for path in vmdedup_vms]
    try:
        with _merged(paths, timeout_s) as report:
            if pytestconfig.getini("vmdedup_strict"):
                _require_merged(report)
            yield report
    except VmdedupError as error:
        pytest.fail(f"vmdedup: {error}", pytrace=False)


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
def _merged(paths: list[str], timeout_s: float) -> Iterator[SharingReport]:
    """The report of merged VMs; without a daemon they are unmerged at the end."""
    from vmdedup.cli.service import daemon_if_running

    service = daemon_if_running(None)
    if service is not None:
        with service:
            yield _merged_by(service, paths, timeout_s)
        return
    from vmdedup.deduplicator import Deduplicator
    from vmdedup.models import SharingReport

    with Deduplicator() as dedup:
        _require_attached(dedup.attach(paths).vms)
        report = dedup.run(until_converged=True, timeout_s=timeout_s)
        assert isinstance(report, SharingReport)
        try:
            yield report
        finally:
            dedup.unmerge()


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
