"""Two engines on one host: what each may have, and what the second is told."""

from __future__ import annotations

import pytest

from tests.harness.kernel import becomes_true
from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import (
    Directories,
    assert_unharmed,
    merged,
    monitors,
    running,
    store_pages,
)
from vmdedup.deduplicator import Deduplicator
from vmdedup.settings import DomainRule, Settings

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]


def beside(directories: Directories, other: Directories, domain: str = "") -> None:
    """The other daemon has runtime and state directories of its own and the same store_dir."""
    rules = f'[[domains]]\nname = "*"\ndomain = "{domain}"\n' if domain else ""
    text = f'runtime_dir = "{other.runtime}"\nstore_dir = "{directories.store}"\n'
    other.config.write_text(text + f'state_dir = "{other.state}"\n' + rules)


def test_a_second_daemon_for_one_domain_merges_nothing_and_says_why(
    directories: Directories, start: Start
) -> None:
    mine, theirs = [start(SHARED), start(PRIVATE)], [start(SHARED), start(PRIVATE)]
    with Directories() as other, running(directories, *monitors(*mine)) as first:
        merged(first, *mine)
        beside(directories, other)
        with running(other, *monitors(*theirs)) as second:
            assert becomes_true(lambda: all(second.row_of(vm)[1] for vm in theirs), 60)
            for vm in theirs:
                mergeable, reason = second.row_of(vm)
                assert not mergeable
                assert f"pid {first.process.pid}" in str(reason)
                assert f"runtime directory {directories.runtime}" in str(reason)
                assert f"`vmdedup merge --runtime-dir {directories.runtime}`" in str(reason)
            assert max(map(store_pages, theirs)) == 0
            merged(first, *mine)
            assert_unharmed(*mine, *theirs)
            # Once the first is gone, the second takes its turn by itself.
            first.end()
            assert becomes_true(lambda: min(map(store_pages, theirs)) > 200, 90)
        assert_unharmed(*mine, *theirs)


def test_daemons_for_different_domains_run_beside_each_other(
    directories: Directories, start: Start
) -> None:
    mine, theirs = [start(SHARED), start(PRIVATE)], [start(SHARED), start(PRIVATE)]
    with Directories() as other, running(directories, *monitors(*mine)) as first:
        beside(directories, other, domain="theirs")
        with running(other, *monitors(*theirs)) as second:
            merged(first, *mine)
            merged(second, *theirs)
            assert_unharmed(*mine, *theirs)


def test_one_vm_has_one_engine(directories: Directories, start: Start) -> None:
    """Also over a second monitor of it, in another trust domain and another store directory."""
    vm = start(SHARED)
    with Directories() as other, running(directories, *monitors(vm)) as first:
        merged(first, vm)
        settings = Settings(
            runtime_dir=other.runtime,
            store_dir=other.store,
            domains=(DomainRule(name="*", domain="theirs"),),
        )
        with Deduplicator(settings) as dedup:
            (row,) = dedup.attach([str(vm.test_qmp_path)]).vms
            assert not row.mergeable
            assert f"pid {first.process.pid}" in str(row.reason)
        with Deduplicator(settings) as dedup:
            (row,) = dedup.attach([str(vm.test_qmp_path)], refuse=False).vms
            assert "vmdedup merge" in str(row.reason)
        # Reading is not working on it.
        with Deduplicator(settings) as dedup:
            (row,) = dedup.attach([str(vm.test_qmp_path)], merging=False).vms
            assert row.mergeable
        said = other.verb("run", "--once", "--qmp", str(vm.test_qmp_path), code=1).stderr
        assert f"pid {first.process.pid}" in said
        said = other.verb("unmerge", "--qmp", str(vm.test_qmp_path), code=1).stderr
        assert f"pid {first.process.pid}" in said
        assert store_pages(vm) > 200
        assert_unharmed(vm)
