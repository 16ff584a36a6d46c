"""Hosts with lesser processors, as in nested test labs.

Without XSAVE VMs are merged all the same. Where the installed numpy does not run, that is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.host import Host, build_missing, make_payload
from tests.harness.skips import require
from tests.hosts.inner import FOLDER, InnerVm

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]

_STUBS = ("", "--mask stub")
"""With the loop stub, and by sigreturn chains alone, which restore the registers themselves."""


@pytest.fixture
def old_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Its CPU is an x86-64-v2, which is the least that numpy needs."""
    require(root_missing() or build_missing())
    with Host(make_payload(tmp_path_factory.mktemp("payload")), cpu="Nehalem") as running:
        yield running


def test_a_processor_on_which_numpy_does_not_run_is_named(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """It ended every verb by SIGILL, without a word."""
    require(root_missing() or build_missing())
    with Host(make_payload(tmp_path_factory.mktemp("payload")), cpu="kvm64") as lesser:
        for verb in ("doctor", "run --once", "vms"):
            done = lesser.ask(f"vmdedup {verb}")
            assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done
            assert "numpy does not run on this processor" in done.err
            assert "sse4_2" in done.err
        assert lesser.ask("vmdedup resume").code == 0


def test_vms_are_merged_and_unmerged_without_xsave(old_host: Host) -> None:
    flags = old_host.run("grep -m1 ^flags /proc/cpuinfo").split()
    assert "xsave" not in flags
    vms = [
        InnerVm(old_host, name, seed=number, mib=4, rewrite_per_s=5, check_per_s=100)
        for number, name in enumerate(("one", "two"), 1)
    ]
    for vm in vms:
        vm.wait_ready()
    checks = json.loads(old_host.ask("vmdedup doctor --json", within_s=600).out)["checks"]
    assert [check for check in checks if check["verdict"] == "problem"] == []
    qmp = " ".join(f"--qmp {FOLDER}/{vm.name}.qmp" for vm in vms)
    for mask in _STUBS:
        merge = f"vmdedup run --passes 3 --no-progress --json {qmp} {mask}"
        report = json.loads(old_host.run(merge, within_s=900))
        assert [row["status"] for row in report["vms"]] == ["merged", "merged"], report
        assert all(row["merged_pages"] for row in report["vms"]), report
        assert all(vm.store_pages() for vm in vms)
        for vm in vms:
            vm.assert_unharmed()
        old_host.run(f"vmdedup unmerge --no-progress {qmp} {mask}", within_s=900)
        assert [vm.store_pages() for vm in vms] == [0, 0]
        for vm in vms:
            vm.assert_unharmed()
