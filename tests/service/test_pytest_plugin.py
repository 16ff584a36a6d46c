"""The pytest plugin as a suite uses it: real VMs, with and without a daemon."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import httpcore
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot
from tests.service.daemon import Directories, assert_unharmed, running, store_pages
from vmdedup.models import SharingReport

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

RULES = """
    import pytest

    NAME, PID = {name!r}, {pid}

    @pytest.fixture
    def vmdedup_vms():
        return {paths!r}

    def write_to_merged(pages, skipped=0):
        # The byte that is there already: the page breaks, and the guest sees no change.
        with open(f"/proc/{{PID}}/maps") as maps:
            starts = [int(line.split("-")[0], 16) for line in maps if ".store" in line]
        with open(f"/proc/{{PID}}/mem", "r+b", buffering=0) as memory:
            for start in starts[skipped:][:pages]:
                memory.seek(start)
                byte = memory.read(1)
                memory.seek(start)
                memory.write(byte)

    @pytest.mark.vmdedup(min_saved="1%", max_gate_ms=60000, max_stops=0, max_broken_pages=9999)
    def test_kept():
        write_to_merged(3)

    @pytest.mark.vmdedup(min_saved="100%")
    def test_saves_too_little():
        raise ZeroDivisionError("the rule comes first")

    @pytest.mark.vmdedup(max_broken_pages=2)
    def test_writes_too_much(vmdedup):
        write_to_merged(3)

    @pytest.mark.vmdedup(min_saved="100%")
    class TestMarked:
        @pytest.mark.vmdedup(min_saved="1%")
        def test_the_closest_marker_wins(self):
            pass

    def test_between_two_points(vmdedup_broken):
        with vmdedup_broken() as broken:
            write_to_merged(3, skipped=10)
        assert broken.pages[NAME] >= 3
        with pytest.raises(pytest.fail.Exception, match="max_broken_pages: .* above 2"):
            with vmdedup_broken(max_pages=2):
                write_to_merged(3, skipped=20)

    @pytest.mark.vmdedup(min_save="1%")
    def test_wrong_marker():
        pass

    def test_of_something_else():
        pass
"""


def rules_for(vms: list[Vm]) -> str:
    """The suite for these VMs, which writes to the first of them."""
    paths = [str(vm.qmp_path) for vm in vms]
    return RULES.format(paths=paths, name=vms[0].name, pid=vms[0].pid)


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
    assert_unharmed(*vms)


@pytest.mark.qemu
@pytest.mark.parametrize("workers", [0, 2])
def test_rules_are_checked_and_shown(
    directories: Directories,
    vms: list[Vm],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """Both workers of pytest-xdist have the same VMs: they take turns."""
    pytester.makepyfile(rules_for(vms))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(pytester.path.parent))
    words = ["--vmdedup-artefacts", "seen", "--junit-xml", "junit.xml"]
    words += ["-p", "xdist.plugin", "-n", str(workers)] if workers else []
    done = plugin(pytester, monkeypatch, directories, *words)
    done.assert_outcomes(passed=4, failed=2, errors=1)
    done.stdout.fnmatch_lines(["*= vmdedup =*", "*saved * of held * gates * broken * test"])
    file = rf"{pytester.path.name}/test_rules_are_checked_and_shown\.py"
    for pattern in (
        r"\.py::test_kept$",
        rf"^::error file={file},line=\d+,title=.*::min_saved: .*%25 saved .*%25$",
        r"^::error .*test_writes_too_much::max_broken_pages: \d+ writes .*, above 2$",
        r"^::error .*test_wrong_marker::marker: min_save: no such rule",
    ):
        assert any(re.search(pattern, line) for line in done.stdout.lines), pattern
    names = sorted(path.name for path in (pytester.path / "seen").iterdir())
    assert len(names) == 2 * 5
    assert all((pytester.path / "seen" / each).stat().st_size for each in names)
    report = next(path for path in (pytester.path / "seen").glob("*test_kept*.json"))
    assert SharingReport.model_validate_json(report.read_text()).host.saved_bytes > 0
    junit = ElementTree.parse(pytester.path / "junit.xml")
    found = junit.findall(".//testcase[@name='test_writes_too_much']//property")
    figures = {each.attrib["name"]: each.attrib["value"] for each in found}
    assert int(figures["vmdedup_broken_pages"]) >= 3
    assert int(figures["vmdedup_saved_bytes"]) > 0
    assert [store_pages(vm) for vm in vms] == [0, 0]
    assert_unharmed(*vms)


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
        pytester.makepyfile(rules_for(vms))
        plugin(pytester, monkeypatch, directories, "-k", "kept or between").assert_outcomes(
            passed=2, deselected=7
        )
        assert all(daemon.row_of(vm)[0] for vm in vms)
        assert all(store_pages(vm) for vm in vms)
        unknown = [*given, "--vmdedup-qmp", str(directories.base / "none.qmp")]
        done = plugin(pytester, monkeypatch, directories, *unknown, example(pytester))
        done.assert_outcomes(errors=2)
        done.stdout.fnmatch_lines(["*none.qmp: no socket there*"])
    assert_unharmed(*vms)


@pytest.mark.unit
def test_it_says_what_is_missing(
    directories: Directories, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("def test_x(vmdedup): pass")
    plugin(pytester, monkeypatch, directories).stdout.fnmatch_lines(["*--vmdedup-qmp PATH*"])
    missing = plugin(pytester, monkeypatch, directories, "--vmdedup-qmp", "/nowhere")
    missing.stdout.fnmatch_lines(["*no VM can be merged: /nowhere: no socket there*"])
    pytester.makepyfile("""
        import pytest

        @pytest.mark.vmdedup(min_saved=0.3)
        def test_x():
            pass
    """)
    wrong = plugin(pytester, monkeypatch, directories, "--vmdedup-qmp", "/nowhere")
    wrong.stdout.fnmatch_lines(["*min_saved=0.3: write a percentage, for instance 30%*"])
    pytester.makeini("[pytest]\nvmdedup_scope = week\n")
    odd = plugin(pytester, monkeypatch, directories)
    odd.stdout.fnmatch_lines(["*vmdedup_scope = week: choose one of*"])
    pytester.makepyfile("def test_x(vmdedup): pass")
    without = pytester.runpytest_subprocess("-q")
    without.stdout.fnmatch_lines(["*fixture 'vmdedup' not found*"])
