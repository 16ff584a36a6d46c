"""The pytest plugin as a suite uses it: real VMs, with and without a daemon."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import httpcore
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot
from tests.service.daemon import Directories, running, store_pages

pytest_plugins = ["pytester"]
assert httpcore  # loaded before pytester: it takes away what a test imports first,
# and httpx, which imports httpcore late, would no more know its errors in the tests that follow.

EXAMPLE = Path(__file__).parents[2] / "configs/plugin/test_sharing.py"
SUITE = """
    import pytest

    @pytest.fixture(scope="module")
    def vmdedup_vms():
        return {paths!r}

    def test_it_is_typed(vmdedup):
        assert vmdedup.converged
        assert [vm.status for vm in vmdedup.vms] == ["merged", "merged"]
        assert vmdedup.host.saved_bytes > 0

    def test_a_wrong_expectation_fails(vmdedup):
        assert vmdedup.host.pages_sharing == -1
"""


def plugin(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, own: Directories, *words: str
) -> pytest.RunResult:
    """pytest as a process, with this test's directories."""
    monkeypatch.setenv("VMDEDUP_RUNTIME_DIR", str(own.runtime))
    monkeypatch.setenv("VMDEDUP_STORE_DIR", str(own.store))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return pytester.runpytest_subprocess("-p", "vmdedup.pytest_plugin", "-q", *words)


def example(pytester: pytest.Pytester) -> str:
    """The example, away from this repository's own settings of pytest."""
    return shutil.copy(str(EXAMPLE), str(pytester.path))


@pytest.fixture
def vms(boot: Boot, need: Callable[[str | None], None]) -> list[Vm]:
    need(root_missing())
    running = [
        boot("bare", backend=Backend(mib=16), parameters={"mib": 4, "seed": seed}, ready=False)
        for seed in (1, 2)
    ]
    for vm in running:
        vm.wait_ready()
    return running


@pytest.mark.qemu
def test_it_merges_and_takes_back(
    directories: Directories,
    vms: list[Vm],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytester.makeini("[pytest]\nvmdedup_scope = module\n")
    pytester.makepyfile(SUITE.format(paths=[str(vm.qmp_path) for vm in vms]))
    done = plugin(pytester, monkeypatch, directories)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["E *assert * == -1"])
    assert [store_pages(vm) for vm in vms] == [0, 0]
    given = [word for vm in vms for word in ("--vmdedup-qmp", str(vm.qmp_path))]
    done = plugin(pytester, monkeypatch, directories, *given, example(pytester))
    done.assert_outcomes(passed=2)
    for vm in vms:
        vm.wait_passes(1)
        assert vm.errors == 0


@pytest.mark.qemu
def test_where_a_daemon_runs_it_does_the_work(
    directories: Directories,
    vms: list[Vm],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The daemon follows one of them: the other is given to it by the fixture.
    with running(directories, "--qmp", str(vms[0].qmp_path)) as daemon:
        given = [word for vm in vms for word in ("--vmdedup-qmp", str(vm.qmp_path))]
        plugin(pytester, monkeypatch, directories, *given, example(pytester)).assert_outcomes(
            passed=2
        )
        assert all(daemon.row_of(vm)[0] for vm in vms)
        assert all(store_pages(vm) for vm in vms)
        unknown = [*given, "--vmdedup-qmp", str(directories.base / "none.qmp")]
        done = plugin(pytester, monkeypatch, directories, *unknown)
        done.assert_outcomes(errors=2)
        done.stdout.fnmatch_lines(["*none.qmp: no socket there*"])
    for vm in vms:
        vm.wait_passes(1)
        assert vm.errors == 0


@pytest.mark.unit
def test_it_says_what_is_missing(
    directories: Directories, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("def test_x(vmdedup): pass")
    plugin(pytester, monkeypatch, directories).stdout.fnmatch_lines(["*--vmdedup-qmp PATH*"])
    missing = plugin(pytester, monkeypatch, directories, "--vmdedup-qmp", "/nowhere")
    missing.stdout.fnmatch_lines(["*no VM can be merged: /nowhere: no socket there*"])
    pytester.makeini("[pytest]\nvmdedup_scope = week\n")
    odd = plugin(pytester, monkeypatch, directories)
    odd.stdout.fnmatch_lines(["*vmdedup_scope = week: choose one of*"])
    without = pytester.runpytest_subprocess("-q")
    without.stdout.fnmatch_lines(["*fixture 'vmdedup' not found*"])
