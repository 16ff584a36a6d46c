"""The Debian package in Debian 12 and 13, under systemd: installed, run, upgraded, removed, purged.

The host has none of vmdedup's Python packages, and no network. VMs run through all of it: what
is merged stays merged, also without vmdedup.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.host import Host, build_missing, make_payload
from tests.harness.skips import require
from tests.hosts.inner import InnerVm
from tests.hosts.unit import Unit
from tests.release.debian import SUITES, Suite, build_package, builder_missing
from tests.release.package import project
from vmdedup.cli.main import app

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(3600)]

_GUESTS = {"bookworm": "host", "trixie": "host-trixie"}
_BARE = """
set -e
mount -o ro /dev/vdb /payload
rm -r /usr/local/lib/python3.*/dist-packages/* /usr/local/bin/vmdedup
rm -f /etc/dpkg/dpkg.cfg.d/*
"""
"""Nothing of vmdedup's; and dpkg leaves out no documentation."""
_INSTALL_S = 1800.0
_APT = "DEBIAN_FRONTEND=noninteractive apt-get --quiet --assume-yes --no-install-recommends"
_LEFT = (
    "find / -xdev -path /vmdedup -prune -o -path /sys -prune -o -path /proc -prune"
    " -o -name '*vmdedup*' -print | grep -v vmdedup-agent || true"
)


def next_version(package: Path, folder: Path) -> Path:
    """The same package as the next revision: `~debN` becomes `~debN+1`."""
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    text = control.read_text()
    version = next(line for line in text.splitlines() if line.startswith("Version: "))
    control.write_text(text.replace(version, f"{version}+1"))
    newer = folder / "newer.deb"
    subprocess.run(["dpkg-deb", "-Zgzip", "-z1", "--build", tree, newer], check=True)
    shutil.rmtree(tree)
    return newer


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> Suite:
    return SUITES[request.param]


@pytest.fixture
def debian(suite: Suite, tmp_path: Path) -> Iterator[Host]:
    """A host of that suite; the package and its next version are in /payload."""
    guest = _GUESTS[suite.name]
    require(root_missing() or builder_missing() or build_missing(guest=guest))
    package = build_package(suite, tmp_path)
    newer = next_version(package, tmp_path)

    def add(content: Path) -> None:
        shutil.move(package, content / "first.deb")
        shutil.move(newer, content / "newer.deb")

    with Host(make_payload(tmp_path, add=add), guest=guest, prepare=_BARE) as running:
        yield running


def install(host: Host, package: str) -> str:
    return host.run(f"{_APT} install /payload/{package} 2>&1", within_s=_INSTALL_S)


def vms_of(host: Host) -> list[InnerVm]:
    """Two that share most of their memory."""
    started = [
        InnerVm(host, name, seed=number, mib=4, rewrite_per_s=5, check_per_s=100)
        for number, name in enumerate(("one", "two"), 1)
    ]
    for vm in started:
        vm.wait_ready()
    return started


def assert_installed(host: Host, suite: Suite) -> None:
    """All parts are in their places, and nothing has been started."""
    assert host.run("vmdedup --version") == f"vmdedup {project()['version']}\n"
    where = (
        "import sys, numpy, pydantic, vmdedup.linux.pagemap as each; print(numpy, pydantic, each)"
    )
    for module in host.run(f"/usr/lib/vmdedup/bin/python3 -I -c '{where}'").split(">"):
        assert "from '/usr/lib/vmdedup/" in module or not module.strip()
    assert host.ask("systemctl is-enabled vmdedup").out == "disabled\n"
    assert host.ask("systemctl is-active vmdedup").out == "inactive\n"
    assert host.run("sysctl -n vm.max_map_count").strip() == "1048576"
    assert host.run("getent group vmdedup").startswith("vmdedup:x:")
    assert host.run("stat -c '%a %U' /dev/shm/vmdedup /run/vmdedup").split("\n")[:2] == [
        "1700 root",
        "700 root",
    ]
    for command in app.registered_commands:
        host.run(f"test -s /usr/share/man/man1/vmdedup-{command.name}.1.gz")
    host.run("test -s /usr/share/man/man5/vmdedup.toml.5.gz")
    completion = "/usr/share/bash-completion/completions/vmdedup"
    assert "vmdedup" in host.run(f"bash -c '. {completion}; complete -p vmdedup'")
    assert host.run("dpkg-query -W -f '${Version}' vmdedup") == suite.version
    assert host.run("dpkg --verify vmdedup") == ""


def test_the_life_of_the_package(debian: Host, suite: Suite) -> None:
    assert f'VERSION_ID="{suite.number}"' in debian.run("cat /etc/os-release")
    said = install(debian, "first.deb")
    assert "not starting it" in said
    assert_installed(debian, suite)

    vms = vms_of(debian)
    unit = Unit(debian)
    debian.run("systemctl enable --now vmdedup 2>&1")
    unit.wait_answers()
    unit.wait_merged(*vms)
    assert_unharmed(vms)

    debian.run("sed -i 's/^#history_days = 90/history_days = 7/' /etc/vmdedup.toml")
    engine = unit.main_pid
    install(debian, "newer.deb")
    unit.wait_restarted(engine)
    assert debian.run("dpkg-query -W -f '${Version}' vmdedup") == f"{suite.version}+1"
    assert "history_days = 7\n" in debian.run("cat /etc/vmdedup.toml")
    unit.wait_followed(*vms)
    unit.wait_merged(*vms)
    assert_unharmed(vms)
    assert "Traceback" not in unit.journal()

    said = debian.run(f"{_APT} remove vmdedup 2>&1", within_s=_INSTALL_S)
    assert "go on sharing" in said
    unit.wait_all_gone()
    unit.wait_merged(*vms)
    assert_unharmed(vms)
    assert debian.run("ls -d /usr/lib/vmdedup /usr/bin/vmdedup 2>/dev/null || true") == ""
    debian.run("test -e /etc/vmdedup.toml && test -e /var/lib/vmdedup/history.db")

    debian.run(f"{_APT} purge vmdedup 2>&1", within_s=_INSTALL_S)
    assert [path for path in debian.run(_LEFT).split() if "/dev/shm/" not in path] == []
    assert_unharmed(vms)
    for vm in vms:
        vm.end()


def assert_unharmed(vms: list[InnerVm]) -> None:
    for vm in vms:
        vm.assert_unharmed()
